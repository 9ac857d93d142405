"""What a soak and a calm run share: where they train, on what, and whom they tell."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.equivalence.harness import ROOT, Runner

FOREVER = 100_000
"""Iterations that a run would have: each is ended before, and all are to have the same data."""
STEADY = ["--lr-decay-iters", str(FOREVER), "--log-interval", "1"]


def runner(directory: Path) -> Runner:
    """Runs in this directory, which is made anew but for its data set."""
    prefix = directory / "corpus"
    if not prefix.with_suffix(".idx").exists():
        directory.mkdir(parents=True, exist_ok=True)
        maker = [sys.executable, "-W", "ignore", str(ROOT / "launch" / "demo" / "corpus.py")]
        made = [*maker, "--output", str(prefix)]
        subprocess.run(made, cwd=ROOT, check=True, capture_output=True)
    return Runner(directory, str(prefix))


def say(line: str) -> None:
    """To whoever watches."""
    print(line, flush=True)
