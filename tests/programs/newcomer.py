"""A new version of a server, good or bad: `newcomer.py HOW` does with its descriptors from 3 on what HOW says.

It writes a line when it has done so.
"""

import asyncio
import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time

COUNT = int(os.environ.get("LISTEN_FDS", "1"))
LISTENERS = [socket.socket(fileno=3 + number) for number in range(COUNT)]
KEPT: list[socket.socket] = []


def notify(text: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.connect("\0" + os.environ["NOTIFY_SOCKET"][1:])
        sock.send(text.encode())


def take(listener: socket.socket) -> None:
    try:
        KEPT.append(listener.accept()[0])
    except BlockingIOError:
        return
    del KEPT[:-20]


def block_in_accept() -> None:
    for listener in LISTENERS:
        listener.setblocking(True)
        threading.Thread(target=lambda listener=listener: [take(listener) for _ in iter(int, 1)]).start()


def wait_in_epoll() -> None:
    epoll = select.epoll()
    for listener in LISTENERS:
        epoll.register(listener, select.EPOLLIN)
    while True:
        for descriptor, _ in epoll.poll():
            take(next(each for each in LISTENERS if each.fileno() == descriptor))


def close_at_once() -> None:
    while True:
        select.select(LISTENERS, [], [])
        for listener in LISTENERS:
            take(listener)
        while KEPT:
            with KEPT.pop() as sock, contextlib.suppress(OSError):
                sock.send(b"Thursday")


def wait_in_nested_epoll() -> None:
    inner, outer = select.epoll(), select.epoll()
    inner.register(LISTENERS[0], select.EPOLLIN)
    outer.register(inner.fileno(), select.EPOLLIN)
    while True:
        outer.poll()
        take(LISTENERS[0])


def wait_in_poll_for_an_epoll_set() -> None:
    epoll, poll = select.epoll(), select.poll()
    epoll.register(LISTENERS[0], select.EPOLLIN)
    poll.register(epoll.fileno(), select.POLLIN)
    while True:
        poll.poll()
        take(LISTENERS[0])


def wait_and_leave_all_to_others() -> None:
    epoll = select.epoll()
    epoll.register(LISTENERS[0], select.EPOLLIN | select.EPOLLET)
    while True:
        epoll.poll()


def say_ready_to_each_client() -> None:
    while True:
        select.select(LISTENERS, [], [])
        take(LISTENERS[0])
        notify(f"READY=1\nSTATUS={len(KEPT)} clients")


def wait_in_poll() -> None:
    poll = select.poll()
    for listener in LISTENERS:
        poll.register(listener, select.POLLIN)
    while True:
        for descriptor, _ in poll.poll():
            take(next(each for each in LISTENERS if each.fileno() == descriptor))


def wait_in_select() -> None:
    while True:
        for listener in select.select(LISTENERS, [], [])[0]:
            take(listener)


def run_asyncio() -> None:
    async def main() -> None:
        kept: list[object] = []  # a StreamWriter that nobody has closes its connection

        def keep(*streams: object) -> None:
            kept.append(streams)
            del kept[:-20]

        servers = [await asyncio.start_server(keep, sock=listener) for listener in LISTENERS]
        await servers[0].serve_forever()

    asyncio.run(main())


def spin_without_waiting() -> None:
    """As a server on io_uring looks from outside: it accepts, and never waits in a call that tells for what."""
    while True:
        for listener in LISTENERS:
            listener.setblocking(False)
            take(listener)
        time.sleep(0.01)


def accept_in_a_child() -> None:
    if not os.fork():
        wait_in_epoll()
    os.wait()


def receive_datagrams() -> None:
    LISTENERS[0].setblocking(True)
    while True:
        LISTENERS[0].recv(100)


def take_only_the_first() -> None:
    while True:
        select.select(LISTENERS[:1], [], [])
        take(LISTENERS[0])


def register_and_hang() -> None:
    epoll = select.epoll()
    epoll.register(LISTENERS[0], select.EPOLLIN)
    hang()


def hang() -> None:
    while True:
        signal.pause()


def close_them_and_hang() -> None:
    for listener in LISTENERS:
        listener.close()
    hang()


def listen_on_its_own_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as own:
        print("serves on port", own.getsockname()[1], flush=True)
        while True:
            KEPT.append(own.accept()[0])


def fork_away() -> None:
    if os.fork():
        os._exit(0)
    os.setsid()
    print("went away as", os.getpid(), flush=True)
    hang()


def crash() -> None:
    raise SystemExit("ImportError: no module named app")


def say_ready_and_hang() -> None:
    notify("STATUS=warming up\nREADY=1")
    hang()


def say_ready_in_a_child() -> None:
    if not os.fork():
        notify("READY=1")
        hang()
    os.wait()


def say_ready_and_die() -> None:
    notify("READY=1")
    os._exit(3)


def accept_once_and_die() -> None:
    select.select(LISTENERS, [], [])
    take(LISTENERS[0])
    os._exit(4)


def start_slowly() -> None:
    time.sleep(60)
    wait_in_epoll()


def stop_itself() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def ask_without_a_newline() -> None:
    print("ready? ", end="", flush=True)
    hang()


def say_only_a_status() -> None:
    notify("STATUS=loading 7 of 9 models")
    hang()


def serve_http(status: str = "200", body: str = "fine") -> None:
    """Answers each request with a status, "hang" with none at all; "close" closes."""
    for listener in LISTENERS:
        listener.setblocking(True)
        threading.Thread(
            target=lambda listener=listener: [answer(listener, status, body) for _ in iter(int, 1)]
        ).start()


def answer(listener: socket.socket, status: str, body: str) -> None:
    sock = listener.accept()[0]
    request = sock.recv(4096)
    if request and status.isdigit():
        sock.send(f"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 {status} Anything\r\n\r\n{body}".encode())
    elif status == "tls":
        sock.send(b"\x15\x03\x01\x00\x02\x02\x0a")
    elif status == "noise":
        sock.send(b"220 mail.example.org ESMTP\r\n")
    if status == "hang":
        KEPT.append(sock)
    else:
        sock.close()


def write_lines() -> None:
    print("INFO  loading", flush=True)
    sys.stdout.write("\x1b[32mINFO\x1b[0m  Run")
    sys.stdout.flush()
    time.sleep(0.05)
    print("ning on http://127.0.0.1:8000", flush=True)
    hang()


def write_much(megabytes: str) -> None:
    block = bytes(range(256)) * 4096
    for _ in range(int(megabytes)):
        sys.stdout.buffer.write(block)
    sys.stdout.buffer.flush()


def describe_terminal() -> None:
    """Says whether its outputs are terminals, and their size; again for each SIGWINCH."""

    def describe(*_: object) -> None:
        size = tuple(os.get_terminal_size(1)) if os.isatty(1) else ()
        os.write(1, f"terminal {os.isatty(1)} {os.isatty(2)} {size}\n".encode())

    signal.signal(signal.SIGWINCH, describe)
    describe()
    hang()


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
