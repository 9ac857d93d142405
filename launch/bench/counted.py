"""What the agent counts while a small model is trained under each schedule."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from rich.console import Console

from launch.demo.model_args import model_args
from launch.demo.training_run import moetion_run, train
from megatron_moetion import events
from megatron_moetion.schedule import WindowPolicy
from megatron_moetion.vault.budget import mib

DEMO = Path(__file__).parents[1] / "demo"
NUM_WORKERS = 4
ITERATIONS = 24
"""A multiple of every window in the docs."""
SIZES = ["--hidden-size", "512", "--ffn-hidden-size", "1024", "--moe-ffn-hidden-size", "512"]
"""Large enough for the smallest piece of an arena, 1 MiB, not to matter."""


@dataclass(frozen=True)
class Count:
    """What one run came to, on its one node.

    Attributes:
        captured_bytes, num_frames: of all frames, those of the starting state too.
        largest_bytes: of a frame, those of the starting state too.
        host_bytes: of the arenas at the end.
    """

    captured_bytes: int
    num_frames: int
    largest_bytes: int
    host_bytes: int


def count(directory: Path, data_prefix: str, window: int, policy: WindowPolicy) -> Count:
    """Trains under one schedule.

    Raises:
        RunFailed: training did not end well.
    """
    directory.mkdir()
    words = model_args(train_iters=ITERATIONS, data_prefix=data_prefix)
    words += [*SIZES, "--eval-iters", "0", "--moetion"]
    words += ["--moetion-window", str(window), "--moetion-window-policy", str(policy)]
    words += ["--moetion-split", "0", "--moetion-popularity", "none"]
    words += ["--moetion-dir", str(directory)]
    command = moetion_run(NUM_WORKERS, "--spares", "0", str(DEMO / "pretrain_moe.py"), *words)
    train(Console(stderr=True), f"{policy} windows of {window}", command, directory, ITERATIONS)
    found = {e["kind"]: e for e in events.read(directory) if e["kind"] in ("counted", "vault")}
    numbers = found["counted"]
    return Count(
        numbers["captured bytes"],
        numbers["captured entries"],
        numbers["largest captured entry"],
        found["vault"]["allocated_bytes"],
    )


HEAD = ["W", "policy", "frames", "captured per iteration", "host memory"]


def table(windows: Sequence[int]) -> str:
    """Trains under every schedule, and a dense capture in every iteration to compare with."""
    with tempfile.TemporaryDirectory(prefix="moetion-bench-") as scratch:
        data = f"{scratch}/data"
        subprocess.run([sys.executable, str(DEMO / "corpus.py"), "--output", data], check=True)
        runs = {
            (window, policy): count(Path(scratch) / f"{policy}-{window}", data, window, policy)
            for window, policy in product(sorted({1, *windows}), WindowPolicy)
        }
    dense = runs[1, WindowPolicy.ROLLING]
    # With a window of 1 the frames of the starting state are frames like any other.
    per_iteration = dense.captured_bytes / (ITERATIONS + 1)
    lines = [HEAD, ["---:", "---", *["---:"] * 3]]
    for (window, policy), run in runs.items():
        mean = (run.captured_bytes - per_iteration) / ITERATIONS
        captured = f"{mib(mean)} ({100 * (mean / per_iteration - 1):+.0f} %)"
        host = f"{mib(run.host_bytes)} ({run.host_bytes / per_iteration:.1f} x)"
        lines.append([str(window), str(policy), str(run.num_frames), captured, host])
    about = (
        f"{mib(per_iteration)} in the dense frames of one iteration, the largest "
        f"{mib(dense.largest_bytes)}; {ITERATIONS} iterations."
    )
    return "\n".join([about, "", *(f"| {' | '.join(cells)} |" for cells in lines)])
