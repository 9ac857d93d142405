"""Small state as bytes: a JSON skeleton plus the raw bytes of its tensors.

Used for everything that is not a frame: RNG states, schedulers, counters, batches, results. Nothing
is pickled: what cannot be written is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

_ALIGN = 64


class Unsupported(TypeError):
    """A value that cannot be written without pickling."""


class _Packer:
    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []
        self.nbytes = 0

    def skeleton(self, value: Any, path: str) -> Any:
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if isinstance(value, np.ndarray):
            if value.dtype.kind not in "biufc":
                raise Unsupported(f"{path or 'value'} is an array of {value.dtype} values")
            return {"n": self._tensor(torch.from_numpy(value.copy()))}
        if isinstance(value, np.generic):
            return self.skeleton(value.item(), path)
        if isinstance(value, list):
            return {"l": [self.skeleton(v, f"{path}[{i}]") for i, v in enumerate(value)]}
        if isinstance(value, tuple):
            return {"t": [self.skeleton(v, f"{path}[{i}]") for i, v in enumerate(value)]}
        if isinstance(value, dict):
            pairs = [
                (self.skeleton(k, path), self.skeleton(v, f"{path}.{k}")) for k, v in value.items()
            ]
            return {"d": pairs}
        raise Unsupported(f"{path or 'value'} is a {type(value).__name__}, which cannot be logged")

    def _tensor(self, value: torch.Tensor) -> dict[str, Any]:
        offset = self.nbytes
        self.tensors.append(value.detach())
        self.nbytes = -(-(offset + value.nbytes) // _ALIGN) * _ALIGN
        return {
            "x": [str(value.dtype).removeprefix("torch."), list(value.shape), offset],
            "g": value.requires_grad,
            "c": value.device.type != "cpu",
        }


def pack(value: Any) -> tuple[dict[str, Any], torch.Tensor]:
    """Turns nested containers of tensors, arrays and scalars into JSON and one byte tensor.

    Returns:
        (meta, data): `data` is a uint8 CPU tensor that shares no memory with `value`; the caller
        may overwrite the source once this returns.

    Raises:
        Unsupported: naming the path of a value that is no container, tensor or scalar.
    """
    packer = _Packer()
    skeleton = packer.skeleton(value, "")
    data = torch.zeros(packer.nbytes, dtype=torch.uint8)
    offset = 0
    for tensor in packer.tensors:
        raw = tensor.cpu().contiguous().reshape(-1).view(torch.uint8)
        data[offset : offset + raw.numel()].copy_(raw)
        offset = -(-(offset + raw.numel()) // _ALIGN) * _ALIGN
    return {"bundle": skeleton}, data


def unpack(meta: Mapping[str, Any], data: torch.Tensor, device: torch.device | str = "cpu") -> Any:
    """The inverse of `pack`.

    Tensors that were on an accelerator come back on `device`, all others on the CPU.

    The tensors returned are fresh copies.
    """

    def tensor(node: dict[str, Any]) -> torch.Tensor:
        name, shape, offset = node["x"]
        dtype = getattr(torch, name)
        count = int(np.prod(shape)) if shape else 1
        raw = data[offset : offset + count * dtype.itemsize].clone()
        value = raw.view(dtype).reshape(shape).to(device if node["c"] else "cpu")
        return value.requires_grad_(node["g"]) if node["g"] else value

    def build(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        if "x" in node:
            return tensor(node)
        if "n" in node:
            return tensor(node["n"]).numpy()
        if "l" in node:
            return [build(v) for v in node["l"]]
        if "t" in node:
            return tuple(build(v) for v in node["t"])
        return {build(k): build(v) for k, v in node["d"]}

    return build(meta["bundle"])
