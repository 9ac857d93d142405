"""The interception core: patches as rows, verified together, applied together, undone exactly.

A `Patch` names one attribute of the host and what to put around or in place of it. `verify_all`
looks at every row without touching anything; `apply` refuses unless all rows fit, and returns the
one way back. Nothing here knows the host, and nothing here imports torch. Import hooks, which say
*when* rows are applied, are in `arming`.
"""

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

from megatron_moetion.fingerprint import function_of, signature_of, source_digest

How = Literal["around", "replace", "value"]
Severity = Literal["error", "warning"]


class InterceptionError(RuntimeError):
    """A row does not fit the host, or a patched attribute is no longer ours."""


@dataclass(frozen=True)
class Patch:
    """One row: one attribute of the host and what becomes of it.

    Attributes:
        target: ``"package.module:name"`` or ``"package.module:Class.name"``. A method is named on
            the class that defines it, never on one that inherits it.
        how: ``around`` calls ``handler(host_callable, *args, **kwargs)`` in place of the host's;
            ``replace`` puts ``handler`` itself there (same parameters); ``value`` puts a value.
        handler: the callable, or the value.
        signature: what `signature_of` gave for the host's attribute when the row was written;
            a difference is an error. Empty where the host's callable has none.
        stage: the part of the product that needs the row, for the ledger.
        why: why it is needed; for ``replace`` also why nothing milder works.
        retire_when: what ends the need.
        digest: `source_digest` values the row was checked against, joined by ``|``; a difference
            is a warning. Empty where there is no source.
        group: rows are switched on by group.
        also: further ``"module:name"`` places that bind the same object by a from-import. With a
            ``?`` at the end the place is patched only where its module is loaded and binds it;
            with a ``!`` it is known and left alone on purpose.
    """

    target: str
    how: How
    handler: Any
    signature: str
    stage: str
    why: str
    retire_when: str
    digest: str = ""
    group: str = "moetion"
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class Problem:
    """Something about a row that does not fit the host it was checked against."""

    target: str
    severity: Severity
    text: str

    def __str__(self) -> str:
        return f"{self.target}: {self.text}"


@dataclass(frozen=True)
class _Place:
    """One binding: ``vars(owner)[name]``."""

    owner: Any
    name: str
    label: str

    def read(self) -> Any:
        return vars(self.owner)[self.name]


def locate(target: str) -> Any:
    """Returns what ``target`` stores: a function, static or class method, or a value.

    Raises:
        InterceptionError: the module, a class on the way, or the attribute is missing.
    """
    return _place(target).read()


def verify_all(rows: Iterable[Patch], sweep: Sequence[str] = ()) -> list[Problem]:
    """Checks every row against the host and changes nothing.

    Args:
        rows: the rows to check; rows on the same target are allowed unless one is no ``around``.
        sweep: top-level packages (or ``__main__``) whose loaded modules are searched for
            from-imports of a target that the row does not list.

    Returns:
        Problems in row order; empty when everything fits.
    """
    rows = tuple(rows)
    problems = _conflicts(rows)
    bindings = _bindings(sweep)
    for row in rows:
        problems += _verify(row, bindings)
    return problems


def apply(rows: Iterable[Patch], sweep: Sequence[str] = ()) -> Callable[[], None]:
    """Verifies all rows, then applies all of them in order.

    Returns:
        ``undo``, which puts the very objects back. It first looks at every place and refuses,
        touching nothing, when one is no longer ours; after it has run it does nothing more.

    Raises:
        InterceptionError: a row does not fit (nothing was touched), or setting an attribute
            failed half-way (what had been set was put back, in reverse).
    """
    rows = tuple(rows)
    errors = [problem for problem in verify_all(rows, sweep) if problem.severity == "error"]
    if errors:
        raise InterceptionError("; ".join(str(problem) for problem in errors))
    done: list[tuple[_Place, Any, Any]] = []
    try:
        for row in rows:
            _apply_row(row, done)
    except BaseException:
        _put_back(done)
        raise
    return functools.partial(_undo, done)


def _place(target: str) -> _Place:
    module_name, _, path = target.partition(":")
    if not module_name or not path:
        raise InterceptionError(f"{target}: write it as 'package.module:name'")
    try:
        owner: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise InterceptionError(f"{target}: no module {error.name}") from error
    *outer, name = path.split(".")
    for part in outer:
        if part not in vars(owner):
            raise InterceptionError(f"{target}: {_name(owner)} has no {part}")
        owner = vars(owner)[part]
    if name in vars(owner):
        return _Place(owner, name, target)
    for base in inspect.getmro(owner)[1:] if inspect.isclass(owner) else ():
        if name in vars(base):
            where = f"{base.__module__}:{base.__qualname__}.{name}"
            raise InterceptionError(f"{target}: inherited; the row has to name {where}")
    raise InterceptionError(f"{target}: {_name(owner)} has no {name}")


def _name(owner: Any) -> str:
    return str(getattr(owner, "__qualname__", None) or getattr(owner, "__name__", owner))


def _places(row: Patch) -> list[_Place]:
    """The target and every listed further binding; optional ones only where they bind it now."""
    first = _place(row.target)
    places = [first]
    for label in row.also:
        if label.endswith("!"):
            continue
        name = label.removesuffix("?")
        if name == label:
            places.append(_place(name))
            continue
        module_name, _, attribute = name.partition(":")
        module = sys.modules.get(module_name)
        if module is not None and vars(module).get(attribute) is first.read():
            places.append(_Place(module, attribute, name))
    return places


def _conflicts(rows: tuple[Patch, ...]) -> list[Problem]:
    problems = []
    seen: dict[str, Patch] = {}
    for row in rows:
        other = seen.setdefault(row.target, row)
        if other is not row and (row.how != "around" or other.how != "around"):
            text = f"two rows ({other.how}, {row.how}) claim it; only 'around' rows can share"
            problems.append(Problem(row.target, "error", text))
    return problems


def _verify(row: Patch, bindings: dict[int, list[str]]) -> list[Problem]:
    try:
        places = _places(row)
    except InterceptionError as error:
        text = str(error).removeprefix(f"{row.target}: ")
        return [Problem(row.target, "error", text)]
    host = places[0].read()
    problems = [
        Problem(row.target, "error", f"{place.label} binds another object")
        for place in places[1:]
        if place.read() is not host
    ]
    problems += _verify_shape(row, host)
    listed = {row.target, *(label.rstrip("?!") for label in row.also)}
    for label in bindings.get(id(host), ()):
        if label not in listed:
            severity: Severity = "warning" if label.startswith("__main__:") else "error"
            text = f"also bound at {label}, which the row does not list"
            problems.append(Problem(row.target, severity, text))
    return problems


def _verify_shape(row: Patch, host: Any) -> list[Problem]:
    problems = []
    if row.how != "value" and not callable(function_of(host)):
        return [Problem(row.target, "error", f"is a {type(host).__name__}, not a callable")]
    found = signature_of(host)
    if found != row.signature:
        text = f"signature drift: the row expects {row.signature}, the host has {found}"
        problems.append(Problem(row.target, "error", text))
    if row.how == "replace" and signature_of(row.handler) != row.signature:
        text = f"the replacement has {signature_of(row.handler)}, the row says {row.signature}"
        problems.append(Problem(row.target, "error", text))
    digest = source_digest(host)
    if row.digest and digest not in row.digest.split("|"):
        text = f"source drift: the row was checked against {row.digest}, the host has {digest}"
        problems.append(Problem(row.target, "warning", text))
    return problems


def _bindings(sweep: Sequence[str]) -> dict[int, list[str]]:
    """Where loaded modules of the swept packages bind functions and classes, by object id."""
    found: dict[int, list[str]] = {}
    if not sweep:
        return found
    for name, module in tuple(sys.modules.items()):
        if name.partition(".")[0] in sweep and isinstance(module, ModuleType):
            for attribute, value in tuple(vars(module).items()):
                if callable(value):
                    found.setdefault(id(value), []).append(f"{name}:{attribute}")
    return found


def _around(host: Any, handler: Callable[..., Any]) -> Any:
    """Wraps ``host`` as it is stored, so that a static or class method stays one."""
    function = function_of(host)

    @functools.wraps(function)
    def intercepted(*args: Any, **kwargs: Any) -> Any:
        return handler(function, *args, **kwargs)

    return type(host)(intercepted) if isinstance(host, staticmethod | classmethod) else intercepted


def _apply_row(row: Patch, done: list[tuple[_Place, Any, Any]]) -> None:
    places = _places(row)
    host = places[0].read()
    if row.how == "around":
        ours = _around(host, row.handler)
    elif isinstance(host, staticmethod | classmethod) and row.how == "replace":
        ours = type(host)(row.handler)
    else:
        ours = row.handler
    for place in places:
        setattr(place.owner, place.name, ours)
        done.append((place, host, ours))


def _undo(done: list[tuple[_Place, Any, Any]]) -> None:
    # Rows may be stacked on one place: only the topmost of ours has to be there now.
    topmost = {(id(place.owner), place.name): (place, ours) for place, _, ours in done}
    lost = [place.label for place, ours in topmost.values() if place.read() is not ours]
    if lost:
        raise InterceptionError(
            f"cannot undo {', '.join(lost)}: patched again by somebody else; undo that first"
        )
    _put_back(done)


def _put_back(done: list[tuple[_Place, Any, Any]]) -> None:
    while done:
        place, host, _ = done.pop()
        setattr(place.owner, place.name, host)
