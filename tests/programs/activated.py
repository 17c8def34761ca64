"""Becomes a command that a service manager starts: sockets from descriptor 3 on, and variables with its own pid.

Its arguments: {"descriptors", "names", "watchdog" in microseconds, "pid" for another one than its own}, the command.
"""

import fcntl
import json
import os
import sys

FIRST = 3

plan = json.loads(sys.argv[1])
pid = str(plan.get("pid", os.getpid()))
moved = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 100) for descriptor in plan["descriptors"]]
for index, descriptor in enumerate(moved):
    os.dup2(descriptor, FIRST + index)
    os.close(descriptor)
for descriptor in plan["descriptors"]:
    if descriptor >= FIRST + len(moved):
        os.close(descriptor)
if moved:
    os.environ.update(LISTEN_FDS=str(len(moved)), LISTEN_FDNAMES=":".join(plan["names"]), LISTEN_PID=pid)
if plan.get("watchdog"):
    os.environ.update(WATCHDOG_USEC=str(plan["watchdog"]), WATCHDOG_PID=pid)
os.execv(sys.argv[2], sys.argv[2:])
