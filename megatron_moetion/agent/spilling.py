"""The leader's decisions about spills, as a pure object: one at a time, the same on every node."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_moetion.vault.spill import Span


@dataclass(frozen=True)
class Spill:
    """Every node writes its part."""

    span: Span


@dataclass(frozen=True)
class Release:
    """Every rank lets go of a window that it kept."""

    span: Span


@dataclass(frozen=True)
class Settle:
    """The spill is valid everywhere, so older ones may go; or it is not, and its parts go."""

    span: Span
    valid: bool


@dataclass(frozen=True)
class Report:
    """For the timeline; with `warning` also for the user."""

    kind: str
    iteration: int
    detail: str
    warning: bool = False


Order = Spill | Release | Settle | Report


class Spilling:
    """Which window is being spilled.

    Each rank offers a window once it holds all of it, and keeps it until it is released. A window
    that not all ranks kept (one of them still keeps an earlier one) is not spilled.

    Args:
        ranks: all global ranks.
        num_nodes: of the job.
        spilled: iteration of the spill that the job started from, 0 if none.
    """

    def __init__(self, ranks: Iterable[int], num_nodes: int, spilled: int = 0) -> None:
        self._ranks = frozenset(ranks)
        self._num_nodes = num_nodes
        self._newest = spilled
        self._valid: int | None = None
        self._given_up = 0
        self._offered: Span | None = None
        self._offers: set[int] = set()
        self._writing: Span | None = None
        self._errors: dict[int, str] = {}
        self._warned = False

    @property
    def valid(self) -> int | None:
        """Iteration of the newest spill that this job has made, valid on every node."""
        return self._valid

    def offered(self, global_rank: int, span: Span, kept: bool) -> list[Order]:
        """A rank holds a window.

        Args:
            kept: it keeps this window; False when it still keeps an earlier one.
        """
        if span == self._writing:
            return []
        if not kept:
            return self._skip(span)
        if span.iteration <= max(self._newest, self._given_up):
            # A replacement says again what its predecessor said, or it comes too late.
            return [Release(span)]
        orders: list[Order] = []
        if span != self._offered:
            if self._offered is not None:
                self._given_up = self._offered.iteration
                orders.append(Release(self._offered))
            self._offered, self._offers = span, set()
        self._offers.add(global_rank)
        return orders + self._start()

    def written(self, node_rank: int, span: Span, error: str) -> list[Order]:
        """A node has written its part, or failed to; an empty error is success."""
        if span != self._writing:
            return []
        self._errors[node_rank] = error
        if len(self._errors) < self._num_nodes:
            return []
        failed = {node: text for node, text in self._errors.items() if text}
        self._writing, self._errors, self._newest = None, {}, span.iteration
        if failed:
            node = min(failed)
            report = self._problem("spill-failed", span, f"node {node}: {failed[node]}")
        else:
            report, self._warned = Report("spilled", span.iteration, ""), False
            self._valid = span.iteration
        return [report, Settle(span, valid=not failed), Release(span), *self._start()]

    def lost(self) -> list[Order]:
        """A node is lost, and what it would have written with it: what is under way is given up."""
        orders: list[Order] = []
        if self._offered is not None:
            self._given_up = self._offered.iteration
            orders.append(Release(self._offered))
            self._offered, self._offers = None, set()
        if self._writing is not None:
            span, self._writing, self._errors = self._writing, None, {}
            self._newest = span.iteration
            report = self._problem("spill-failed", span, "a node is lost")
            orders += [report, Settle(span, valid=False), Release(span)]
        return orders

    def _start(self) -> list[Order]:
        if self._writing is not None or self._offered is None or self._offers != self._ranks:
            return []
        self._writing, self._offered, self._offers = self._offered, None, set()
        return [Spill(self._writing)]

    def _problem(self, kind: str, span: Span, detail: str) -> Report:
        # A full disk stays full: recorded every time, said once until a spill succeeds.
        warning, self._warned = not self._warned, True
        return Report(kind, span.iteration, detail, warning)

    def _skip(self, span: Span) -> list[Order]:
        """A window that one rank does not keep is given up, and so is what is left of earlier
        ones.
        """
        if span.iteration <= self._given_up:
            return []
        orders: list[Order] = []
        if self._offered is not None:
            orders.append(Release(self._offered))
        self._given_up, self._offered, self._offers = span.iteration, None, set()
        if self._writing is not None:
            detail = f"that of iteration {self._writing.iteration} is still being written"
            orders.append(self._problem("spill-skipped", span, detail))
        return orders
