"""An echo server that never gets ready: its warming up lasts until it is interrupted."""

import json
import sys
import threading
from typing import Any

import takeover
from takeover import echo, server


def warm_up(member: takeover.Service, url: str) -> Any:
    member.listen_all(url)
    print("warming", flush=True)
    threading.Event().wait()


server.listen_for_streams = warm_up
try:
    echo.echo(**json.loads(sys.argv[1]))
except takeover.errors.TakeoverError as error:
    print(f"takeover: {error}", file=sys.stderr)
    sys.exit(error.exit_status)
