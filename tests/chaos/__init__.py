"""A takeover with live clients, in which one process is killed, stopped or failed at each of its system calls.

`tracer` and `calls` know ptrace(2) and the kernel, and nothing of what runs. `scenes` knows how a takeover is played
and what must be true after it, and asks a `Stage` for the rest: any server will do that takes over from itself. `own`
is the stage of takeover, which tells more. `sweep` draws up the points and plays them; the command is `python -m chaos`
in the folder of the tests.
"""
