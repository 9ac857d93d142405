"""The two cuts side by side: bytes, memory, and what workers that are killed at random cost.

Usage: python -m launch.bench.cuts [--write] [--kills N] [--seed S]

Trains two small models under each cut, kills one worker after the other at random instants, and
prints the table of docs/cuts.md; --write puts it there. It is a rehearsal on CPU: bytes, iterations
and their ratios mean something, times compare with each other at most.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from launch.bench.counted import DEMO, SIZES
from launch.bench.policies import document
from launch.demo.model_args import model_args
from launch.demo.training_run import LOG_NAME, moetion_run
from megatron_moetion import events
from megatron_moetion.vault.budget import mib

DOCUMENT = Path(__file__).parents[2] / "docs" / "cuts.md"
BEGIN = "<!-- table: python -m launch.bench.cuts --write -->"
NUM_WORKERS, WINDOW, KILLS, SEED = 4, 4, 20, 1
FOREVER = 20_000
MODELS = {
    "large state": SIZES,
    "large activations": ["--seq-length", "512", "--max-position-embeddings", "512"],
}
"""What is added to the demo's command line."""
CUTS = ("stage", "shard")
ITERATION = re.compile(r"iteration +\d+/ *\d+ .*elapsed time per iteration \(ms\): ([\d.]+)")
BETWEEN = 3
"""Iterations that are trained after a recovery before the next kill is drawn."""


class RunEnded(RuntimeError):
    """A run ended before all of its workers were killed; the text says where its output is."""


@dataclass(frozen=True)
class Cost:
    """What one run came to.

    Attributes:
        captured_bytes, logged_bytes: per iteration, of all ranks.
        host_bytes: of the arena at the end.
        iteration_ms: median.
        rebuild_ms: of the slowest rank, by recovery, replay included.
        replayed, lost: iterations, by recovery: run again by one stage from logs, by everybody.
        logged: by recovery, whether the frames of who died reach what had been committed.
    """

    captured_bytes: float
    logged_bytes: float
    host_bytes: int
    iteration_ms: float
    rebuild_ms: Sequence[float]
    replayed: Sequence[int]
    lost: Sequence[int]
    logged: Sequence[bool]

    def cells(self) -> list[str]:
        logged = mib(self.logged_bytes)
        return [
            mib(self.captured_bytes),
            logged,
            mib(self.host_bytes),
            f"{self.iteration_ms:.0f} ms",
            f"{median(self.rebuild_ms):.0f} / {max(self.rebuild_ms):.0f} ms",
            f"{mean(self.replayed):.1f}",
            f"{self._lost_where(True)}, {self._lost_where(False)}",
        ]

    def _lost_where(self, logged: bool) -> str:
        lost = [n for n, there in zip(self.lost, self.logged, strict=True) if there is logged]
        return f"{sum(lost)} in {len(lost)}"


HEAD = ["model", "cut", "frames", "logs", "host memory", "iteration", "rebuild, median / worst"]
HEAD += ["replayed, mean", "lost: captured, not captured"]


def cost(directory: Path, words: Sequence[str], kills: int, seed: int) -> Cost:
    """Trains, kills a worker `kills` times, and reads what the agent recorded.

    Raises:
        RunEnded: training ended by itself.
    """
    directory.mkdir()
    command = moetion_run(NUM_WORKERS, str(DEMO / "pretrain_moe.py"), *words)
    command += ["--moetion-dir", str(directory)]
    env = {**os.environ, "MOETION_PLATFORM": "cpu"}
    elapsed = []
    with subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
    ) as process:
        assert process.stdout is not None
        draw, since, left = random.Random(seed), 0, kills
        with (directory / LOG_NAME).open("w", buffering=1) as log:
            for line in process.stdout:
                log.write(line)
                if found := ITERATION.search(line):
                    elapsed.append(float(found[1]))
                    since += 1
                    if since == BETWEEN and left:
                        _kill_later(directory, draw, elapsed)
                elif " recovered, training again" in line:
                    since, left = 0, left - 1
                    if not left:
                        process.send_signal(signal.SIGTERM)
    if left:
        raise RunEnded(f"the run ended before it was to; all of it: {directory / LOG_NAME}")
    return _read(events.read(directory), median(elapsed))


def _kill_later(directory: Path, draw: random.Random, elapsed: Sequence[float]) -> None:
    """At any instant of one of the next two iterations."""
    rank = draw.randrange(NUM_WORKERS)
    started = [e for e in events.read(directory) if e["kind"] == "started"]
    pid = {e["global_rank"]: e["pid"] for e in started}[rank]
    seconds = draw.uniform(0, 2 * elapsed[-1] / 1000)
    threading.Timer(seconds, os.kill, (pid, signal.SIGKILL)).start()


def _read(told: Iterable[dict[str, Any]], iteration_ms: float) -> Cost:
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for event in told:
        by_kind.setdefault(event["kind"], []).append(event)
    (numbers,), (vault,) = by_kind["counted"], by_kind["vault"]
    num_frames = numbers["captured entries"] / NUM_WORKERS
    lost = lost_iterations(by_kind)
    logged = {e["epoch"]: min(e["newest"].values()) >= e["committed"] for e in by_kind["gathered"]}
    replayed: dict[int, int] = dict.fromkeys(lost, 0)
    for event in by_kind["resumed"]:
        epoch = event["epoch"]
        replayed[epoch] = max(replayed.get(epoch, 0), event.get("replayed", 0))
    return Cost(
        captured_bytes=numbers["captured bytes"] / num_frames,
        logged_bytes=numbers["logged bytes"] / num_frames,
        host_bytes=vault["allocated_bytes"],
        iteration_ms=iteration_ms,
        rebuild_ms=_rebuild_ms(by_kind),
        replayed=list(replayed.values()),
        lost=list(lost.values()),
        logged=[logged[epoch] for epoch in lost],
    )


def lost_iterations(by_kind: Mapping[str, Sequence[dict[str, Any]]]) -> dict[int, int]:
    """Iterations that all ranks run again, of those that counted as done; by epoch."""
    committed = {e["epoch"]: e["committed"] for e in by_kind["planned"] if "committed" in e}
    at = {e["epoch"]: e["iteration"] for e in by_kind.get("went-back", ())}
    return {epoch: done - at.get(epoch, done) for epoch, done in committed.items()}


def _rebuild_ms(by_kind: dict[str, list[dict[str, Any]]]) -> list[float]:
    """From the moment at which groups were made again, of each recovery's slowest rank."""
    began: dict[str, float] = {}
    slowest: list[float] = []
    epoch = 0
    merged = [e for kind in ("regrouped", "rebuilt", "resumed") for e in by_kind[kind]]
    for event in sorted(merged, key=lambda e: e["monotonic_ns"]):
        who, ms = event["who"], event["monotonic_ns"] / 1e6
        if event["kind"] == "regrouped":
            began[who] = ms
        elif event["kind"] == "rebuilt":
            took = event.get("ms", ms - began[who])
            slowest[epoch:] = [max([took, *slowest[epoch:]])]
        elif who.startswith("agent"):
            epoch = len(slowest)
    return slowest


def table(kills: int, seed: int) -> str:
    """Trains both models under both cuts."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="moetion-bench-") as scratch:
        data = f"{scratch}/data"
        subprocess.run([sys.executable, str(DEMO / "corpus.py"), "--output", data], check=True)
        for model, sizes in MODELS.items():
            for cut in CUTS:
                words = [*model_args(train_iters=FOREVER, data_prefix=data), *sizes]
                words += ["--eval-iters", "0", "--moetion", "--moetion-cut", cut]
                words += ["--moetion-window", str(WINDOW), "--moetion-split", "0"]
                words += ["--moetion-window-policy", "rolling", "--moetion-popularity", "none"]
                print(f"{model}, {cut}: {kills} kills", file=sys.stderr, flush=True)
                found = cost(Path(scratch) / f"{model}-{cut}".replace(" ", "-"), words, kills, seed)
                rows.append([model, cut, *found.cells()])
    lines = [HEAD, ["---", "---", *["---:"] * 7], *rows]
    about = (
        f"PP2 x EP2 on {NUM_WORKERS} processes, windows of {WINDOW}, {kills} workers killed one "
        f"after the other in each run (seed {seed}); frames and logs per iteration, of all ranks."
    )
    return "\n".join([about, "", *(f"| {' | '.join(cells)} |" for cells in lines)])


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=KILLS, metavar="N")
    parser.add_argument("--seed", type=int, default=SEED, metavar="S")
    parser.add_argument("--write", action="store_true", help=f"put it into {DOCUMENT.name}")
    options = parser.parse_args(argv)
    new = table(options.kills, options.seed)
    if options.write:
        DOCUMENT.write_text(document(DOCUMENT.read_text(), new, BEGIN))
    else:
        print(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
