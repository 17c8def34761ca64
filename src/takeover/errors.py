"""All exceptions of takeover, a sentence each; `exit_status` is what the command line ends with.

Two branches: `LocalError` is for what this process or its user did or was denied, `PeerError` for what the process
at the other end of the control socket did.
"""

from __future__ import annotations


class TakeoverError(Exception):
    """Anything that takeover reports on purpose; the message is one line that a person can act on."""

    exit_status = 1


class LocalError(TakeoverError):
    """This process, its caller, or the machine it runs on stands in the way."""


class UsageError(LocalError):
    """A call, an address or an option that can never work as it was written."""

    exit_status = 2


class AddressError(UsageError):
    """A listener address that cannot be parsed, or that was given twice."""


class ListenError(LocalError):
    """The kernel refused to bind or listen on an address."""


class CommandError(LocalError):
    """The command of `takeover run` is not there, cannot be executed, ended, or did not get ready."""


class ControlPathError(LocalError):
    """The control socket, its lock file or their folder is not fit for use."""


class LocalProtocolError(LocalError):
    """A step that the state of the exchange does not allow was asked for by this process."""


class Interrupted(LocalError):
    """This process was told to stop before the takeover was committed."""


class PeerError(TakeoverError):
    """The process at the other end is missing, refused, failed or broke the protocol."""


class NotRunning(PeerError):
    """Nothing is running at the control path."""

    exit_status = 3


class Refused(PeerError):
    """The incumbent refused the request and told why; `code` is one of wire.REFUSALS."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


class Aborted(PeerError):
    """The takeover was called off, or taken back by the incumbent, which serves on."""


class PeerLost(PeerError):
    """The process at the other end died or closed the control connection in the middle of the exchange."""


class TimedOut(PeerError):
    """The process at the other end did not answer within its limit."""

    exit_status = 4


class RemoteProtocolError(PeerError):
    """The process at the other end sent something that the protocol does not allow."""


class DescriptorsLost(RemoteProtocolError):
    """The kernel dropped some descriptors of a message (MSG_CTRUNC); those that had arrived were closed."""
