"""The control socket's place in the file system: its path, its lock, its permissions, and who is at the other end.

Beside the socket PATH lies PATH.lock, flock'ed by the owner for as long as it lives and handed on with every takeover,
so that the lock is never free while anybody owns the service, and always free after a SIGKILL. Whoever gets the lock
may take a socket file that nobody listens on for stale; nobody else removes anything. The lock file itself is removed
only by its holder, and whoever locks it checks that the path still leads to the file that was locked.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import struct
from collections.abc import Collection, Iterator
from typing import NamedTuple

from .errors import ControlPathError, NotRunning, UsageError
from .namespaces import in_words, mapping_hint, unmapped_uid

LONGEST_PATH = 107
"""Bytes: sun_path of unix(7) has 108 with the terminating zero."""

SO_PEERPIDFD = 77
"""include/uapi/asm-generic/socket.h, since Linux 6.5."""

O_PATH = getattr(os, "O_PATH", os.O_RDONLY)
"""Linux's: a folder is held without the right to list it."""

Identity = tuple[int, int]
"""Device and inode of a path: which file it is, whatever it is called."""


class Peer(NamedTuple):
    """The process at the other end; `pid` is 0 where it lives in another pid namespace, `pidfd` None where unknown."""

    pid: int
    uid: int
    pidfd: int | None

    def __str__(self) -> str:
        return in_words(self.pid)


def peer_of(sock: socket.socket) -> Peer:
    """Asks the kernel who is at the other end of a connected UNIX socket; the caller owns the pidfd."""
    pid, uid, _ = struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    pidfd: int | None = None
    try:
        pidfd = sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
    except OSError:
        with contextlib.suppress(OSError, AttributeError):
            pidfd = os.pidfd_open(pid) if pid else None
    return Peer(pid, uid, pidfd)


def identity(path: str, folder: int | None = None) -> Identity | None:
    """Which file the path leads to, from an open folder or none, without following a link; None where there is none."""
    try:
        status = os.stat(path, dir_fd=folder, follow_symlinks=False)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def remove_own(path: str, own: Identity | None) -> None:
    """Unlinks the path if it still leads to the file that is our own."""
    if own is not None and identity(path) == own:
        with contextlib.suppress(OSError):
            os.unlink(path)


class ControlPath:
    """The path of a control socket, checked once; raises UsageError or ControlPathError where it is not fit for use.

    `kind` is the type of its sockets, SOCK_STREAM or SOCK_SEQPACKET. `allowed` are the uids whose processes may be at
    the other end, as this user namespace shows them: never the one that stands for all uids without a mapping here.
    """

    def __init__(self, path: str, allow_uids: Collection[int] = (), kind: int = socket.SOCK_STREAM) -> None:
        self.allowed = frozenset({os.geteuid(), 0, *allow_uids}) - {unmapped_uid()}
        self.kind = kind
        self._allow_uids = allow_uids
        self._mode = 0o666 if allow_uids else 0o600
        if not path or "\0" in path:
            raise UsageError(f"control path {path!r}: give the path of a file; abstract sockets have no permissions")
        if len(os.fsencode(path)) > LONGEST_PATH:
            raise UsageError(
                f"control path {path}: {len(os.fsencode(path))} bytes, a UNIX socket's has at most {LONGEST_PATH}; "
                "choose a shorter one"
            )
        try:
            absolute = os.path.abspath(path)
        except OSError as error:
            raise ControlPathError(f"control path {path}: the working folder is gone ({error.strerror})") from None
        self.path = absolute if len(os.fsencode(absolute)) <= LONGEST_PATH else path
        self.lock_path = self.path + ".lock"
        self._folder_path, self._name = os.path.split(absolute)
        with self._folder():
            pass

    def beside(self, suffix: str, kind: int) -> ControlPath:
        """The path of another socket of the same service, under the same rules; raises UsageError for a long one."""
        return ControlPath(self.path + suffix, self._allow_uids, kind)

    @contextlib.contextmanager
    def _folder(self) -> Iterator[int]:
        """The folder as it is now, for calls that are relative to it, if nobody else can replace what is in there."""
        folder = self._folder_path
        try:
            descriptor = os.open(folder, O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except NotADirectoryError:
            raise ControlPathError(f"control path {self.path}: {folder} is not a folder") from None
        except OSError as error:
            hint = "; make the folder first" if error.errno == errno.ENOENT else ""
            raise ControlPathError(f"control path {self.path}: open {folder}: {error.strerror}{hint}") from None
        try:
            status = os.fstat(descriptor)
            if status.st_uid not in self.allowed:
                raise ControlPathError(
                    f"control path {self.path}: the folder {folder} belongs to uid {status.st_uid}, who could replace "
                    f"the socket; choose a folder of uid {os.geteuid()} or of root{mapping_hint(status.st_uid)}"
                )
            if status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX:
                raise ControlPathError(
                    f"control path {self.path}: everybody may write to {folder}; choose another folder, or chmod o-w it"
                )
            yield descriptor
        finally:
            os.close(descriptor)

    def lock(self, *, create: bool = True) -> int | None:
        """The descriptor of the locked lock file, which the caller owns; None while somebody else holds it.

        Without `create`, a lock file that does not exist raises NotRunning, and nothing is written.
        """
        while True:
            descriptor = self._open_lock(create)
            try:
                self._check_lock_file(descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                status = os.fstat(descriptor)
                if identity(self.lock_path) == (status.st_dev, status.st_ino):
                    return descriptor
            except BlockingIOError:
                os.close(descriptor)
                return None
            except OSError as error:
                os.close(descriptor)
                raise ControlPathError(f"flock {self.lock_path}: {error.strerror}") from None
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)

    def _open_lock(self, create: bool) -> int:
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | (os.O_CREAT if create else 0)
        with self._folder() as folder:
            try:
                return os.open(f"{self._name}.lock", flags, self._mode, dir_fd=folder)
            except OSError as error:
                if error.errno == errno.ENOENT and not create:
                    raise NotRunning(f"nothing is running at {self.path}") from None
                hint = "it is a symbolic link; remove it" if error.errno == errno.ELOOP else error.strerror
                raise ControlPathError(f"open {self.lock_path}: {hint}") from None

    def _check_lock_file(self, descriptor: int) -> None:
        """Whoever may open it can hold the lock and so keep the service down: so none of a stranger's."""
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ControlPathError(f"{self.lock_path} is not a regular file; remove it")
        if status.st_uid not in self.allowed:
            raise ControlPathError(
                f"{self.lock_path} belongs to uid {status.st_uid}, who could hold the lock; "
                f"remove it{mapping_hint(status.st_uid)}"
            )
        if status.st_uid == os.geteuid() and status.st_nlink == 1 and stat.S_IMODE(status.st_mode) != self._mode:
            os.fchmod(descriptor, self._mode)

    def is_locked(self) -> bool:
        """Whether somebody holds the lock, that is owns the service; leaves no trace."""
        try:
            descriptor = self.lock(create=False)
        except NotRunning:
            return False
        if descriptor is not None:
            os.close(descriptor)
        return descriptor is None

    def unlock(self, descriptor: int) -> None:
        """Removes the lock file if the path still leads to it, and closes the descriptor."""
        status = os.fstat(descriptor)
        remove_own(self.lock_path, (status.st_dev, status.st_ino))
        os.close(descriptor)

    def _new_socket(self) -> socket.socket:
        try:
            return socket.socket(socket.AF_UNIX, self.kind)
        except OSError as error:
            raise ControlPathError(f"a socket for {self.path}: {error.strerror}") from None

    def connect(self) -> socket.socket | None:
        """A connection to whoever listens at the path; None if nobody does: no file there, or a stale socket.

        Raises ControlPathError for what is not a socket, or may not be connected to.
        """
        try:
            status = os.lstat(self.path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ControlPathError(f"lstat {self.path}: {error.strerror}") from None
        if not stat.S_ISSOCK(status.st_mode):
            kind = "a symbolic link" if stat.S_ISLNK(status.st_mode) else "not a socket"
            raise ControlPathError(
                f"control path {self.path}: there is {kind} in the way; remove it, or choose another path"
            )
        sock = self._new_socket()
        try:
            sock.setblocking(False)
            sock.connect(self.path)
            return sock
        except (ConnectionRefusedError, FileNotFoundError):
            sock.close()
            return None
        except OSError as error:
            sock.close()
            hint = error.strerror
            if isinstance(error, PermissionError):
                hint = f"it belongs to uid {status.st_uid}"
            elif isinstance(error, BlockingIOError):
                hint = "its queue is full; is the process behind it stopped?"
            raise ControlPathError(f"connect {self.path}: {hint}") from None

    def _open_to_others(self) -> None:
        """Undoes what the umask took from the socket's mode; never that of a link or a file put in its place."""
        descriptor = os.open(self.path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            mode = os.fstat(descriptor).st_mode
            if not stat.S_ISSOCK(mode):
                raise ControlPathError(f"bind {self.path}: somebody has replaced the socket")
            if stat.S_IMODE(mode) != self._mode:
                os.chmod(f"/proc/self/fd/{descriptor}", self._mode)
        finally:
            os.close(descriptor)

    def bind(self, *, listen: bool = True) -> tuple[socket.socket, Identity]:
        """Binds the path and listens there; only for the holder of the lock, when connect() returned None.

        The file never has more than its final permissions: on Linux it takes them, less the umask, from its socket.
        """
        sock = self._new_socket()
        try:
            with self._folder() as folder:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self._name, dir_fd=folder)
                os.fchmod(sock.fileno(), self._mode)
                sock.bind(self.path)
                self._open_to_others()
                bound = identity(self.path)
                if bound is None or bound != identity(self._name, folder):
                    raise ControlPathError(f"bind {self.path}: somebody has replaced the socket or its folder")
            sock.setblocking(False)
            if listen:
                sock.listen(4096)
            return sock, bound
        except ControlPathError:
            sock.close()
            raise
        except OSError as error:
            sock.close()
            raise ControlPathError(f"bind {self.path}: {error.strerror}") from None
