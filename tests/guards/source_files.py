"""The source files of both packages, parsed once."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CORE, PATCHES = "megatron_moetion", "patches"


@dataclass(frozen=True)
class Source:
    """One file.

    Attributes:
        name: path from the root of the checkout.
        module: dotted name, `patches` of the checkout being the package `patches`.
    """

    name: str
    module: str
    text: str = field(repr=False)
    tree: ast.Module = field(repr=False)

    def imports(self) -> Iterator[tuple[str, int]]:
        """(absolute module name, line) of every import, also inside functions."""
        package = (
            self.module if self.name.endswith("__init__.py") else self.module.rpartition(".")[0]
        )
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from ((alias.name, node.lineno) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
                base = base if node.level else node.module or ""
                yield base, node.lineno
                # `from package import module` names the module only in the alias.
                yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)


@cache
def sources(package: str) -> tuple[Source, ...]:
    """All Python files under a package's directory."""
    found = []
    for path in sorted((ROOT / package).rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        text = path.read_text()
        found.append(Source(name, module, text, ast.parse(text, name)))
    return tuple(found)


def both() -> tuple[Source, ...]:
    return (*sources(CORE), *sources(PATCHES))
