"""How long `import takeover` takes beside the standard modules that it needs, each in a fresh interpreter.

It imports its rooms at their first use, so there is a row for everything that a server needs too.
"""

from __future__ import annotations

import subprocess

from .plan import Plan
from .processes import PYTHON, SERVER_CPU, environment, start

STANDARD = "import socket, json, threading, logging"
OURS = "import takeover"
ALL_OF_IT = "from takeover import serve"
_CODE = "import time; t = time.perf_counter(); {}; print(time.perf_counter() - t)"


def importing(plan: Plan) -> None:
    """Interleaved; four times the usual rounds, since one run takes milliseconds."""
    for index in range(4 * plan.rounds + 1):
        for statement in (STANDARD, OURS, ALL_OF_IT):
            command = [PYTHON, "-c", _CODE.format(statement)]
            process = start(command, SERVER_CPU, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            out, complaint = process.communicate(timeout=60)
            if process.returncode:
                plan.document.skip("import", statement, complaint.strip().splitlines()[-1])
                return
            if index:
                plan.document.row("import", "fresh interpreter", statement, STANDARD).add(ms=float(out) * 1e3)
