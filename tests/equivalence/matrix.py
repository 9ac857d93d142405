"""What failed in a run and was recovered from, read from what the run recorded: the rows of the
failure matrix, which pytest prints at its end.

A row is a recovery that ended with training. What was only asked for is no row.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_moetion import faults
from megatron_moetion.agent.escalation import Tier

PHASES = {
    "detected": "planning",
    "node-lost": "planning",
    "planned": "settling",
    "settled": "regrouping",
    "quiesced": "gathering",
    "gathered": "restoring",
}
"""{what the leader records: what it waits for from then on}."""
OUTSIDE = "from outside"
PROPERTY = "recovered"
"""Under that name a report carries a row, in whatever process its test ran."""
HARMLESS = tuple(f"Fault(kind='{kind}'" for kind in ("corrupt", "hold", "poison"))
"""How faults begin that no worker ends by."""
FAULT = re.compile(r"kind='(\w+)', .*place='([\w-]+)', microbatch=(\w+)")


@dataclass(frozen=True)
class Row:
    """One recovery.

    Attributes:
        cut: stage or shard.
        run: its name.
        points: of each failure in turn: kind, global rank and stage, place, and what the leader was
            waiting for unless it was training.
        count: of failures.
        committed: the iteration that counted as done.
        by: what the state was rebuilt from, and how.
        ms: from the first failure until training went on.
    """

    cut: str
    run: str
    points: str
    count: int
    committed: int
    by: str
    ms: float

    def line(self) -> str:
        """As it is listed."""
        where = f"{self.run} after iteration {self.committed}"
        return f"{self.cut:5}  {where}: {self.points} => {self.by}, {self.ms / 1000:.1f} s"


@dataclass
class _Recovery:
    """One that goes on; `ms` is known when it has ended."""

    began_ns: int
    points: list[str] = field(default_factory=list)
    committed: int = 0
    source: str = ""
    ms: float | None = None
    workers: list[dict[str, Any]] = field(default_factory=list)


def rows(run: str, cut: str, num_stages: int, told: Sequence[dict[str, Any]]) -> list[Row]:
    """All recoveries of a run.

    Args:
        cut: the one that was asked for; `auto` is resolved by what the run recorded.
        num_stages: that the four ranks of every run are divided into.
        told: the run's events in time order.
    """
    chosen = next((e["cut"] for e in told if e["kind"] == "cut"), cut)
    return [
        Row(chosen, run, " + ".join(each.points), len(each.points), each.committed, _by(each), ms)
        for each in _recoveries(num_stages, told)
        if (ms := each.ms) is not None
    ]


def unrecovered(told: Sequence[dict[str, Any]]) -> list[str]:
    """Failures that agents saw and no recovery ended."""
    return [point for each in _recoveries(1, told) if each.ms is None for point in each.points]


def _recoveries(num_stages: int, told: Sequence[dict[str, Any]]) -> Iterator[_Recovery]:
    fired: dict[int, str] = {}
    phase, now = "", None
    for event in told:
        kind = event["kind"]
        if not event["who"].startswith("agent"):
            if kind == "steady" and now is not None and now.source.startswith(Tier.CHECKPOINT):
                # A start as any other: nothing is gathered, and nobody is told to resume.
                now.ms = (event["monotonic_ns"] - now.began_ns) / 1e6
                yield now
                phase, now = "", None
            elif kind == "fault" and not event["fault"].startswith(HARMLESS):
                fired[int(event["who"].removeprefix("rank"))] = event["fault"]
            elif now is not None and kind in ("restored", "replayed", "went-back"):
                now.workers.append(event)
            continue
        if kind in ("detected", "node-lost"):
            now = now or _Recovery(event["monotonic_ns"])
            now.points.append(_point(event, fired, num_stages) + (phase and f" while {phase}"))
        elif kind == "cold-start":
            now = now or _Recovery(event["monotonic_ns"], ["agents and workers, all at once"])
            now.source = f"spill of iteration {event['iteration']}"
        elif now is not None and kind == "fell-back":
            now.source = f"{event['tier']} of iteration {event['iteration']}"
            now.committed = event["committed"]
        elif now is not None and kind == "gathered":
            now.committed = event["committed"]
            if now.source.startswith(Tier.CHECKPOINT):
                # Another failure came before the start from it was over.
                now.source = ""
            # What an earlier attempt had begun was given up.
            now.workers.clear()
        elif now is not None and kind == "resumed":
            now.ms = (event["monotonic_ns"] - now.began_ns) / 1e6
            yield now
            phase, now = "", None
        if now is not None:
            phase = PHASES.get(kind, phase)
    if now is not None:
        yield now


def _point(event: dict[str, Any], fired: dict[int, str], num_stages: int) -> str:
    if event["kind"] == "node-lost":
        return f"node {event['node_rank']} lost"
    rank = event["global_rank"]
    who = f"rank {rank} (stage {rank * num_stages // 4})"
    found = FAULT.search(fired.pop(rank, ""))
    if found is None:
        return f"{who} killed {OUTSIDE}"
    kind, place, count = found.groups()
    return f"{kind} {who} at {place}" + ("" if count == "None" else f":{count}")


def _by(recovery: _Recovery) -> str:
    if recovery.source:
        return recovery.source
    replayed = {e["iteration"] for e in recovery.workers if e["kind"] == "replayed"}
    bases = sorted({e["base"] for e in recovery.workers if e["kind"] == "restored"})
    rebuilt = sorted(
        e["who"].removeprefix("rank")
        for e in recovery.workers
        if e["kind"] == "went-back" and e["base"] is not None
    )
    if bases:
        return f"frame {' and '.join(map(str, bases))} and {len(replayed)} replayed iterations"
    many = "s" * (len(rebuilt) > 1)
    return f"updates of rank{many} {', '.join(rebuilt)}" if rebuilt else "what survivors hold"


def unfired(spec: str, told: Sequence[dict[str, Any]]) -> list[str]:
    """Scripted failures of workers that never happened."""
    happened = [e["fault"] for e in told if e["kind"] == "fault"]
    asked = [str(fault) for fault in faults.parse(spec) if fault.kind != "corrupt"]
    return [each for each in asked if happened.count(each) < asked.count(each)]
