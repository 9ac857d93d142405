"""What crosses the edges of a stage that is rebuilt, where it was lost with its node.

Stages of which each lost what the other needs are rebuilt together. The log is what connects them:
each logs what it sends in its replay, and the other reads it from there. So a send waits for
nobody, and any schedule that training gets through a replay gets through, too.

Source: design section 7 (adjacent failed stages whose logs died replay jointly).
"""

from __future__ import annotations

from collections.abc import Callable

from torch.distributed import Store  # type: ignore[attr-defined]  # not in its stubs

from megatron_moetion.inbox.key import BoundaryKey
from megatron_moetion.recovery.plan import Plan
from megatron_moetion.recovery.waiting import Wait, Waits
from megatron_moetion.topology import Topology
from megatron_moetion.vault import Vault


class Remade:
    """See `inbox.tap.Edges`.

    Args:
        plan: of this rebuild.
        topology: of this rank.
        vault: this rank's.
        store: of this epoch; ranks tell each other there what they have logged.
        waits: calls a wait off when a peer is lost.
    """

    def __init__(
        self, plan: Plan, topology: Topology, vault: Vault, store: Store, waits: Waits
    ) -> None:
        self._topology, self._vault = topology, vault
        self._store, self._waits = store, waits
        listed = vault.inventory(topology.global_rank, "boundary/")
        self._logged = frozenset(entry.key for entry in listed)
        self._stages = {stage.pp_rank for stage in plan.stages}

    def logged(self, key: BoundaryKey) -> bool:
        return str(key) in self._logged

    def tell(self, key: BoundaryKey) -> None:
        if len(self._stages) > 1:
            # The news must not overtake the entry.
            self._vault.confirm()
            self._store.set(self._name(self._topology.global_rank, key), "")

    def wait(self, sender: int, key: BoundaryKey) -> bool:
        if self._topology.pp_ranks[sender] not in self._stages:
            return False
        there: Callable[[], None] = lambda: self._store.wait([self._name(sender, key)])  # noqa: E731
        with self._waits.of(Wait.CROSSING):
            self._waits.run(there)
        return True

    @staticmethod
    def _name(sender: int, key: BoundaryKey) -> str:
        return f"{sender}/{key}"
