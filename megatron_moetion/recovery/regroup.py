"""In-place regroup: every process group is destroyed and made again under a new epoch.

References to the old groups, wherever the host keeps them, are swapped for the new ones in one pass
over the heap (one `gc.get_referrers` per group took seconds).
"""

from __future__ import annotations

import gc
import types
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from megatron_moetion.recovery.abort import NO_PORT, Sockets, abort, cut, open_sockets
from megatron_moetion.recovery.waiting import Wait, Waits

_SLOT = types.MemberDescriptorType

Group = Any
"""A torch ProcessGroup, or the non-member marker that `new_group` returns to ranks outside the
group.
"""


_HAS_INSTANCE_DICT = 1 << 4
"""Py_TPFLAGS_MANAGED_DICT: instances of ordinary Python classes."""


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
        return swap_references(pairs, keep)

    def _make_aside(self, maker: Callable[[], Group]) -> Group:
        """Makes a group in a thread that can be left alone.

        Gloo waits for a connection that a dead peer was to open, and nothing but its timeout ends
        that wait. Such a thread never gets to where torch would note its group.
        """
        return self.waits.run(lambda: self.make(maker))


def swap_references(pairs: dict[int, tuple[Group, Group]], keep: Sequence[Any] = ()) -> int:
    """Replaces objects in all dicts, lists, sets, cells and attributes of the heap; one pass.

    Args:
        pairs: by `id(old)`: (old, new).
        keep: holders that go on referring to the old groups.

    Returns:
        The number of references swapped. Tuples and frames are left alone: they belong to calls
        under way, whose groups are translated when used (`GroupRecorder.current`).
    """
    own = {id(pairs), id(keep)} | {id(p) for p in pairs.values()} | {id(k) for k in keep}
    # One pass in C for all groups; a pass for each, or a loop in Python, takes seconds.
    holders = gc.get_referrers(*(old for old, _ in pairs.values()))
    holders += _untracked_holders(pairs.keys())
    return sum(_swap_in(holder, pairs) for holder in holders if id(holder) not in own)


def _untracked_holders(wanted: Set[int]) -> list[dict[Any, Any]]:
    """Dicts that the collector does not list: it tracks none without trackable values, and groups
    are no such.

    They hang off instances, dicts and lists, which it does list.
    """
    found: dict[int, dict[Any, Any]] = {}
    for holder in gc.get_objects():
        kind = type(holder)
        if kind is not dict and kind is not list and not kind.__flags__ & _HAS_INSTANCE_DICT:
            continue
        referents = gc.get_referents(holder)
        if dict not in map(type, referents):
            continue
        dicts = [r for r in referents if type(r) is dict and not gc.is_tracked(r)]
        found |= {
            id(d): d for d in dicts if not wanted.isdisjoint(map(id, (*d.keys(), *d.values())))
        }
    return list(found.values())


def _swap_in(holder: Any, pairs: dict[int, tuple[Group, Group]]) -> int:
    def new(value: Any) -> Any:
        return pairs[id(value)][1] if id(value) in pairs else value

    if isinstance(holder, dict):
        owner = _class_of(holder)
        if owner is not None:
            return _swap_attributes(owner, vars(owner), pairs)
        hits = [k for k, v in holder.items() if id(k) in pairs or id(v) in pairs]
        for key in hits:
            if id(key) in pairs:
                holder[new(key)] = new(holder.pop(key))
            else:
                holder[key] = new(holder[key])
        return len(hits)
    if isinstance(holder, list):
        hits_at = [i for i, v in enumerate(holder) if id(v) in pairs]
        for index in hits_at:
            holder[index] = new(holder[index])
        return len(hits_at)
    if isinstance(holder, set):
        found = [v for v in holder if id(v) in pairs]
        for value in found:
            holder.remove(value)
            holder.add(new(value))
        return len(found)
    if isinstance(holder, types.CellType):
        holder.cell_contents = new(holder.cell_contents)
        return 1
    if isinstance(holder, tuple):
        # A tuple cannot be changed; those met are arguments of calls that are being unwound.
        return 0
    slots = {n for c in type(holder).__mro__ for n, d in vars(c).items() if type(d) is _SLOT}
    attributes = {n: getattr(holder, n, None) for n in slots} | getattr(holder, "__dict__", {})
    return _swap_attributes(holder, attributes, pairs)


def _class_of(namespace: dict[Any, Any]) -> type | None:
    """The class whose namespace this is: it must be told of changes, as it caches attributes."""
    if "__module__" not in namespace:
        return None
    return next((c for c in gc.get_referrers(namespace) if issubclass(type(c), type)), None)


def _swap_attributes(
    holder: Any, attributes: Mapping[str, Any], pairs: dict[int, tuple[Group, Group]]
) -> int:
    hits = [(k, v) for k, v in attributes.items() if id(v) in pairs]
    for name, value in hits:
        put = type.__setattr__ if issubclass(type(holder), type) else object.__setattr__
        put(holder, name, pairs[id(value)][1])
    return len(hits)
