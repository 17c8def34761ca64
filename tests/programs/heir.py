"""A server on join() that hands blobs over and inherits them; what it does is told line by line on standard input.

A line is a JSON list, the name of one of the functions below and its arguments; the answer is one line of JSON.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import resource
import struct
import sys
import threading
from typing import Any

import takeover

MARK = struct.Struct("!Q")
SPACING = 1 << 20


class Member:
    """One process, and the views that it holds on to."""

    def __init__(self, service: takeover.Service) -> None:
        self.service = service
        self.views: list[memoryview] = []

    def ready(self) -> int:
        return self.service.ready().generation

    def hand_over(self, name: str, text: str) -> None:
        self.service.hand_over(name, text.encode())

    def hand_over_many(self, count: int) -> None:
        for number in range(count):
            self.service.hand_over(f"blob {number}", b"%d" % number)

    def hand_over_last(self, count: int) -> None:
        """As the last thing of all: it closes at once, and ends."""
        self.hand_over_many(count)
        self.service.close()

    def hand_over_marked(self, size: int) -> None:
        """Each SPACING bytes a number."""
        data = bytearray(size)
        for at in range(0, size, SPACING):
            MARK.pack_into(data, at, at)
        self.service.hand_over("marked", data)

    def inherited(self, name: str, timeout: float = 0.0) -> str | None:
        view = self.service.inherited(name, timeout)
        return None if view is None else bytes(view).decode()

    def inherited_many(self, count: int) -> int:
        """How many of those that hand_over_many() gives have come, unharmed."""
        found = (self.service.inherited(f"blob {number}", 10.0) for number in range(count))
        return sum(view is not None and bytes(view) == b"%d" % number for number, view in enumerate(found))

    def look(self, name: str) -> dict[str, Any] | None:
        """What a view is, which is kept."""
        view = self.service.inherited(name, 10.0)
        if view is None:
            return None
        self.views.append(view)
        refused = False
        try:
            view[0:1] = b"x"
        except TypeError:
            refused = True
        return {"size": len(view), "read-only": view.readonly and refused, "digest": hashlib.sha256(view).hexdigest()}

    def look_at_marked(self) -> dict[str, int]:
        """Reads all of a large one; tells how many marks were right, and how the memory of its own has grown."""
        before = anonymous()
        view = self.service.inherited("marked", 10.0)
        assert view is not None
        self.views.append(view)
        good = sum(MARK.unpack_from(view, at)[0] == at for at in range(0, len(view), SPACING))
        rest = not any(view[-SPACING + MARK.size :]) and not any(view[MARK.size : SPACING])
        return {"size": len(view), "good": good, "rest": rest, "grown": anonymous() - before}

    def inherited_while_closing(self) -> str:
        """A thread waits for a blob that never comes; the service is closed meanwhile."""
        found: list[object] = []
        asked = threading.Event()
        blobs = self.service._controller.blobs
        take = blobs.take

        def take_and_tell(name: str) -> Any:
            asked.set()
            return take(name)

        blobs.take = take_and_tell  # type: ignore[method-assign]
        waits = threading.Thread(target=lambda: found.append(self.service.inherited("never", 600.0)))
        waits.start()
        assert asked.wait(20)
        self.service.close()
        waits.join(20)
        return repr(found)

    def fork(self) -> list[str]:
        """What a child holds."""
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(writing, json.dumps(held()).encode())
            os._exit(0)
        os.close(writing)
        os.waitpid(child, 0)
        with open(reading) as file:
            return list(json.load(file))

    def held(self) -> list[str]:
        return held()

    def limit_descriptors(self) -> None:
        """No descriptor can be made any more."""
        lowest = os.dup(0)
        os.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))

    def unlimit_descriptors(self) -> None:
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

    def wait(self) -> bool:
        return self.service.wait(20)

    def state(self) -> str:
        return self.service.state

    def close(self) -> None:
        self.service.close()


def held() -> list[str]:
    """What this process holds open, of memfds."""
    found = []
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/self/fd/{entry}"))
    return [link for link in found if "memfd" in link]


def anonymous() -> int:
    """Bytes of memory that are this process's alone and no file's."""
    text = pathlib.Path("/proc/self/smaps_rollup").read_text()
    return int(text.split("Anonymous:")[1].split()[0]) * 1024


def main() -> None:
    """Its argument: join()'s arguments, and "listen"."""
    options: dict[str, Any] = json.loads(sys.argv[1])
    url = options.pop("listen")
    if "limits" in options:
        options["limits"] = takeover.Limits(**options["limits"])
    try:
        with takeover.join(**options) as service:
            service.listen(url)
            member = Member(service)
            print("joined", flush=True)
            for line in sys.stdin:
                order, *arguments = json.loads(line)
                try:
                    answer = getattr(member, order)(*arguments)
                except takeover.errors.TakeoverError as error:
                    answer = f"{type(error).__name__}: {error}"
                print(f"answer: {json.dumps(answer)}", flush=True)
    except takeover.errors.TakeoverError as error:
        print(f"failed: {type(error).__name__}: {error}", flush=True)
        sys.exit(error.exit_status)


main()
