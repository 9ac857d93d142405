"""Rolling against tumbling windows: bytes, host memory and replay, from the real schedule.

Usage: python -m launch.bench.policies [--write | --check] [--measure] [--window W ...]

Prints the table of docs/windows.md; --write puts it there, --check fails when it is not current.
Nothing is trained or measured in it: the frames are those that `Schedule` asks for, their bytes
those that the vault would hold, and the replayed iterations those of the recovery plan over the
frames that would be sealed. The tensors have sizes and no storage. With --measure, a small model is
trained under each schedule, too, and what the agent counted stands in a second table (minutes).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch

from launch.bench import counted
from megatron_moetion.operators import Kind, Operator, ParamState, StateAccess
from megatron_moetion.recovery.plan import Facts, FrameInfo, Position, Progress, make_plan
from megatron_moetion.schedule import Schedule, Unit, WindowPolicy, generate, order
from megatron_moetion.snapshot.frame import to_meta
from megatron_moetion.topology import from_pipeline_groups
from megatron_moetion.vault.budget import frame_bytes, mib, need_of
from megatron_moetion.window import FINENESS, price

DOCUMENT = Path(__file__).parents[2] / "docs" / "windows.md"
BEGIN, END = "<!-- table: python -m launch.bench.policies --write -->", "<!-- end of table -->"
BEGIN_COUNTED = "<!-- table: python -m launch.bench.policies --measure --write -->"
WINDOWS = (1, 2, 3, 4, 6, 8, 12)
MOST_COUNTED = 4
"""The longest window that a model is trained under, twice for half a minute each."""

HIDDEN, EXPERT_HIDDEN, VOCABULARY = 2048, 1408, 102400
NUM_LAYERS, NUM_EXPERTS, NUM_SHARED, NUM_RANKS = 2, 64, 2, 8
"""DeepSeekMoE-16B (public configuration) in stages of two layers on eight ranks each: a rank has an
eighth of every layer's experts, and an eighth of the optimizer state of everything else.
"""


def rank_of_a_stage() -> list[Operator]:
    """The operators of one rank of the first stage, as the host adapter finds them."""
    found = [_operator("embedding", Kind.EMBEDDING, VOCABULARY * HIDDEN // NUM_RANKS)]
    ffn = 3 * HIDDEN * EXPERT_HIDDEN
    rest = (4 * HIDDEN * HIDDEN + NUM_SHARED * ffn + 2 * HIDDEN) // NUM_RANKS
    for layer in range(NUM_LAYERS):
        for expert in range(NUM_EXPERTS // NUM_RANKS):
            found.append(_operator(f"layer{layer}.expert{expert}", Kind.EXPERT, ffn))
        found.append(_operator(f"layer{layer}.rest", Kind.LAYER, rest))
        router = NUM_EXPERTS * HIDDEN // NUM_RANKS
        found.append(_operator(f"layer{layer}.router", Kind.ROUTER, router))
    return found


def _operator(name: str, kind: Kind, numel: int) -> Operator:
    main = torch.empty(numel, device="meta")
    light = torch.empty(numel, dtype=torch.bfloat16, device="meta")
    state = ParamState(f"{name}.w", torch.nn.Parameter(light), light, main, StateAccess({}, main))
    return Operator(name, kind, [state], numel)


def replays(schedule: Schedule) -> list[int]:
    """Iterations that the plan replays, for a failure in each iteration of a window.

    The failure comes before the commit point, everything up to there is sealed, and the vault has
    dropped what it no longer keeps.
    """
    topology = from_pipeline_groups(0, [(0, 1)])
    start = schedule.first + 3 * schedule.window
    found = []
    for committed in range(start, start + schedule.window):
        where = Position(committed + 1, Progress.BEFORE_COMMIT, committed, committed)
        oldest = committed + 1 - schedule.frames_kept
        frames = tuple(_sealed(schedule, i) for i in range(oldest, committed + 1))
        facts = Facts(1, committed, (0,), {0: where, 1: where}, {0: frames, 1: ()})
        (stage,) = make_plan(facts, topology).stages
        found.append(len(stage.replay))
    return found


def _sealed(schedule: Schedule, iteration: int) -> FrameInfo:
    return FrameInfo.from_meta(to_meta(iteration, schedule.frame(iteration), ()))


@dataclass(frozen=True)
class Row:
    """One schedule against a dense capture in every iteration.

    Attributes:
        peak_bytes, mean_bytes: of a frame.
        dense_bytes: of a dense frame.
        host_bytes: of all frames that are kept; the logs come on top.
        replayed: for a failure in each iteration of a window.
    """

    window: int
    policy: WindowPolicy
    split: int
    peak_bytes: int
    mean_bytes: float
    dense_bytes: int
    host_bytes: int
    replayed: Sequence[int]

    def cells(self) -> list[str]:
        peak, average = (
            f"{mib(n)} ({100 * (n / self.dense_bytes - 1):+.0f} %)"
            for n in (self.peak_bytes, self.mean_bytes)
        )
        host = f"{mib(self.host_bytes)} ({self.host_bytes / self.dense_bytes:.1f} x)"
        parts = f"1/{self.split}" if self.split else "-"
        replayed = [f"{mean(self.replayed):.1f}", str(max(self.replayed))]
        return [str(self.window), str(self.policy), parts, peak, average, host, *replayed]


def row(operators: Sequence[Operator], window: int, policy: WindowPolicy, split: int) -> Row:
    """Prices one schedule and plans every failure under it."""
    units = order([Unit(o.name, o.kind, o.numel) for o in operators])
    schedule = generate(units, window, policy, split)
    by_name = {operator.name: operator for operator in operators}
    cost, dense = price(schedule, by_name), frame_bytes(schedule.dense, by_name)
    host = need_of(schedule, operators, 0, {}).total
    found = replays(schedule)
    return Row(window, policy, split, cost.largest, cost.mean, dense, host, found)


HEAD = ["W", "policy", "parts", "largest frame", "mean frame", "host memory"]
HEAD += ["replayed, mean", "worst"]


def table(windows: Sequence[int]) -> str:
    """The whole table, in Markdown."""
    operators = rank_of_a_stage()
    rows = [
        row(operators, window, policy, split)
        for window in windows
        for split in (0, FINENESS * window)
        for policy in WindowPolicy
    ]
    # Parts only where whole operators leave a larger frame than need be.
    whole = {(r.window, r.policy): r.peak_bytes for r in rows if not r.split}
    shown = [r for r in rows if not r.split or r.peak_bytes < whole[r.window, r.policy]]
    lines = [HEAD, ["---:", "---", *["---:"] * 6], *(r.cells() for r in shown)]
    numel = sum(p.main.numel() for o in operators for p in o.params)
    about = (
        f"One rank of the first stage of DeepSeekMoE-16B with {NUM_LAYERS} layers and "
        f"{NUM_EXPERTS // NUM_RANKS} of {NUM_EXPERTS} experts of each: state of "
        f"{numel / 1e6:.0f} million parameters, {mib(rows[0].dense_bytes)} in a dense frame."
    )
    return "\n".join([about, "", *(f"| {' | '.join(cells)} |" for cells in lines)])


def document(text: str, new: str, begin: str = BEGIN) -> str:
    """The document with another table behind one of its marks."""
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(END)
    return f"{before}{begin}\n{new}\n{END}{after}"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; exit code 1 when --check finds another table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--window", type=int, nargs="+", default=WINDOWS, metavar="W")
    parser.add_argument("--measure", action="store_true", help="train under each, and count")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--write", action="store_true", help=f"put the table into {DOCUMENT.name}")
    what.add_argument("--check", action="store_true", help="only say whether it is current")
    options = parser.parse_args(argv)
    new = table(options.window)
    if options.check:
        text = DOCUMENT.read_text()
        return int(document(text, new) != text)
    tables = {BEGIN: new}
    if options.measure:
        tables[BEGIN_COUNTED] = counted.table([w for w in options.window if w <= MOST_COUNTED])
    if options.write:
        for begin, lines in tables.items():
            DOCUMENT.write_text(document(DOCUMENT.read_text(), lines, begin))
    else:
        print("\n\n".join(tables.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
