"""Rules of the house that a reader cannot check: no pickle, no sleeps, no swallowed errors."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest
from source_files import Source, both

FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal"}
FORBIDDEN_CALLS = {
    "time.sleep": "waiting needs an event, not a delay",
    "asyncio.sleep": "waiting needs an event, not a delay",
    "torch.load": "it unpickles",
    "torch.save": "it pickles",
}

BROAD_EXCEPTS = {
    # Each of them raises again whatever is no echo of a lost peer.
    ("megatron_moetion/session.py", "_run_up_to"): "an iteration may be given up",
    ("megatron_moetion/standing.py", "update"): "a gather may be cut",
    ("megatron_moetion/recovering.py", "recover"): "recovery may be superseded",
    ("megatron_moetion/recovering.py", "join"): "recovery may be superseded",
    ("megatron_moetion/inbox/tap.py", "_live"): "a collective may be cut",
    ("megatron_moetion/interlude.py", "run"): "an interlude may be cut",
    # Carried to the training thread, which raises it.
    ("megatron_moetion/recovery/waiting.py", "run"): "a call is made in another thread",
    # Clean-up, then the same error again.
    ("megatron_moetion/interception.py", "apply"): "rows applied so far are put back",
    # Ends the process: going on without notices would be a hang.
    ("megatron_moetion/agent/link.py", "_listen"): "the listener must not die alone",
    # Whatever a device raises is what is wrong with it; the rank is not taken on.
    ("megatron_moetion/health.py", "_try"): "a broken device is reported, not used",
    # A failing snapshot never raises into training; it is counted and reported.
    ("megatron_moetion/snapshot/copier.py", "_finish"): "an unsealed frame is reported, not used",
}


def parents(tree: ast.AST) -> dict[ast.AST, ast.AST]:
    return {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}


def outermost_function(node: ast.AST, above: dict[ast.AST, ast.AST]) -> str:
    """The function at module or class level that a node stands in."""
    name = "<module>"
    while node in above:
        node = above[node]
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            name = node.name
    return name


def broad_handlers(source: Source) -> Iterator[tuple[str, ast.ExceptHandler]]:
    above = parents(source.tree)
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.ExceptHandler):
            continue
        caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        names = [c.id for c in caught if isinstance(c, ast.Name)]
        if node.type is None or {"Exception", "BaseException"} & set(names):
            yield outermost_function(node, above), node


@pytest.mark.parametrize("source", both(), ids=lambda s: s.name)
def test_nothing_is_pickled(source: Source) -> None:
    found = [
        f"{source.name}:{line}: {name}"
        for name, line in source.imports()
        if FORBIDDEN_MODULES & set(name.split("."))
    ]
    assert found == []


@pytest.mark.parametrize("source", both(), ids=lambda s: s.name)
def test_nothing_sleeps_or_unpickles(source: Source) -> None:
    found = [
        f"{source.name}:{node.lineno}: {name}: {why}"
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Call)
        for name, why in FORBIDDEN_CALLS.items()
        if ast.unparse(node.func) == name
    ]
    found += [
        f"{source.name}:{line}: {name}"
        for name, line in source.imports()
        if name in FORBIDDEN_CALLS
    ]
    assert found == []


@pytest.mark.parametrize("source", both(), ids=lambda s: s.name)
def test_a_broad_except_is_on_the_list_with_its_reason(source: Source) -> None:
    found = [
        f"{source.name}:{handler.lineno}: in {function}"
        for function, handler in broad_handlers(source)
        if (source.name, function) not in BROAD_EXCEPTS
    ]
    assert found == []


def test_every_broad_except_on_the_list_is_still_there() -> None:
    made = {(s.name, function) for s in both() for function, _ in broad_handlers(s)}
    assert set(BROAD_EXCEPTS) <= made


@pytest.mark.parametrize("source", both(), ids=lambda s: s.name)
def test_no_error_is_passed_over_in_silence(source: Source) -> None:
    found = [
        f"{source.name}:{handler.lineno}"
        for _, handler in broad_handlers(source)
        if all(isinstance(s, ast.Pass | ast.Continue) for s in handler.body)
    ]
    assert found == []


@pytest.mark.parametrize("source", both(), ids=lambda s: s.name)
def test_an_ignored_finding_names_its_rule_and_its_reason(source: Source) -> None:
    typed = re.compile(r"# type: ignore\[[\w-]+(, ?[\w-]+)*\]  # \S")
    linted = re.compile(r"# noqa: [A-Z]+\d+")
    found = [
        f"{source.name}:{number}: {line.strip()}"
        for number, line in enumerate(source.text.splitlines(), 1)
        if ("# type: ignore" in line and not typed.search(line))
        or ("# noqa" in line and not linted.search(line))
    ]
    assert found == []
