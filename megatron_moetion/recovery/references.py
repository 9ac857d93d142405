"""References to objects, wherever a program keeps them, are swapped for references to others.

The heap of a worker is mostly what it has imported, and a pass over that takes half a second. An
agent's warm process freezes it before it forks (`agent/spare.py`). So first the rest is passed, and
the collector's own knowledge says whether that was enough: what the holders found refer to, added
up, is what the objects' reference counts have to be. If one is higher, everything is passed.
"""

from __future__ import annotations

import gc
import sys
import types
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

_SLOT = types.MemberDescriptorType

_HAS_INSTANCE_DICT = 1 << 4
"""Py_TPFLAGS_MANAGED_DICT: instances of ordinary Python classes."""

Pairs = dict[int, tuple[Any, Any]]
"""By `id(old)`: (old, new)."""


def swap_references(
    pairs: Pairs, keep: Sequence[Any] = (), namespaces: Iterable[dict[str, Any]] = ()
) -> int:
    """Replaces objects in all dicts, lists, sets, cells and attributes of the heap.

    Args:
        pairs: by `id(old)`: (old, new).
        keep: holders that go on referring to the old objects.
        namespaces: of modules that may hold some, as these may be frozen.

    Returns:
        The number of references swapped. Tuples and frames are left alone: they belong to calls
        under way, whose groups are translated when used (`GroupRecorder.current`).
    """
    own = {id(pairs): pairs, id(keep): keep}
    own |= {id(each): each for each in (*pairs.values(), *keep)}
    found = _holders(pairs)
    found |= {
        id(n): n for n in namespaces if not pairs.keys().isdisjoint(map(id, gc.get_referents(n)))
    }
    if gc.get_freeze_count() and not _all_found(pairs, {**own, **found}.values()):
        # It stays so: whoever hid one reference there may hide the next.
        gc.unfreeze()
        found = _holders(pairs)
    return sum(_swap_in(holder, pairs) for key, holder in found.items() if key not in own)


def _holders(pairs: Pairs) -> dict[int, Any]:
    """By id: what refers to one of the old objects and is not frozen."""
    # One pass in C for all; a pass for each, or a loop in Python, takes seconds.
    holders = gc.get_referrers(*(old for old, _ in pairs.values()))
    return {id(holder): holder for holder in (*holders, *_untracked_holders(pairs.keys()))}


def _all_found(pairs: Pairs, holders: Iterable[Any]) -> bool:
    """Whether nobody but these refers to any of the old objects."""
    seen = Counter(id(r) for holder in holders for r in gc.get_referents(holder) if id(r) in pairs)
    # How many of them are the call's own depends on the interpreter.
    own = _count((object(), None)) - 1
    return all(_count(pair) - own == seen[key] for key, pair in pairs.items())


def _count(pair: tuple[Any, Any]) -> int:
    """References to the first, with that of the pair and of this call."""
    return sys.getrefcount(pair[0])


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


def _swap_in(holder: Any, pairs: Pairs) -> int:
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


def _swap_attributes(holder: Any, attributes: Mapping[str, Any], pairs: Pairs) -> int:
    hits = [(k, v) for k, v in attributes.items() if id(v) in pairs]
    for name, value in hits:
        put = type.__setattr__ if issubclass(type(holder), type) else object.__setattr__
        put(holder, name, pairs[id(value)][1])
    return len(hits)
