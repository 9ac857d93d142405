"""A worker that leaves with an exception tells its agent of it before."""

from __future__ import annotations

import traceback

from megatron_moetion.agent.link import AgentLink

LONGEST_TRACE = 400
"""Lines of a traceback; of a longer one, the last."""


def traceback_of(error: BaseException) -> list[str]:
    """Its lines, as the interpreter prints them."""
    return "".join(traceback.format_exception(error)).splitlines()


def tell(link: AgentLink, error: BaseException, echo: bool, rejected: bool = False) -> None:
    """It is shown once more if the job ends by it.

    Args:
        echo: it is what a lost peer looks like.
        rejected: see `recovery.failure.Rejected`.
    """
    lines = traceback_of(error)[-LONGEST_TRACE:]
    link.send({"op": "failed", "trace": lines, "echo": echo, "rejected": rejected})
