"""Where the patches are, and the environment that activates them; the host is not imported here."""

import importlib
import importlib.util
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

PACKAGE = "megatron_moetion_patches"
"""Import name of the patch layer; in a checkout its directory is ``patches``."""


def patch_directory() -> Path:
    """Returns the directory of the patch layer: next to a checkout's product, else as installed.

    Raises:
        ModuleNotFoundError: neither is there.
    """
    sibling = Path(__file__).resolve().parent.parent / "patches"
    if (sibling / "moetion.sh").is_file():
        return sibling
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{PACKAGE} is not installed: install megatron-moetion again")
    return Path(spec.origin).resolve().parent


def activated(env: Mapping[str, str]) -> dict[str, str]:
    """Returns ``env`` as it is after sourcing ``moetion.sh``."""
    startup = str(patch_directory() / "startup")
    rest = [entry for entry in env.get("PYTHONPATH", "").split(os.pathsep) if entry]
    if rest[:1] != [startup]:
        rest.insert(0, startup)
    return {**env, "PYTHONPATH": os.pathsep.join(rest), "MOETION": "1"}


def load_patches(name: str) -> ModuleType:
    """Imports one module of the patch layer, also in a checkout that nobody installed."""
    startup = str(patch_directory() / "startup")
    if importlib.util.find_spec(PACKAGE) is None:
        sys.path.append(startup)
        importlib.import_module("moetion_startup").arm(host=False)
        sys.path.remove(startup)
    return importlib.import_module(f"{PACKAGE}.{name}")
