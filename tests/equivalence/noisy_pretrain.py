"""The demo's script with a forward pass that nobody can repeat: noise from a source that is not
logged. At the end of a recovery each rank records hashes of its state, in the folder REBUILT.
"""

from __future__ import annotations

import os
import runpy
from pathlib import Path
from typing import Any

import torch

from megatron_moetion import digest
from megatron_moetion.recovering import Recovering

REBUILT = "rebuilt"


def noisy(forward: Any) -> Any:
    def shaken(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Of the operating system: no seed, no state.
        noise = torch.Generator().manual_seed(int.from_bytes(os.urandom(6)))
        hidden, *rest = forward(self, *args, **kwargs)
        return (hidden + 0.01 * torch.randn(hidden.shape, generator=noise).to(hidden), *rest)

    return shaken


def joined(self: Any, plan: Any, **told: Any) -> None:
    hashes = digest.state_hashes(self._host.operators, self._host.buffers())
    folder = Path(self._job.config.dir) / REBUILT
    digest.record(folder, self._job.global_rank, plan.committed, {}, hashes)
    by_itself(self, plan, **told)


by_itself, Recovering._joined = Recovering._joined, joined  # type: ignore[method-assign]


def main() -> None:
    """Trains."""
    from megatron.core.transformer.transformer_layer import TransformerLayer

    TransformerLayer.forward = noisy(TransformerLayer.forward)
    script = Path(__file__).parents[2] / "launch" / "demo" / "pretrain_moe.py"
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
