"""The interception core on made-up modules."""

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest

from megatron_moetion.fingerprint import signature_of, source_digest
from megatron_moetion.interception import (
    InterceptionError,
    Patch,
    apply,
    locate,
    verify_all,
)

SOURCE = """
from functools import wraps

def double(x, times=2):
    return x * times

class Base:
    def inherited(self):
        return "base"

class Thing(Base):
    def method(self, a, *, b=1):
        return ("method", a, b)

    @staticmethod
    def still(a):
        return ("static", a)

    @classmethod
    def kind(cls, a):
        return (cls.__name__, a)

    class Inner:
        def deep(self):
            return "deep"

LIMIT = 3
"""


def _module(name: str, source: str) -> ModuleType:
    module = ModuleType(name)
    sys.modules[name] = module
    exec(compile(source, f"<{name}>", "exec"), vars(module))
    return module


@pytest.fixture
def host() -> Iterator[ModuleType]:
    module = _module("fakehost", SOURCE)
    _module("fakehost.user", "from fakehost import double\n")
    yield module
    del sys.modules["fakehost"], sys.modules["fakehost.user"]


def _row(name: str, handler: Any = None, how: Any = "around", **more: Any) -> Patch:
    target = name if ":" in name else f"fakehost:{name}"
    more.setdefault("signature", _signature(target))
    return Patch(
        target, how, handler or _tagged, stage="test", why="test", retire_when="never", **more
    )


def _signature(target: str) -> str:
    try:
        return signature_of(locate(target))
    except InterceptionError:
        return "()"


def _tagged(host: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return ("ours", host(*args, **kwargs))


def _errors(*rows: Patch, sweep: tuple[str, ...] = ()) -> list[str]:
    return [str(problem) for problem in verify_all(rows, sweep) if problem.severity == "error"]


def test_around_gets_the_host_and_its_arguments(host: ModuleType) -> None:
    undo = apply([_row("double")])
    assert host.double(4, times=3) == ("ours", 12)
    assert inspect.signature(host.double) == inspect.signature(host.double.__wrapped__)
    undo()
    assert host.double(4) == 8


@pytest.mark.parametrize(
    ("name", "call", "result"),
    [
        ("Thing.method", lambda m: m.Thing().method(5, b=2), ("method", 5, 2)),
        ("Thing.still", lambda m: m.Thing.still(5), ("static", 5)),
        ("Thing.still", lambda m: m.Thing().still(5), ("static", 5)),
        ("Thing.kind", lambda m: m.Thing.kind(5), ("Thing", 5)),
        ("Thing.Inner.deep", lambda m: m.Thing.Inner().deep(), "deep"),
    ],
)
def test_every_kind_of_method_is_wrapped_and_put_back(
    host: ModuleType, name: str, call: Callable[[Any], Any], result: Any
) -> None:
    before = locate(f"fakehost:{name}")
    undo = apply([_row(name)])
    assert type(locate(f"fakehost:{name}")) is type(before)
    assert call(host) == ("ours", result)
    undo()
    assert locate(f"fakehost:{name}") is before
    assert call(host) == result


def test_from_imports_listed_in_also_are_patched_and_put_back(host: ModuleType) -> None:
    user = sys.modules["fakehost.user"]
    before = host.double
    row = _row("double", also=("fakehost.user:double", "not.loaded:double?", "fakehost:LIMIT?"))
    undo = apply([row], sweep=("fakehost",))
    assert user.double is host.double is not before
    undo()
    assert user.double is host.double is before
    assert host.LIMIT == 3


def test_a_from_import_that_no_row_lists_is_an_error(host: ModuleType) -> None:
    assert _errors(_row("double"), sweep=("fakehost",)) == [
        "fakehost:double: also bound at fakehost.user:double, which the row does not list"
    ]
    assert not _errors(_row("double", also=("fakehost.user:double!",)), sweep=("fakehost",))
    undo = apply([_row("double", also=("fakehost.user:double!",))], sweep=("fakehost",))
    assert sys.modules["fakehost.user"].double(2) == 4
    undo()


def test_a_listed_place_that_binds_something_else_is_an_error(host: ModuleType) -> None:
    sys.modules["fakehost.user"].double = lambda x, times=2: None  # type: ignore[attr-defined]
    assert _errors(_row("double", also=("fakehost.user:double",))) == [
        "fakehost:double: fakehost.user:double binds another object"
    ]


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ("fakehost:nothing", "fakehost has no nothing"),
        ("fakehost:Nobody.x", "fakehost has no Nobody"),
        ("fakehost:Thing.inherited", "inherited; the row has to name fakehost:Base.inherited"),
        ("no_such_host.x:y", "no module no_such_host"),
        ("fakehost.double", "write it as 'package.module:name'"),
        ("fakehost:LIMIT", "is a int, not a callable"),
    ],
)
def test_a_target_that_is_not_there_is_an_error(host: ModuleType, target: str, text: str) -> None:
    row = Patch(target, "around", _tagged, "()", "", "", "")
    assert [problem.text for problem in verify_all([row])] == [text]


def test_signature_drift_is_an_error_and_source_drift_a_warning() -> None:
    name = f"{__name__}:_tagged"
    drifted = _row(name, signature="(host, args)")
    assert _errors(drifted) == [
        f"{name}: signature drift: the row expects (host, args), the host has "
        "(host, *args, **kwargs)"
    ]
    [problem] = verify_all([_row(name, digest="000000000000")])
    assert problem.severity == "warning"
    assert "source drift" in problem.text
    known = source_digest(_tagged)
    assert not verify_all([_row(name, digest=f"000000000000|{known}")])


def test_nothing_is_touched_when_one_row_does_not_fit(host: ModuleType) -> None:
    before = host.double
    with pytest.raises(InterceptionError, match="fakehost has no nothing"):
        apply([_row("double"), _row("nothing")])
    assert host.double is before


def test_an_error_half_way_puts_back_what_was_set(host: ModuleType) -> None:
    class Closed(type):
        def __setattr__(cls, name: str, value: object) -> None:
            raise AttributeError("closed")

    def method(self: object) -> None: ...

    host.Closed = Closed("Closed", (), {"method": method})  # type: ignore[attr-defined]
    before = host.double
    with pytest.raises(AttributeError, match="closed"):
        apply([_row("double"), _row("Closed.method")])
    assert host.double is before


def test_undo_refuses_and_touches_nothing_when_a_place_is_no_longer_ours(host: ModuleType) -> None:
    undo = apply([_row("double"), _row("Thing.method")])
    ours = host.double

    @functools.wraps(ours)
    def theirs(*args: Any, **kwargs: Any) -> Any:
        return ours(*args, **kwargs)

    host.double = theirs  # type: ignore[attr-defined]
    with pytest.raises(InterceptionError, match="cannot undo fakehost:double"):
        undo()
    assert host.Thing().method(1) == ("ours", ("method", 1, 1))
    host.double = ours  # type: ignore[attr-defined]
    undo()
    assert host.Thing().method(1) == ("method", 1, 1)


def test_around_rows_share_a_target_and_undo_together(host: ModuleType) -> None:
    before = host.double
    undo = apply([_row("double"), _row("double", lambda host, x: ("second", host(x)))])
    assert host.double(1) == ("second", ("ours", 2))
    undo()
    undo()
    assert host.double is before


def test_replace_and_value_put_the_very_object_there(host: ModuleType) -> None:
    def halve(x: Any, times: int = 2) -> Any:
        return x // times

    undo = apply([_row("double", halve, "replace"), _row("LIMIT", 7, "value", signature="")])
    assert host.double is halve
    assert host.LIMIT == 7
    undo()
    assert host.double(4) == 8
    assert host.LIMIT == 3


def test_a_replacement_needs_the_hosts_parameters_and_shares_with_nobody(host: ModuleType) -> None:
    assert "the replacement has (x)" in _errors(_row("double", lambda x: x, "replace"))[0]
    clash = _errors(_row("double"), _row("double", host.double, "replace"))
    assert clash == [
        "fakehost:double: two rows (around, replace) claim it; only 'around' rows can share"
    ]


def test_functions_without_source_or_signature_can_be_rows() -> None:
    import math

    assert source_digest(math.hypot) == ""
    undo = apply([_row("math:hypot")])
    assert math.hypot(3, 4) == ("ours", 5.0)
    undo()
    assert math.hypot(3, 4) == 5.0


@pytest.mark.parametrize(
    ("function", "shown"),
    [
        (lambda: None, "()"),
        (lambda a, b=1, *c, d, e=2, **f: None, "(a, b=..., *c, d, e=..., **f)"),
        (lambda a, *, b: None, "(a, *, b)"),
        (lambda a, /, b: None, "(a, /, b)"),
        (lambda a, /: None, "(a, /)"),
        (3, ""),
    ],
)
def test_signature_of_shows_names_kinds_and_optionality(function: Any, shown: str) -> None:
    assert signature_of(function) == shown
