"""Which of the two backends a process takes, and what the package says of itself."""

from __future__ import annotations

import sys

import pytest

import takeover
from conftest import CYTHON_IS_BUILT
from takeover._backend import _choose
from takeover.errors import UsageError


def test_a_backend_that_there_is_none_of_is_wrong_usage() -> None:
    with pytest.raises(UsageError, match="TAKEOVER_BACKEND=rust: must be auto, cython or python"):
        _choose("rust")


@pytest.mark.skipif(not CYTHON_IS_BUILT, reason="the compiled modules are not built")
def test_the_compiled_backend_is_taken_where_it_can_be_imported() -> None:
    for wanted in ("auto", "cython"):
        name, _, loop = _choose(wanted)
        assert (name, loop.__name__) == ("cython", "takeover._loop")


def test_where_the_compiled_modules_cannot_be_imported_the_plain_ones_serve_unless_they_are_insisted_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in ("_fdpass", "_loop"):
        monkeypatch.delattr(takeover, module, raising=False)
        monkeypatch.setitem(sys.modules, f"takeover.{module}", None)
    name, _, loop = _choose("auto")
    assert (name, loop.__name__) == ("python", "takeover._loop_py")
    with pytest.raises(UsageError, match="the compiled modules cannot be imported"):
        _choose("cython")


def test_the_package_lists_what_it_offers_and_offers_what_it_lists() -> None:
    assert dir(takeover) == sorted(takeover.__all__)
    assert all(hasattr(takeover, name) for name in dir(takeover))
