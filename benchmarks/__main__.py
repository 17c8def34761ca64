"""The command: `python -m benchmarks [CASE...]`, `python -m benchmarks soak`, `python -m benchmarks broken`,
`python -m benchmarks report FILE`."""

from __future__ import annotations

import argparse
import importlib.util
import pathlib
import shlex
import sys
from collections.abc import Callable, Sequence

from rich.console import Console

from . import (
    broken,
    build,
    deploys,
    echo,
    hostile,
    importing,
    memory,
    moves,
    passing,
    plots,
    report,
    restarts,
    results,
    soak,
)
from .plan import Plan
from .processes import LOAD_CPU, SERVER_CPU, raise_descriptor_limit

CASES: dict[str, Callable[[Plan], None]] = {
    "echo": echo.echo,
    "stream": echo.stream,
    "accept": echo.accept,
    "memory": memory.memory,
    "passing": passing.passing,
    "import": importing.importing,
    "restarts": restarts.restarts,
    "moves": moves.moves,
    "deploys": deploys.deploys,
    "hostile": hostile.hostile,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=f"Cases: {', '.join(CASES)} (all of them if none is named); broken; report FILE; soak --help.",
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help="a case, `broken`, or `report` and a file")
    parser.add_argument("--quick", action="store_true", help="few cells, three rounds of 0.3 s: proves that it works")
    parser.add_argument("--rounds", type=int, help="interleaved rounds of each cell (default 7; quick 3)")
    parser.add_argument("--seconds", type=float, help="of one run of one server (default 0.7; quick 0.3)")
    parser.add_argument("--only", action="append", default=[], metavar="WORD", help="only subjects whose name holds it")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the document")
    parser.add_argument("--plots", type=pathlib.Path, metavar="DIR", help="draw the plots (matplotlib)")
    parser.add_argument("--deploys", type=int, default=100, help="broken: how many of each kind (default 100)")
    return parser


def _measure(options: argparse.Namespace, console: Console) -> results.Document:
    document = results.Document(machine=results.machine(), command=f"python -m benchmarks {shlex.join(sys.argv[1:])}")
    rounds = options.rounds or (3 if options.quick else 7)
    seconds = options.seconds or (0.3 if options.quick else 0.7)
    raise_descriptor_limit()
    build.compiler()
    with console.status("starting", refresh_per_second=1) as status:
        plan = Plan(document, options.quick, rounds, seconds, 0.1, tuple(options.only), status.update)
        for case in options.cases or CASES:
            try:
                if case == "broken":
                    broken.broken(plan, options.deploys)
                else:
                    CASES[case](plan)
            except (OSError, RuntimeError) as error:
                document.skip(case, "the rest of it", f"failed: {error}")
            if options.json:
                document.save(options.json)
    return document


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0, 1 if there is no compiler, 2 for wrong usage; soak.main() has its own."""
    words = sys.argv[1:] if arguments is None else arguments
    if words[:1] == ["soak"]:
        return soak.main(words[1:])
    parser = _parser()
    options = parser.parse_intermixed_args(arguments)
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    if options.plots and not importlib.util.find_spec("matplotlib"):
        parser.error("--plots needs matplotlib, which is not installed")
    if options.cases[:1] == ["report"]:
        if len(options.cases) != 2:
            parser.error("report takes one FILE")
        try:
            document = results.load(pathlib.Path(options.cases[1]))
        except (OSError, ValueError) as error:
            parser.error(str(error))
    else:
        unknown = set(options.cases) - set(CASES) - {"broken"}
        if unknown:
            parser.error(
                f"no such case: {', '.join(sorted(unknown))}; there are {', '.join(CASES)}, soak, broken and report"
            )
        if SERVER_CPU == LOAD_CPU:
            console.print("one CPU only: server and load share it, so only the CPU figures mean something")
        try:
            document = _measure(options, console)
        except build.NoCompiler as error:
            print(error, file=sys.stderr)
            return 1
    report.show(document, console)
    if options.plots:
        for path in plots.draw(document, options.plots):
            console.print(f"wrote {path}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
