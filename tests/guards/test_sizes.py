"""Sizes are reported, not enforced: past them, ask what second thing a module does."""

from __future__ import annotations

import ast
import warnings

from source_files import both

MAX_FILE_LINES, MAX_FUNCTION_LINES = 300, 40


def test_long_files_and_functions_are_reported() -> None:
    for source in both():
        length = source.text.count("\n")
        if length > MAX_FILE_LINES:
            warnings.warn(f"{source.name} has {length} lines", stacklevel=1)
        for node in ast.walk(source.tree):
            if isinstance(node, ast.FunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    where = f"{source.name}:{node.lineno} {node.name}"
                    warnings.warn(f"{where} has {lines} lines", stacklevel=1)


def test_no_module_is_named_after_nothing() -> None:
    vague = {"utils", "util", "manager", "coordinator", "helper", "helpers", "common", "misc"}
    assert [s.name for s in both() if vague & set(s.module.split(".")[-1].split("_"))] == []
