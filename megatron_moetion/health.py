"""Whether a device does what it is told: a replacement is not to begin on what its predecessor
died of.
"""

from __future__ import annotations

import threading
from datetime import timedelta

import torch

NUM_WORDS = 1 << 16
PART_OF_TIMEOUT = 20
"""A device may take this part of --moetion-timeout to answer."""


def probe(device: torch.device, timeout: timedelta) -> str | None:
    """Allocate, write, compute and read back, on any kind of device.

    Args:
        device: whose.
        timeout: the job's.

    Returns:
        What is wrong, in a line that names the device, or None.
    """
    limit = timeout / PART_OF_TIMEOUT
    found: list[str | None] = []
    # A device that is broken may answer nothing at all, and such a call cannot be ended.
    trial = threading.Thread(target=lambda: found.append(_try(device)), daemon=True)
    trial.start()
    trial.join(limit.total_seconds())
    if not found:
        return f"device {device} did not answer within {limit.total_seconds():g} s"
    return None if found[0] is None else f"device {device} is broken: {found[0]}"


def _try(device: torch.device) -> str | None:
    try:
        words = torch.arange(NUM_WORDS, dtype=torch.int64)
        read = (words.to(device) * 3 + 1).cpu()
    # Whatever a broken device makes torch raise is what is reported of it.
    except Exception as error:
        return str(error).partition("\n")[0] or type(error).__name__
    wrong = int((read != words * 3 + 1).sum())
    return f"{wrong} of {NUM_WORDS} results are wrong" if wrong else None
