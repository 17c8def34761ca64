"""The command: `python -m fuzz --hours N [TARGET…]`, in tests/. Its exit status is 1 if anything failed.

Each target has its share of the time, in a process of its own under libFuzzer (atheris), one after the other on one
core. An input that raises, lasts longer than ten seconds, leaves a descriptor, or takes the process above 1 GiB is a
failure, and is kept in the folder that the report names. New inputs are kept there too, not in the corpus.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import re
import resource
import subprocess
import sys
import tempfile

from fuzz.targets import TARGETS

CORPUS = pathlib.Path(__file__).parent / "corpus"
SLOWEST = 10
"""Seconds for one input."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"{', '.join(TARGETS)}; all of them if none")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--hours", type=float, help="of the whole run")
    length.add_argument("--seconds", type=float, default=60.0, help="of the whole run (default 60)")
    options = parser.parse_args()
    wanted = options.targets or list(TARGETS)
    unknown = set(wanted) - set(TARGETS)
    if unknown:
        parser.error(f"no such target: {', '.join(sorted(unknown))}")
    seconds = max(1, int((options.hours * 3600 if options.hours else options.seconds) / len(wanted)))
    found = pathlib.Path(tempfile.mkdtemp(prefix="takeover-fuzz-"))
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    failed = [name for name in wanted if not _fuzz(name, seconds, found / name)]
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"{spent.ru_utime + spent.ru_stime:,.0f} CPU-seconds; failed: {len(failed)} {' '.join(failed)}")
    print(f"what was found is in {found}")
    return 1 if failed else 0


def _fuzz(name: str, seconds: int, found: pathlib.Path) -> bool:
    """Prints the line of the report; whether the target stood it."""
    found.mkdir()
    corpus = CORPUS / name
    command = [sys.executable, "-m", "fuzz.one", name, f"-max_total_time={seconds}", f"-timeout={SLOWEST}"]
    command += ["-rss_limit_mb=1024", "-print_final_stats=1", f"-artifact_prefix={found}/failed-", str(found)]
    done = subprocess.run([*command, str(corpus)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    text = done.stdout.decode(errors="replace")
    figures = dict(re.findall(r"stat::(\w+): +(\d+)", text))
    covered = re.findall(r"cov: (\d+)", text)[-1:] or ["0"]
    executed = int(figures.get("number_of_executed_units", 0))
    print(
        f"{name:10} {executed:12,} executions {int(figures.get('average_exec_per_sec', 0)):8,} a second  "
        f"coverage {covered[0]:>6} points  peak {figures.get('peak_rss_mb', '?')} MiB  "
        f"{'ok' if not done.returncode and executed else 'FAILED'}",
        flush=True,
    )
    if done.returncode or not executed:
        print(text[-4000:])
    return not done.returncode and executed > 0


if __name__ == "__main__":
    sys.exit(main())
