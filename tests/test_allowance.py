"""What peers may cost: CPU time of the control thread, and lines of the log."""

from __future__ import annotations

import logging

import pytest

from takeover import allowance
from takeover.allowance import MOST_LINES, PERIOD, CpuAllowance, SparingLogger


class Clock:
    """Both clocks of a thread, which run as the test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.spent = 0.0
        monkeypatch.setattr(allowance.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(allowance.time, "thread_time", lambda: self.spent)

    def pass_by(self, seconds: float, working: float = 0.0) -> None:
        self.now += seconds
        self.spent += working


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_a_burst_costs_no_rest_and_what_is_beyond_it_is_paid_at_the_share(clock: Clock) -> None:
    cpu = CpuAllowance(share=0.25, burst=1.0)
    clock.pass_by(1.0, working=1.0)
    assert cpu.debt() == 0.0
    clock.pass_by(1.0, working=1.0)
    assert cpu.debt() == pytest.approx((1.0 - 0.25) / 0.25)
    clock.pass_by(2.0)
    assert cpu.debt() == pytest.approx(1.0)
    clock.pass_by(1.0)
    assert cpu.debt() == 0.0


def test_no_more_than_a_burst_is_saved_however_long_nothing_happens(clock: Clock) -> None:
    cpu = CpuAllowance(share=0.5, burst=1.0)
    clock.pass_by(1000.0)
    assert cpu.debt() == 0.0
    clock.pass_by(0.0, working=2.0)
    assert cpu.debt() == pytest.approx(2.0)


def test_a_thread_that_only_works_has_its_share_in_the_long_run(clock: Clock) -> None:
    cpu = CpuAllowance(share=0.1, burst=0.5)
    while clock.now < 1000.0:
        clock.pass_by(0.01, working=0.01)
        clock.pass_by(cpu.debt())
    assert clock.spent / clock.now == pytest.approx(0.1, rel=0.01)


def test_a_flood_of_one_kind_of_line_is_cut_and_the_next_period_says_by_how_many(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    sparing = SparingLogger(logging.getLogger("takeover"))
    with caplog.at_level(logging.INFO, "takeover"):
        for number in range(MOST_LINES + 5):
            sparing.log(logging.WARNING, "refused %d", number)
        sparing.log(logging.INFO, "another kind")
        assert caplog.messages == [*(f"refused {number}" for number in range(MOST_LINES)), "another kind"]
        caplog.clear()
        clock.pass_by(PERIOD)
        sparing.log(logging.WARNING, "refused %d", 99)
        assert caplog.messages == ["5 more lines like the next were left out", "refused 99"]
