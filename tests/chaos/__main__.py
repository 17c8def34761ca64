"""The command: `python -m chaos`, in the folder of the tests. Its exit status is 1 if anything failed."""

from __future__ import annotations

import argparse
import json
import pathlib
import random
import sys
import time

from .scenes import STAGES
from .stage import Stage
from .sweep import ACTIONS, BACKENDS, KINDS, PROMISED, Case, Result, cases, report, run_all, sample


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m chaos", description=__doc__)
    parser.add_argument("--backend", action="append", choices=BACKENDS, help="one backend; both without it")
    parser.add_argument("--kind", action="append", choices=KINDS, help="listeners only, or live connections")
    parser.add_argument(
        "--action",
        action="append",
        choices=(*ACTIONS, "strange"),
        help="all of them without it, but for strange: errors that no kernel gives the call",
    )
    parser.add_argument("--sample", type=int, metavar="N", help="so many points instead of all")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32), help="which points the sample has")
    parser.add_argument("--only", action="append", metavar="POINT", help="play one point, as the report names it")
    parser.add_argument("--parallel", type=int, default=4, metavar="N", help="how many at a time (default 4)")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="where to write the report as JSON")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no play after so long")
    parser.add_argument(
        "--command",
        metavar="WORDS",
        help="another server in place of takeover's: an echo server on {host} and {port} that takes over when it is "
        "started again, whose processes meet in {folder}; chaos/stage.py tells what else is asked of it",
    )
    options = parser.parse_args()
    if options.command:
        STAGES["command"] = lambda kind: Stage(options.command)
        options.backend, options.kind = ["command"], ["listeners"]
    if options.only:
        todo = [Case.parse(text) for text in options.only]
    else:
        todo = list(cases(options.backend or BACKENDS, options.kind or KINDS, options.action or ACTIONS))
        if options.sample is not None:
            print(f"seed {options.seed}")
            todo = sample(todo, options.sample, options.seed)
    print(f"{len(todo)} points", flush=True)
    began = time.monotonic()
    results: list[Result] = []
    for result in run_all(todo, options.parallel):
        results.append(result)
        if result.failure:
            print(f"FAILED {result.case}: {result.failure}\n", flush=True)
        elif result.seconds > PROMISED:
            print(f"{result.case} took {result.seconds:.2f} s", flush=True)
        if len(results) % 100 == 0:
            print(f"{len(results)} of {len(todo)} in {time.monotonic() - began:.0f} s", flush=True)
        if time.monotonic() - began > options.seconds:
            break
    rows = report(results)
    for name, row in rows.items():
        print(f"{name:24}", ", ".join(f"{what} {value}" for what, value in row.items()))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    sys.exit(any(result.failure for result in results))


main()
