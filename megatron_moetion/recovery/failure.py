"""Which errors mean that a peer is gone. Everything else stays an error of this worker.

A communication error alone is not enough: it counts only together with a failure notice of the
agent, otherwise it is raised again (rule: nothing unknown is swallowed).
"""

from __future__ import annotations

import torch.distributed as dist


class Interrupted(RuntimeError):
    """This worker gave its iteration up as a peer is gone. Raised at call boundaries only."""


class Superseded(RuntimeError):
    """Another failure happened while this one was being recovered from."""


class MissingFromInbox(RuntimeError):
    """Replay met an input that nobody logged. Never waited for: the replay would differ or hang."""


class ReplayDiverged(RuntimeError):
    """Replay produced other bits than training did."""


class Rejected(RuntimeError):
    """The host refuses a result that comes right out of state that was rebuilt from memory."""


# Texts of gloo and of torch's wrappers; NCCL and the store raise the dist.* types.
_GLOO = (
    "gloo/transport",
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Application timeout",
    "Process group has been aborted",
    "aborted",
    "Socket closed",
    "Read error",
    "Write error",
)


def is_communication_error(error: BaseException) -> bool:
    """Whether an exception can be the echo of a lost peer."""
    if isinstance(error, (Interrupted, dist.DistError)):
        return True
    return type(error) in (RuntimeError, ConnectionResetError) and any(
        t in str(error) for t in _GLOO
    )
