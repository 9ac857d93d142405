"""What ``sitecustomize`` arms: the two packages become importable, the host's import is awaited.

Standard library only, and little of it, since every Python process of the job runs this. Nothing
is imported from the project until the process imports the host, so the launcher's parent and
data-loader children stay as they are.
"""

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

PATCHES = Path(__file__).resolve().parent.parent
HOST = "megatron"


class _SiblingFinder(importlib.abc.MetaPathFinder):
    """Finds our packages next to this file, so that what was sourced is what runs.

    In a checkout the directory of the patches has another name than their package; and a sourced
    checkout wins over an installed wheel.
    """

    def __init__(self, host: bool) -> None:
        self._armed = host
        self._packages = {
            "megatron_moetion_patches": PATCHES,
            "megatron_moetion": PATCHES.parent / "megatron_moetion",
        }

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Returns where our two packages are, and calls for activation on the host's import."""
        if fullname == HOST and self._armed:
            self._armed = False
            importlib.import_module("megatron_moetion_patches.activation").before_host_import()
        directory = self._packages.get(fullname)
        if directory is None or not (directory / "__init__.py").is_file():
            return None
        return importlib.util.spec_from_file_location(
            fullname, directory / "__init__.py", submodule_search_locations=[str(directory)]
        )


def arm(host: bool = True) -> None:
    """Puts the finder in front, once.

    Args:
        host: whether the host's import activates the patches, or the packages are only found.
    """
    if not any(isinstance(finder, _SiblingFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _SiblingFinder(host))
