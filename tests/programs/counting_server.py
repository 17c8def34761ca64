"""A server whose handler is somebody else's compiled module (counting.pyx), built by the test."""

import json
import sys
from typing import Any

from wishes import prepare

import takeover


def main() -> None:
    """Its argument: {"folder" of the built module, "handler", "options" of serve(), what prepare() grants}."""
    wishes: dict[str, Any] = json.loads(sys.argv[1])
    prepare(wishes)
    sys.path.insert(0, wishes["folder"])
    import counting  # type: ignore[import-not-found]

    takeover.serve(getattr(counting, wishes["handler"]), **wishes["options"])
    print(f"not freed: {counting.not_freed()}", flush=True)


main()
