"""The stub worker with checkpoints of its own, which are no more than a tracker file.

`python saving_worker.py --load DIR --save-at N ...`, and what the stub worker takes. Rank 0 names
iteration N in the tracker when it gets there, and all begin at what it names.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import stub_worker


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--load", type=Path)
    parser.add_argument("--save-at", type=int)
    args, rest = parser.parse_known_args()
    tracker = args.load / "latest_checkpointed_iteration.txt"

    class Worker(stub_worker.Worker):
        def train(self) -> None:
            if not self.replacement and tracker.exists():
                self.iteration = int(tracker.read_text())
                self.log.emit("loaded", iteration=self.iteration)
            super().train()

        def save(self) -> None:
            super().save()
            if stub_worker.RANK == 0 and self.iteration == args.save_at:
                tracker.write_text(str(self.iteration))

    stub_worker.Worker = Worker
    sys.argv[1:] = rest
    stub_worker.main()


if __name__ == "__main__":
    main()
