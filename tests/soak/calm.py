"""Trains under protection where nothing fails and everything is slow: there is to be no alarm.

Usage: python -m tests.soak.calm [--minutes T] [--seed S] [--cut stage|shard] [--agents N]
           [--workers M] [--directory DIR]

Hang detection and leases are as they are by default. The run evaluates and saves checkpoints, its
data comes late, and other programs come and go on all cores. It ends with one line, VERDICT: or
FAILED, and code 0 only for `VERDICT: no false alarm`.
"""

from __future__ import annotations

import argparse
import os
import re
import secrets
import shutil
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_moetion import events
from tests.equivalence.harness import CUTS, ROOT, Run, follow

from .burden import Burners, bursts
from .inject import ITERATION, end
from .scene import FOREVER, STEADY, runner, say

SCRIPT = Path(__file__).with_name("late_pretrain.py")
EVALUATE_EVERY, SAVE_EVERY = 20, 30
"""Iterations."""
ALARMS = ("hang", "stuck", "deaf", "expelled", "unfit", "lapsed", "fell-back")
LOSSES = ("detected", "node-lost")
"""Kinds of events, none of which a job may have in which nothing fails."""
SAID = re.compile(
    r"moetion-run: (node \d+ is l|global rank \d+ st|ranks .* recovered|no rank|a recov)"
)
"""Begins of lines that come with them: nothing that follows is worth waiting for."""
EVALUATION, SAVE = re.compile(r"validation loss at iteration"), re.compile(r"successfully saved ch")


@dataclass(frozen=True)
class Calm:
    """What a run came to.

    Attributes:
        seconds: of each iteration.
        evaluations, saves: as the log has them.
        limits: seconds, as told, in order.
        raised: events that should not be there, by kind.
    """

    seconds: tuple[float, ...]
    evaluations: int
    saves: int
    limits: tuple[float, ...]
    raised: dict[str, int]

    @classmethod
    def of(cls, log: str, told: Iterable[dict[str, Any]]) -> Calm:
        found = list(told)
        raised = Counter(e["kind"] for e in found if e["kind"] in ALARMS + LOSSES)
        limits = tuple(e["seconds"] for e in found if e["kind"] == "hang-limit")
        seconds = tuple(float(ms) / 1000 for _, ms in ITERATION.findall(log))
        said = len(EVALUATION.findall(log)), len(SAVE.findall(log))
        return cls(seconds, *said, limits, dict(raised))

    @property
    def lacks(self) -> str:
        """What it did not come to, so that it shows nothing; empty if it did."""
        parts = {
            "iterations": len(self.seconds),
            "evaluations": self.evaluations,
            "saves": self.saves,
            "learned limits": len(self.limits),
        }
        return ", ".join(name for name, number in parts.items() if not number)

    def __str__(self) -> str:
        ended = sum(self.raised.get(kind, 0) for kind in LOSSES)
        alarms = sum(self.raised.get(kind, 0) for kind in ALARMS)
        longest, least = max(self.seconds, default=0.0), min(self.limits, default=0.0)
        return (
            f"{len(self.seconds)} iterations, {self.evaluations} evaluations, {self.saves} saves;"
            f" {alarms} alarms, {ended} recoveries or lost nodes; longest iteration"
            f" {longest:.1f} s, shortest limit {least:.1f} s"
        )


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="tests.soak.calm", description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=int, default=30, metavar="T")
    parser.add_argument("--seed", type=int, default=None, metavar="S")
    parser.add_argument("--cut", choices=CUTS, default="stage")
    parser.add_argument("--agents", type=int, default=2, metavar="N")
    parser.add_argument("--workers", type=int, default=2, metavar="M", help="of each agent")
    parser.add_argument("--directory", type=Path, default=ROOT / ".moetion" / "calm")
    options = parser.parse_args()
    if options.agents * options.workers % 4:
        parser.error("agents times workers has to be a multiple of 4: PP2 x EP2")
    seed = secrets.randbelow(10**6) if options.seed is None else options.seed
    say(f"calm: to have the same delays and load again: --seed {seed}")
    run, load = train(options, seed)
    calm = Calm.of(run.log, events.read(run.directory))
    told = f"{calm}; {load} bursts of load; {options.minutes} min; cut {options.cut}; seed {seed}"
    if any(calm.raised.values()):
        say(f"VERDICT: FALSE alarm ({calm.raised}: {told}; see {run.directory / 'log'})")
        return 1
    if run.code or calm.lacks:
        why = f"code {run.code}" if run.code else f"there were no {calm.lacks}"
        say(f"FAILED ({why}: {told}; see {run.directory / 'log'})")
        return 2
    say(f"VERDICT: no false alarm ({told})")
    return 0


def end_at_an_alarm(directory: Path) -> None:
    """Runs beside the job, as `meddle` of `Runner.run`."""
    for line in follow(directory / "log"):
        if SAID.match(line):
            say(f"calm: {line.rstrip()}")
            end(directory)
            return


def train(options: argparse.Namespace, seed: int) -> tuple[Run, int]:
    """The run, and how often there was foreign load."""
    directory: Path = options.directory / options.cut
    shutil.rmtree(directory, ignore_errors=True)
    save = directory / "checkpoints"
    flags = [*STEADY, "--moetion", "--moetion-cut", options.cut, "--moetion-digest-interval", "0"]
    flags += ["--eval-interval", str(EVALUATE_EVERY), "--eval-iters", "2"]
    flags += ["--save", str(save), "--save-interval", str(SAVE_EVERY), "--save-retain-interval"]
    flags += [str(100 * SAVE_EVERY), "--exit-duration-in-mins", str(options.minutes)]
    say(f"calm: trains for {options.minutes} min in {directory}")
    runs = runner(directory)
    with Burners(bursts(seed, os.cpu_count() or 1)) as burners:
        run = runs.run(
            "slow",
            iterations=FOREVER,
            flags=flags,
            script=SCRIPT,
            env={"MOETION_TEST_DELAYS": str(seed)},
            model={"pp_size": 2, "dp_size": options.agents * options.workers // 2},
            workers_of_node=[options.workers] * options.agents,
            meddle=end_at_an_alarm,
            afresh=True,
            limit_seconds=None,
        )
    return run, burners.begun


if __name__ == "__main__":
    sys.exit(main())
