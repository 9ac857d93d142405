"""In-place regroup: every process group is destroyed and made again under a new epoch, and whoever
holds an old one holds its successor.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from megatron_moetion.recovery.abort import NO_PORT, Sockets, abort, cut, open_sockets
from megatron_moetion.recovery.references import swap_references
from megatron_moetion.recovery.waiting import Wait, Waits

Group = Any
"""A torch ProcessGroup, or the non-member marker that `new_group` returns to ranks outside the
group.
"""


@dataclass(frozen=True)
class Recipe:
    """How a group was made, so that it can be made again; recipes keep creation order."""

    ranks: tuple[int, ...] | None
    options: Mapping[str, Any]


def _make_again(recipe: Recipe) -> Group:
    ranks = None if recipe.ranks is None else list(recipe.ranks)
    return dist.new_group(ranks=ranks, **recipe.options)


@dataclass(frozen=True)
class Made:
    """A group that this process is a member of, as long as it is not destroyed."""

    group: Group
    members: tuple[int, ...]
    sockets: Sockets


class GroupRecorder:
    """Remembers every process group in creation order.

    Creation order is the same on every rank (a rule of torch.distributed), so a group's position in
    it names the group across ranks: `name(group)`.
    """

    def __init__(self) -> None:
        self._recipes: list[Recipe] = []
        self._world: Group | None = None
        self._groups: list[Group] = []
        self._stale: dict[int, tuple[Group, str]] = {}
        self._namespaces: dict[int, dict[str, Any]] = {}
        # Read by the thread that aborts while the training thread makes and destroys groups, when
        # torch's own tables are in between.
        self._made: dict[int, Made] = {}
        self._before: Sockets | None = None
        self._store_sockets: Sockets = frozenset()
        self.waits = Waits()
        self.rebuilding = False

    def make(self, maker: Callable[[], Group]) -> Group:
        """Makes a group, or the world (`maker` returns None), and notes its connections for
        `abort`.
        """
        self._before = before = open_sockets()
        try:
            group = maker()
        finally:
            # A thread that was left alone ends while another one makes groups.
            if self._before is before:
                self._before = None
        known = dist.group.WORLD if group is None else group
        if group is None and self._world is None:
            self._world = known
        if isinstance(known, dist.ProcessGroup):
            members = tuple(dist.get_process_group_ranks(known))
            self._made[id(known)] = Made(known, members, open_sockets() - before)
        return group

    def record(self, group: Group, ranks: list[int] | None, options: Mapping[str, Any]) -> None:
        """Called after `new_group` returned `group`."""
        self._recipes.append(Recipe(None if ranks is None else tuple(ranks), dict(options)))
        self._groups.append(group)
        # Who makes a group keeps it in its module, too.
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            self._namespaces[id(frame.f_globals)] = frame.f_globals
            frame = frame.f_back

    def abort(
        self,
        epoch: int,
        spared_port: int,
        crosses: Callable[[tuple[int, ...]], bool] | None = None,
    ) -> None:
        """Wakes everybody who waits in a group, here and on its other members; any thread may call
        it.

        Args:
            epoch: of the failure; groups of this epoch are left alone.
            spared_port: the job's store listens there.
            crosses: whether a group of these members crosses stages; with it, only those groups are
                aborted.
        """
        for made in list(self._made.values()):
            if crosses is None or crosses(made.members):
                abort(made.group, made.sockets, spared_port)
        self.waits.call_off(epoch, Wait.CROSSING, *([] if crosses else [Wait.INSIDE]))

    def cancel(self, epoch: int) -> None:
        """Has a `rebuild` of an earlier epoch raise; any thread may call it."""
        self.waits.call_off(epoch, Wait.MAKING)
        before = self._before
        if self.rebuilding and before is not None:
            # With its store gone, nothing more can be agreed on under the earlier epoch.
            cut(self._store_sockets | (open_sockets() - before), NO_PORT)

    def name(self, group: Group | None) -> str:
        """`world`, or `g<position>`; stable over epochs.

        Raises:
            KeyError: for a group that was not made through the recorded function.
        """
        if group is None or group is dist.group.WORLD or group is self._world:
            return "world"
        if id(group) in self._stale:
            return self._stale[id(group)][1]
        for position, known in enumerate(self._groups):
            if known is group:
                return f"g{position}"
        raise KeyError("a process group that was not created by torch.distributed.new_group")

    def forget_stale(self) -> None:
        """No paused call is left that could hold a group of an earlier epoch: let them end.

        A gloo group that is only cut keeps its threads, and they keep polling dead connections. But
        its end waits for its collectives, and one that was dropped may sleep until the group's
        timeout (see `Waits.settle`). So each group ends in a thread of its own.
        """
        while self._stale:
            held = [self._stale.popitem()]
            self.waits.aside(held.clear)

    def described(self, description: str) -> list[tuple[int, ...]]:
        """Members of all groups that were made with this `group_desc`, in creation order."""
        return [r.ranks or () for r in self._recipes if r.options.get("group_desc") == description]

    def current(self, group: Group | None) -> Group | None:
        """Translates a group of an earlier epoch, still held by a paused call, to its successor."""
        if group is None or id(group) not in self._stale:
            return group
        name = self._stale[id(group)][1]
        return dist.group.WORLD if name == "world" else self._groups[int(name[1:])]

    def rebuild(
        self, epoch: int, connect: Callable[[], None], init_world: Callable[[], None]
    ) -> int:
        """Destroys all groups, makes them again, swaps references. Collective over the whole job.

        When it raises, as another peer was lost, it can be called again under the next epoch.

        Args:
            epoch: the new generation of the groups.
            connect: opens a new connection to the job's store.
            init_world: initialises torch.distributed over it.

        Returns:
            The number of references that were swapped.

        Raises:
            Interrupted: `cancel` was called with a later epoch.
        """
        old = [self._world, *self._groups]
        named = [(g, self.name(g)) for g in old if isinstance(g, dist.ProcessGroup)]
        self._stale |= {id(g): (g, name) for g, name in named}
        self.rebuilding = True
        self.waits.renew(epoch)
        self._made.clear()
        if dist.is_initialized():
            dist.destroy_process_group()
        # Groups meet in the store by their number. A world that was given up leaves its own behind,
        # and the peers' numbers would be others.
        distributed_c10d._world.group_count = 0
        before = open_sockets()
        connect()
        self._store_sockets = open_sockets() - before
        with self.waits.of(Wait.MAKING):
            self._make_aside(init_world)
            fresh = [self._make_aside(partial(_make_again, recipe)) for recipe in self._recipes]
        self.waits.settle()
        self.rebuilding = False
        self._world, self._groups = dist.group.WORLD, fresh
        pairs = {
            id(o): (o, n)
            for o, n in zip(old, [self._world, *fresh], strict=True)
            if isinstance(o, dist.ProcessGroup)
        }
        keep = [old, named, self._stale, *self._stale.values(), *named]
        return swap_references(pairs, keep, self._namespaces.values())

    def _make_aside(self, maker: Callable[[], Group]) -> Group:
        """Makes a group in a thread that can be left alone.

        Gloo waits for a connection that a dead peer was to open, and nothing but its timeout ends
        that wait. Such a thread never gets to where torch would note its group.
        """
        return self.waits.run(lambda: self.make(maker))
