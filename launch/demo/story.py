"""What the events of a run with one failure tell: the timeline, who replayed, who lived on.

Pure: events in, values out. Nothing here is assumed of a recovery that is not in its events.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_moetion import events as event_files
from megatron_moetion.digest import Comparison

Event = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """One line of the timeline.

    Attributes:
        what: the phase that had ended.
        at_ms: milliseconds after the fault fired, on the machine's monotonic clock.
        detail: what there is to say of it.
    """

    what: str
    at_ms: float
    detail: str


class NoRecovery(RuntimeError):
    """The events hold no complete recovery."""


def timeline(events: Sequence[Event]) -> list[Row]:
    """The recovery of the only failure of a run, as the failed stage saw it.

    A phase of several ranks ends with the last one of that stage; the others only wait for it.

    Raises:
        NoRecovery: naming the first event that is missing.
    """
    fault = _last(events, "fault", "rank")
    detected = _last(events, "detected", "agent")
    _last(events, "restored", "rank")
    stage = tuple(sorted({e["who"] for e in events if e["kind"] == "restored"}))
    started = _last(events, "started", "agent")
    decided = _last(events, "planned", "agent")
    planned = _last(events, "planned", stage)
    steps = [
        ("fault", fault, f"{fault['who']} in iteration {fault['iteration']}"),
        ("detected", detected, f"exit code {detected['code']}"),
        ("committed", decided, f"survivors agree: iteration {decided['committed']} is done"),
        ("booted", _last(events, "quiesced", "agent"), f"replacement, {started['start']} start"),
        ("planned", planned, _stages_of(planned["plan"])),
        ("regrouped", _last(events, "regrouped", stage), "process groups made again"),
        ("restored", _last(events, "restored", stage), "base frame loaded"),
    ]
    if numbers := sorted({e["iteration"] for e in events if e["kind"] == "replayed"}):
        detail = f"iterations {', '.join(map(str, numbers))} from the inbox"
        steps.append(("replayed", _last(events, "replayed", stage), detail))
    steps.append(("resumed", _last(events, "resumed", "agent"), "all ranks train again"))
    start = fault["monotonic_ns"]
    return [Row(what, (event["monotonic_ns"] - start) / 1e6, note) for what, event, note in steps]


def _last(events: Iterable[Event], kind: str, who: str | tuple[str, ...]) -> Event:
    """The last event of a kind by someone whose name begins like that."""
    found = [e for e in events if e["kind"] == kind and str(e["who"]).startswith(who)]
    if not found:
        raise NoRecovery(f"nobody recorded the event '{kind}': there was no complete recovery")
    return found[-1]


def _stages_of(plan: str) -> str:
    """The part of a printed plan that follows epoch, committed iteration and dead ranks."""
    return plan.partition("]: ")[2]


@dataclass(frozen=True)
class Aftermath:
    """What the failure did to each rank.

    Attributes:
        replayed: number of replayed iterations by global rank, 0 for who replayed nothing.
        survivors: pid by global rank, of ranks that one process carried from start to clean end.
        replaced: global ranks that more than one process carried.
    """

    replayed: Mapping[int, int]
    survivors: Mapping[int, int]
    replaced: tuple[int, ...]


def aftermath(directory: Path, world_size: int) -> Aftermath:
    """Counts replays in the events, and compares who opened them with who ended cleanly."""
    events = event_files.read(directory)
    counted = Counter(_rank_of(e["who"]) for e in events if e["kind"] == "replayed")
    ended = {e["global_rank"]: e["pid"] for e in events if e["kind"] == "exited" and e["code"] == 0}
    survivors, replaced = {}, []
    for global_rank in range(world_size):
        pids = pids_of(directory, global_rank)
        if pids == [ended.get(global_rank)]:
            survivors[global_rank] = pids[0]
        else:
            replaced.append(global_rank)
    return Aftermath({r: counted[r] for r in range(world_size)}, survivors, tuple(replaced))


def pids_of(directory: Path, global_rank: int) -> list[int]:
    """Every process that wrote events as this rank."""
    files = (directory / event_files.FOLDER).glob(f"rank{global_rank}.*.jsonl")
    return sorted(int(file.name.split(".")[1]) for file in files)


def _rank_of(who: str) -> int:
    return int(who.removeprefix("rank"))


@dataclass(frozen=True)
class Verdict:
    """The last line of the demo."""

    good: bool
    text: str


def verdict(
    comparison: Comparison, after: Aftermath, num_records: int, failed_rank: int, stage_size: int
) -> Verdict:
    """Whether the run with the failure ended as if there had been none, at no cost to the others.

    Args:
        comparison: of the digests of both runs.
        after: what the failure did.
        num_records: digests there have to be: iterations times ranks.
        failed_rank: the global rank that the fault killed.
        stage_size: ranks per stage; stages are runs of consecutive global ranks.
    """
    failed_stage = failed_rank // stage_size
    stages: dict[int, set[int]] = {}
    for global_rank, count in after.replayed.items():
        stages.setdefault(global_rank // stage_size, set()).add(count)
    wrong = []
    if comparison.difference is not None:
        wrong.append(f"different at {comparison.difference}")
    elif comparison.records != num_records:
        wrong.append(f"{comparison.records} digests were recorded instead of {num_records}")
    if after.replaced != (failed_rank,):
        wrong.append(f"global ranks {list(after.replaced)} were replaced, not just {failed_rank}")
    wrong += [
        f"stage {s} replayed too" for s, n in stages.items() if s != failed_stage and n != {0}
    ]
    if len(stages[failed_stage]) != 1:
        wrong.append(f"ranks of stage {failed_stage} replayed differently: {after.replayed}")
    if wrong:
        return Verdict(False, f"VERDICT: NOT as without the failure: {'; '.join(wrong)}")
    counts = ", ".join(f"stage {s} replayed {_iterations(*n)}" for s, n in sorted(stages.items()))
    pids = ", ".join(f"rank {rank}: {pid}" for rank, pid in after.survivors.items())
    same = f"{comparison.tensors} hashes over {comparison.records} digests agree"
    return Verdict(
        True, f"VERDICT: bit-identical ({same}); {counts}; survivors' PIDs unchanged ({pids})"
    )


def _iterations(count: int) -> str:
    return f"{count} iteration" + ("" if count == 1 else "s")
