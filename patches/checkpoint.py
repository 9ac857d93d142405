"""What a command line would load, read without importing the host."""

from __future__ import annotations

from collections.abc import Sequence

from . import SUPPORTED_HOSTS, activation


def newest(args: Sequence[str]) -> int | None:
    """Iteration of the host's own checkpoint that a script with these arguments would go on from.

    None when it would not.
    """
    # The host's version is not known before its import; the newest folder's reading is taken.
    folder = SUPPORTED_HOSTS[max(SUPPORTED_HOSTS)]
    iteration: int | None = activation.part(folder, "checkpoint").newest(args)
    return iteration
