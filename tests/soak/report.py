"""What a soak prints at its end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from launch.bench.cuts import lost_iterations

from .inject import Outcome

HEAD = ("kind", "injected", "survived", "tier", "lost iterations", "to recover, median / worst")


def lost_by_epoch(told: Iterable[dict[str, Any]]) -> dict[int, int]:
    """Iterations that were run again by everybody, from the events of a run."""
    by_kind: dict[str, list[dict[str, Any]]] = {"planned": []}
    for event in told:
        by_kind.setdefault(event["kind"], []).append(event)
    # Where nobody lives, what is committed is known once the agents have said what they know.
    by_kind["planned"] += by_kind.get("gathered", [])
    return lost_iterations(by_kind)


def table(
    outcomes: Sequence[Outcome], not_survived: Sequence[str], lost: Mapping[int, int]
) -> list[str]:
    """One line for each kind that was injected.

    Args:
        not_survived: the kind of the failure that ended the job, if one did.
        lost: iterations by epoch.
    """
    rows = [HEAD]
    for kind in dict.fromkeys([*(o.failure.kind for o in outcomes), *not_survived]):
        these = [o for o in outcomes if o.failure.kind == kind]
        tiers = ", ".join(sorted({o.tier for o in these}))
        spans = [range(o.epochs[0], o.epochs[1] + 1) for o in these]
        gone = sum(lost.get(epoch, 0) for span in spans for epoch in span)
        ms = [o.ms for o in these]
        times = f"{median(ms):.0f} / {max(ms):.0f} ms" if ms else ""
        injected = len(these) + list(not_survived).count(kind)
        rows.append((kind, str(injected), str(len(these)), tiers, str(gone), times))
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
    cells = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return ["  ".join(row).rstrip() for row in cells]
