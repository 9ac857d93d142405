"""What Megatron's distributed checkpoints hold, so that two of them can be compared."""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

OTHERWISE = ("moetion", "save")
"""Begins of the names of arguments in which the runs differ; all others are compared."""


def contents(folder: Path) -> dict[str, str]:
    """By name: a hash of every tensor's bytes and of every object's values.

    Args:
        folder: of one iteration.
    """
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    found = {}
    for index, info in metadata.storage_data.items():
        with (folder / info.relative_path).open("rb") as file:
            file.seek(info.offset)
            data = file.read(info.length)
        kept = torch.load(io.BytesIO(data), weights_only=False)
        found[f"{index.fqn} {index.offset}"] = _hash(kept)
    return found


def _hash(value: Any) -> str:
    return hashlib.blake2b(repr(_plain(value)).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """Nested tuples of what compares by value: equal ones may be pickled to other bytes."""
    if isinstance(value, io.BytesIO):
        return _plain(torch.load(io.BytesIO(value.getvalue()), weights_only=False))
    if isinstance(value, torch.Tensor):
        raw = value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        return str(value.dtype), tuple(value.shape), hashlib.blake2b(raw).hexdigest()
    if hasattr(value, "tobytes"):
        return str(value.dtype), hashlib.blake2b(value.tobytes()).hexdigest()
    if isinstance(value, Mapping):
        return tuple((str(k), _plain(v)) for k, v in sorted(value.items(), key=lambda i: str(i[0])))
    if isinstance(value, (list, tuple)):
        return tuple(map(_plain, value))
    if hasattr(value, "__dict__") and not callable(value):
        return _plain({k: v for k, v in vars(value).items() if not k.startswith(OTHERWISE)})
    return repr(value)
