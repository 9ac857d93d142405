"""How much host memory a rank's part of the vault can come to, known before the first step. Pure
but for `free_bytes`.

A frame's size follows from its operators, the inbox of an iteration from the shapes that the host
knows; how many of each are kept follows from the schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_moetion.operators import Kind, Operator
from megatron_moetion.schedule import FramePlan, Schedule
from megatron_moetion.vault.arena import ALIGNMENT_BYTES, SMALLEST_CHUNK_BYTES, align, size_class

_CGROUP_FILES = (
    ("sys/fs/cgroup", "memory.max", "memory.current"),
    ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
)
"""Folder, limit and use, of version 2 and version 1."""


OTHER_WINDOWS = range(1, 17)
"""What a refusal may propose."""
Inbox = Mapping[str, tuple[int, int]]
"""By kind of entry: how many there are, and the bytes of each."""


@dataclass(frozen=True)
class Need:
    """Host memory of one rank, in bytes.

    Attributes:
        start: the dense frame of the starting state; its memory is used again for later frames.
        frames: all others that are kept at the same time, and the one that is being written.
        inbox: the logs of all iterations that are kept.
        spill: frames and logs that are kept longer than that, to be written to disk.
        headers: those of the inbox, and how interludes ended; a copy has a chunk of its own.
    """

    start: int
    frames: int
    inbox: int
    spill: int = 0
    headers: int = 0

    @property
    def total(self) -> int:
        return self.start + self.frames + self.inbox + self.spill

    @property
    def copies(self) -> int:
        """On each node that holds copies."""
        return self.start + self.frames + self.headers


def need_of(
    schedule: Schedule,
    operators: Sequence[Operator],
    buffer_bytes: int,
    inbox: Inbox,
    spills: bool = False,
    kept_longer: int = 0,
) -> Need:
    """What one rank needs, with at most one failure of it in the iterations that are kept; each
    further one may take a chunk more for each kind of entry until the older ones are dropped.

    Args:
        operators: of this rank.
        buffer_bytes: all model buffers, part of every frame.
        inbox: what this rank logs in one iteration, at most.
        spills: one window more is kept while it is being written to disk.
        kept_longer: frames and logs beyond the schedule's, as their copies may lag.
    """
    by_name = {operator.name: operator for operator in operators}
    slots = [schedule.frame_of_slot(slot) for slot in range(schedule.window)]
    largest = max(frame_bytes(plan, by_name, buffer_bytes) for plan in slots)
    if schedule.reorders:
        largest += _most_gained(slots, operators)
    # In iteration i those of i - kept to i are held, of which the first was dense at the start. One
    # more, as a replacement cannot fill up what its predecessor began.
    kept, spilled = schedule.frames_kept + 1 + kept_longer, schedule.window + 1 if spills else 0
    logs = sum(_chunk_bytes(count, nbytes) for count, nbytes in inbox.values())
    copied = [inbox[kind] for kind in ("header", "interlude") if kind in inbox]
    headers = sum(count * size_class(nbytes) for count, nbytes in copied)
    start = frame_bytes(schedule.dense, by_name, buffer_bytes)
    return Need(
        start=size_class(start),
        frames=kept * size_class(largest),
        inbox=(kept + 1) * logs,
        spill=spilled * (size_class(largest) + logs),
        headers=(kept + 1) * headers,
    )


def need_of_change(needs: Sequence[Need]) -> Need:
    """What one rank needs while frames of two of some schedules are kept at the same time.

    Args:
        needs: with each of the schedules alone.
    """
    largest = sorted(needs, key=lambda need: need.frames + need.inbox)[-2:]
    return Need(
        start=max(need.start for need in needs),
        frames=sum(need.frames for need in largest),
        inbox=sum(need.inbox for need in largest),
        spill=max(need.spill for need in needs),
        headers=sum(need.headers for need in largest),
    )


def _most_gained(slots: Sequence[FramePlan], operators: Sequence[Operator]) -> int:
    """By how many bytes a frame can grow when experts change places: a rank may hold all of one and
    nothing of another.
    """
    experts = {o.name: o.full_bytes for o in operators if o.kind is Kind.EXPERT}
    most = max(experts.values(), default=0)
    held = [[experts[p.operator] for p in plan.full if p.operator in experts] for plan in slots]
    return max(len(sizes) * most - sum(sizes) for sizes in held)


def _chunk_bytes(count: int, nbytes: int) -> int:
    """Capacity of the chunks that entries of one kind and iteration share."""
    per_chunk = max(1, SMALLEST_CHUNK_BYTES // align(max(nbytes, 1)))
    return -(-count // per_chunk) * size_class(nbytes)


def frame_bytes(plan: FramePlan, operators: Mapping[str, Operator], buffer_bytes: int = 0) -> int:
    """What a frame of one rank comes to at most, padding included.

    Args:
        operators: of this rank, by name.
        buffer_bytes: all model buffers.
    """
    full = [(operators[part.operator], part) for part in plan.full]
    light = [operators[name] for name in plan.light]
    num_pieces = sum(4 * len(o.params) for o, _ in full) + sum(len(o.params) for o in light)
    nbytes = sum(o.part_bytes(part) for o, part in full) + sum(o.rest_bytes for o in light)
    return nbytes + buffer_bytes + num_pieces * ALIGNMENT_BYTES


def staged_bytes(plan: FramePlan, operators: Mapping[str, Operator], buffer_bytes: int = 0) -> int:
    """Device memory that a frame takes until it is copied: what the next iteration overwrites.

    Args:
        operators: of this rank, by name.
        buffer_bytes: all model buffers.
    """
    gradients = [p for n in plan.light for p in operators[n].params if p.gradient is not None]
    return buffer_bytes + sum(p.main.nbytes for p in gradients)


@dataclass(frozen=True)
class Claim:
    """What a rank asks its node for.

    Attributes:
        need: with the window that was asked for.
        others: bytes in all with other windows, by W, so that a refusal can say what would fit.
        ceilings: with windows that change and may become as long as W, by W; none where the window
            never changes.
    """

    need: Need
    others: Mapping[int, int]
    ceilings: Mapping[int, Need] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        others = {str(window): nbytes for window, nbytes in self.others.items()}
        ceilings = {str(window): asdict(need) for window, need in self.ceilings.items()}
        return {"need": asdict(self.need), "others": others, "ceilings": ceilings}

    @classmethod
    def from_json(cls, message: Mapping[str, Any]) -> Claim:
        others = {int(window): int(nbytes) for window, nbytes in message["others"].items()}
        ceilings = {int(window): Need(**need) for window, need in message["ceilings"].items()}
        return cls(Need(**message["need"]), others, ceilings)

    def with_ceiling(self, ceiling: int) -> Claim:
        """What is asked for when windows may become as long as that; 0 is never to change them."""
        return replace(self, need=self.ceilings[ceiling] if ceiling else self.need)


@dataclass(frozen=True)
class Grant:
    """The answer to the claims of a node.

    Attributes:
        ceiling: how long windows may become; 0 is never to change them.
        claims: with that, by global rank.
        copies: bytes of what is held for other nodes, with that.
        refusal: why not even that fits, in one line; None when it does.
        note: what the user should know of the ceiling, or None.
    """

    ceiling: int
    claims: Mapping[int, Claim]
    copies: int
    refusal: str | None
    note: str | None


def settle(
    claims: Mapping[int, Claim], available: int, copies: Callable[[int], int] = lambda ceiling: 0
) -> Grant:
    """The highest ceiling with which the claims of a node's ranks fit.

    Args:
        claims: by global rank, of all ranks of the node.
        available: bytes.
        copies: bytes of what is held for other nodes, by ceiling.
    """
    common = set.intersection(*(set(claim.ceilings) for claim in claims.values()))
    asked = sorted(common, reverse=True)
    for ceiling in (*asked, 0):
        with_it = {rank: claim.with_ceiling(ceiling) for rank, claim in claims.items()}
        why = refusal(with_it, available, copies(ceiling))
        if why is None:
            break
    note = None
    if why is None and asked and ceiling < asked[0]:
        may = f"windows may become {ceiling} long" if ceiling else "the window does not change"
        wanted = {rank: claim.with_ceiling(asked[0]) for rank, claim in claims.items()}
        nbytes = sum(claim.need.total for claim in wanted.values()) + copies(asked[0])
        note = f"{may}: {mib(nbytes)} would be needed for {asked[0]}, {mib(available)} may be taken"
    return Grant(ceiling, with_it, copies(ceiling), why, note)


class MemoryDoesNotFit(RuntimeError):
    """Frames and logs need more host memory than there is; one line with what to change."""


def refusal(claims: Mapping[int, Claim], available: int, copies: int = 0) -> str | None:
    """Why the claims of a node's ranks do not fit, in one line with what to change, or None.

    Args:
        claims: by global rank, of all ranks of the node.
        available: bytes.
        copies: bytes of what is held for other nodes.
    """
    total = sum(claim.need.total for claim in claims.values()) + copies
    if total <= available:
        return None
    if copies:
        return (
            f"frames, logs and {mib(copies)} of copies for other nodes need {mib(total)} of host"
            f" memory and {mib(available)} may be taken: lower --moetion-replicas (without copies"
            f" {mib(total - copies)}), or raise --moetion-memory if there is more"
        )
    windows = set.intersection(*(set(claim.others) for claim in claims.values()))
    by_window = {w: sum(claim.others[w] for claim in claims.values()) for w in windows}
    best = min(by_window, key=lambda w: (by_window[w], w), default=None)
    change = "raise --moetion-memory if there is more, or put fewer ranks on a node"
    if best is not None and by_window[best] <= available:
        change = f"--moetion-window {best} would need {mib(by_window[best])}"
    return (
        f"frames and logs need {mib(total)} of host memory and {mib(available)} may be taken:"
        f" {change}"
    )


def table(needs: Mapping[int, Need], available: int, copies: int = 0) -> str:
    """One line per rank, one for what is held for other nodes, and one for the node.

    Args:
        needs: by global rank.
        available: bytes.
        copies: bytes of what is held for other nodes.
    """
    names = ("start", "frames", "inbox", "spill", "replicas", "in all")
    head = f"{'host memory':<12} " + " ".join(f"{name:>10}" for name in names)
    ordered = [(f"rank {rank}", needs[rank]) for rank in sorted(needs)]
    values = {name: (n.start, n.frames, n.inbox, n.spill, 0) for name, n in ordered}
    if copies:
        values["for others"] = (0, 0, 0, 0, copies)
    rows = [_row(name, values[name]) for name in values]
    node = [sum(column) for column in zip(*values.values(), strict=True)]
    return "\n".join(
        [head, *rows, f"{_row('this node', node)} of {mib(available)} that may be taken"]
    )


def _row(name: str, values: Sequence[int]) -> str:
    return f"{name:<12} " + " ".join(f"{mib(value):>10}" for value in [*values, sum(values)])


def mib(nbytes: float) -> str:
    """Bytes for people: a small model's are fractions."""
    size = nbytes / 2**20
    return f"{size:.0f} MiB" if size >= 1 or not size else f"{size:.2f} MiB"


def free_bytes(root: Path = Path("/")) -> int:
    """Memory that may still be taken: what the kernel calls available, and what the cgroup leaves.

    Args:
        root: of the file system, for tests.
    """
    meminfo = (root / "proc/meminfo").read_text().splitlines()
    (available,) = (int(line.split()[1]) for line in meminfo if line.startswith("MemAvailable:"))
    return min([available * 1024, *_left_in_cgroups(root)])


def _left_in_cgroups(root: Path) -> list[int]:
    left = []
    for folder, limit_name, use_name in _CGROUP_FILES:
        limit, use = root / folder / limit_name, root / folder / use_name
        if not (limit.is_file() and use.is_file()):
            continue
        text = limit.read_text().strip()
        if text.isdecimal():
            # The page cache of files counts as used, and gives way.
            cache = _statistic(root / folder / "memory.stat", ("inactive_file", "active_file"))
            left.append(int(text) - int(use.read_text()) + cache)
    return left


def _statistic(path: Path, names: Sequence[str]) -> int:
    if not path.is_file():
        return 0
    fields = [line.split() for line in path.read_text().splitlines()]
    return sum(int(value) for name, value in fields if name in names)
