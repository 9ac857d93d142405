"""One of two gloo ranks; `test_regroup.py` and `test_abort.py` read what it prints.

Usage: regroup_cases.py GLOBAL_RANK STORE_PORT. Prints one JSON object: {case: outcome}.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
import time
import traceback
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # as in job.py

from megatron_moetion.holdings import holdings
from megatron_moetion.recovery.abort import NO_PORT
from megatron_moetion.recovery.failure import is_communication_error
from megatron_moetion.recovery.regroup import GroupRecorder
from megatron_moetion.recovery.waiting import ASIDE

WORLD_SIZE = 2
PATIENCE_SECONDS = 20
"""For a thread that is about to end; one that leaks does not."""


class Holder:
    """Refers to a group from an attribute, a container and a closure, as training programs do."""

    def __init__(self, group: Any) -> None:
        self.attribute = group
        self.untracked = {"group": group}
        self.by_key = {group: "members"}
        self.mixed = {"first": group, "second": 2}
        self.listed = [group, None]
        self.several = {group}
        self.closure = lambda: group

    def groups(self) -> dict[str, Any]:
        """Every reference, by how it is held."""
        return {
            "attribute": self.attribute,
            "untracked dict": self.untracked["group"],
            "dict key": next(iter(self.by_key)),
            "dict value": self.mixed["first"],
            "list": self.listed[0],
            "set": next(iter(self.several)),
            "cell": self.closure(),
        }


class Slotted:
    """Refers to a group from a slot."""

    __slots__ = ("group",)

    def __init__(self, group: Any) -> None:
        self.group = group


class Rank:
    """This process's groups over several epochs."""

    def __init__(self, global_rank: int, store_port: int) -> None:
        self.global_rank, self.epoch = global_rank, 0
        self.store_port = store_port
        self.connect()
        self.store = self.epoch_store
        self.recorder = GroupRecorder()
        self.recorder.make(lambda: self.init_world(0))
        self.pair, self.alone = self.new_group([0, 1]), self.new_group([0])
        self.holder, self.slotted = Holder(self.pair), Slotted(self.pair)

    def connect(self) -> None:
        limit = timedelta(seconds=60)
        self.epoch_store = TCPStore("127.0.0.1", self.store_port, is_master=False, timeout=limit)

    def init_world(self, epoch: int) -> None:
        dist.init_process_group(
            "gloo",
            store=PrefixStore(f"epoch/{epoch}", self.epoch_store),
            rank=self.global_rank,
            world_size=WORLD_SIZE,
            timeout=timedelta(seconds=60),
        )

    def new_group(self, ranks: list[int]) -> Any:
        group = self.recorder.make(lambda: dist.new_group(ranks))
        self.recorder.record(group, ranks, {})
        return group

    def total(self, group: Any) -> float:
        tensor = torch.tensor([self.global_rank + 1.0])
        dist.all_reduce(tensor, group=group)
        return float(tensor)

    def holds(self, num_threads: int = 0) -> dict[str, int]:
        """What there is between two recoveries; nothing waits for the collector to be let go.

        Args:
            num_threads: are waited for to be left: the system ends a thread a moment after Python.
        """
        self.recorder.forget_stale()
        for thread in threading.enumerate():
            if thread.name == ASIDE:
                thread.join()
        assert self.recorder.waits.all_ended()
        latest = time.monotonic() + PATIENCE_SECONDS
        while num_threads and holdings()["threads"] > num_threads and time.monotonic() < latest:
            os.sched_yield()
        return {name: n for name, n in holdings().items() if name != "resident_bytes"}

    def abort_wakes(self, group: Any) -> str:
        """Aborts while a thread of this rank waits in a receive that nobody answers."""
        caught: list[BaseException] = []
        posted = f"posted/{self.recorder.name(group)}/{self.epoch}"

        def receive() -> None:
            try:
                work = dist.irecv(torch.zeros(1), src=1 - self.global_rank, group=group)
                assert work is not None
                self.store.add(posted, 1)
                work.wait()
            except RuntimeError as error:
                caught.append(error)

        thread = threading.Thread(target=receive, daemon=True)
        thread.start()
        if self.global_rank == 0:
            # The other rank does nothing: it must be woken from here, once it waits.
            while self.store.add(posted, 0) < WORLD_SIZE:
                os.sched_yield()
            members = tuple(dist.get_process_group_ranks(group))
            self.recorder.abort(self.epoch + 1, NO_PORT, lambda which: which == members)
        thread.join(30)
        if not caught:
            return "still waiting" if thread.is_alive() else "returned"
        return "woken" if is_communication_error(caught[0]) else f"unknown: {caught[0]}"

    def give_up(self, epoch: int) -> str:
        """Begins a rebuild that the other rank never joins, and aborts it from another thread."""
        if self.global_rank == 1:
            self.store.wait(["given up"])
            return "woken"
        begun = threading.Event()

        def init_world() -> None:
            begun.set()
            self.init_world(epoch)

        def cancel() -> None:
            begun.wait()
            self.recorder.cancel(epoch + 1)

        cancelling = threading.Thread(target=cancel)
        cancelling.start()
        try:
            self.recorder.rebuild(epoch, self.connect, init_world)
        except (RuntimeError, dist.DistError) as error:
            return "woken" if is_communication_error(error) else f"unknown: {error!r}"
        else:
            return "made without its peer"
        finally:
            cancelling.join()
            self.store.set("given up", "")

    def regroup(self, epoch: int) -> dict[str, Any]:
        """Destroys and makes everything again; says what each reference became."""
        old, self.epoch = self.pair, epoch
        names = [self.recorder.name(g) for g in (None, old, self.alone)]
        swapped = self.recorder.rebuild(epoch, self.connect, lambda: self.init_world(epoch))
        new = self.recorder.current(old)
        return {
            "swapped": swapped > 0,
            "new is old": new is old,
            "names": names == [self.recorder.name(g) for g in (None, self.pair, self.alone)],
            "old name": self.recorder.name(old) if old is not self.pair else "swapped",
            "holders": {
                k: g is new for k, g in {**self.holder.groups(), "self": self.pair}.items()
            },
            "slot": self.slotted.group is new,
            "mixed order": list(self.holder.mixed),
            "totals": [self.total(g) for g in (None, *self.holder.groups().values())],
            "members": [len(made.members) for made in self.recorder._made.values()],
        }


def main(global_rank: int, store_port: int) -> dict[str, Any]:
    """Plays all cases in order; both ranks do the same."""
    rank = Rank(global_rank, store_port)
    before = [rank.total(None), rank.total(rank.pair)]
    wakes = [rank.abort_wakes(rank.pair)]
    first = rank.regroup(1)
    wakes.append(rank.abort_wakes(rank.pair))
    rank.regroup(2)
    # What only the collector would let go stays until its next full run, which may be hours away.
    gc.disable()
    rank.regroup(3)
    rank.holds()
    gc.collect()
    held = [rank.holds()]
    wakes.append(rank.give_up(4))
    second = rank.regroup(5)
    held.append(rank.holds(held[0]["threads"]))
    dist.destroy_process_group()
    return {"before": before, "wakes": wakes, "first": first, "second": second, "held": held}


if __name__ == "__main__":
    try:
        print(json.dumps(main(int(sys.argv[1]), int(sys.argv[2]))), flush=True)
        # A thread that was left alone in gloo would crash the interpreter's own end.
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        raise
