"""`python -m takeover.run OPTIONS`: what the command `takeover run` becomes; it may be started by its path as well."""

from __future__ import annotations

import os
import signal
import sys

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback, until the supervisor handles it

if not __package__:
    # Started by its path, it has its own folder on sys.path, where modules have names like those of other people's.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    import takeover  # noqa: F401 - found where this file is, whatever else is on the path

    del sys.path[0]

from takeover.run.launch import main

sys.exit(main())
