"""Megatron's own checkpoints: which one a command line would load; nothing of it is imported."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

TRACKER = "latest_checkpointed_iteration.txt"
"""megatron.training.checkpointing:get_checkpoint_tracker_filename"""


def newest(args: Sequence[str]) -> int | None:
    """Iteration that `--load` would go on from; None when it would start from 0."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--load", type=Path)
    parser.add_argument("--ckpt-step", type=int)
    parser.add_argument("--finetune", action="store_true")
    known, _ = parser.parse_known_args(list(args))
    if known.load is None or known.finetune:
        return None
    # 0 is as good as none to Megatron.
    if known.ckpt_step:
        return int(known.ckpt_step)
    try:
        text = (known.load / TRACKER).read_text().strip()
    except OSError:
        return None
    # "release" is what Megatron reads as a start from 0.
    return int(text) if text.isdecimal() else None
