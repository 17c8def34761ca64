"""A server as `takeover run` is given one: it echoes on LISTEN_FDS, and does as its argument or a client tells it.

On SIGTERM it accepts no more, serves what is open to its end, and ends with 0. Its lines are written whole.
"""

import contextlib
import json
import os
import selectors
import signal
import socket
import sys
import time
from typing import Any


def say(line: str) -> None:
    os.write(1, f"{line}\n".encode())


def account(wishes: dict[str, Any]) -> bytes:
    """Who serves, and what it was given."""
    told = {name: value for name, value in os.environ.items() if name.startswith(("LISTEN_", "NOTIFY_"))}
    stat = open("/proc/self/stat").read().rpartition(")")[2].split()  # noqa: SIM115 - a program of a line or two
    return json.dumps(
        {
            "pid": os.getpid(),
            "version": wishes.get("version"),
            "words": sys.argv[2:],
            "environment": told,
            "descriptors": sorted(map(int, os.listdir("/proc/self/fd"))),
            "group": int(stat[2]),
            "terminal": [os.isatty(number) for number in range(3)],
            "folder": os.getcwd(),
        }
    ).encode()


def obey(words: list[str]) -> None:
    """What a client has said."""
    if words[0] == "exit":
        os._exit(int(words[1]))
    elif words[0] == "kill":
        os.kill(os.getpid(), int(words[1]))
    elif words[0] == "orphan":
        orphan(setsid=len(words) > 1)


def orphan(*, setsid: bool) -> None:
    """A grandchild whose parent has ended, and that nothing but SIGKILL ends."""
    child = os.fork()
    if child == 0:
        if setsid:
            os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if os.fork() == 0:
            say(f"orphan is {os.getpid()}")
            while True:
                signal.pause()
        os._exit(0)
    os.waitpid(child, 0)


def serve(wishes: dict[str, Any], socks: list[socket.socket]) -> None:
    selector = selectors.DefaultSelector()
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing)
    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda signum, _: stopping.append(signum))
    for signum in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH, signal.SIGTTIN, signal.SIGQUIT):
        signal.signal(signum, lambda signum, _: say(f"{os.getpid()} got {signal.Signals(signum).name}"))
    signal.signal(signal.SIGINT, lambda signum, _: say(f"{os.getpid()} got SIGINT"))
    if wishes.get("ignores"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    selector.register(reading, selectors.EVENT_READ, None)
    for sock in socks:
        sock.setblocking(False)
        selector.register(sock, selectors.EVENT_READ, True)
    say(f"serving {os.getpid()} {wishes.get('version')}")
    accepting = True
    while accepting or len(selector.get_map()) > 1:
        for key, _ in selector.select():
            with contextlib.suppress(BlockingIOError):
                if key.data is None:
                    os.read(reading, 100)
                elif key.data:
                    answer_one(key.fileobj, selector, wishes)  # type: ignore[arg-type]
                else:
                    talk(key.fileobj, selector, wishes)  # type: ignore[arg-type]
        if stopping and accepting:
            accepting = False
            for sock in socks:
                selector.unregister(sock)
                sock.close()
            time.sleep(wishes.get("drain", 0))
    say(f"ended {os.getpid()} {wishes.get('version')}")


def answer_one(sock: socket.socket, selector: selectors.BaseSelector, wishes: dict[str, Any]) -> None:
    if sock.type == socket.SOCK_DGRAM:
        _, address = sock.recvfrom(65536)
        sock.sendto(account(wishes), address)
    else:
        selector.register(sock.accept()[0], selectors.EVENT_READ, False)


def talk(sock: socket.socket, selector: selectors.BaseSelector, wishes: dict[str, Any]) -> None:
    try:
        data = sock.recv(65536)
        if data == b"who\n":
            sock.sendall(account(wishes) + b"\n")
        elif data.startswith(b"do "):
            sock.sendall(b"ok\n")
            obey(data.decode().split()[1:])
        elif data:
            sock.sendall(data)
    except ConnectionError:
        data = b""
    if not data:
        selector.unregister(sock)
        sock.close()


def main() -> None:
    """Its argument: JSON with what it is to do besides."""
    wishes: dict[str, Any] = json.loads(sys.argv[1])
    if "says" in wishes:
        say(wishes["says"])
    if "writes" in wishes:
        for _ in range(wishes["writes"]):
            os.write(1, b"x" * 65535 + b"\n")
    if "file" in wishes and os.path.exists(wishes["file"]):
        wishes.update(json.load(open(wishes["file"])))  # noqa: SIM115 - read once, by a program that ends soon
    if "waits_for" in wishes:
        while not os.path.exists(wishes["waits_for"]):
            time.sleep(0.01)
    if "exit" in wishes:
        sys.exit(wishes["exit"])
    if wishes.get("away"):
        if os.fork():
            os._exit(0)
        os.setsid()
    socks = [socket.socket(fileno=3 + number) for number in range(int(os.environ.get("LISTEN_FDS", "0")))]
    for _ in range(wishes.get("children", 0)):
        if os.fork() == 0:
            signal.alarm(100)  # what a failed test leaves behind does not stay for long
            break
    serve(wishes, socks)


main()
