"""The demo's script with samples that come late, by the seed in $MOETION_TEST_DELAYS."""

from __future__ import annotations

import os
import runpy
import time
from pathlib import Path
from typing import Any

from tests.soak.burden import delay

SEED = int(os.environ["MOETION_TEST_DELAYS"])


def main() -> None:
    """Trains."""
    from megatron.core.datasets.gpt_dataset import GPTDataset
    from megatron.core.datasets.utils import Split

    by_itself = GPTDataset.__getitem__

    def late(self: Any, index: int | None) -> Any:
        time.sleep(delay(SEED, index or 0, self.index_split == Split.valid))
        return by_itself(self, index)

    GPTDataset.__getitem__ = late
    script = Path(__file__).parents[2] / "launch" / "demo" / "pretrain_moe.py"
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
