"""What every worker and spare of a node inherits. Quick to import, unlike `launcher`."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

from megatron_moetion.agent.spare import SPARE_FD


class UsageError(ValueError):
    """A command line that cannot be run, and what to change."""


def interpreter() -> tuple[str, ...]:
    """How workers and spares start Python."""
    return (os.environ.get("PYTHON_EXEC", sys.executable), "-u")


def worker_base_env(num_workers: int) -> dict[str, str]:
    """What every worker and spare of this node inherits: torchrun's variables and the patches'."""
    env = {
        **os.environ,
        "ROLE_NAME": "default",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
        # The store at MASTER_ADDR is the agent's, so that no worker's death ends it.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "MOETION": "1",
    }
    env.pop(SPARE_FD, None)
    if num_workers > 1:
        env.setdefault("OMP_NUM_THREADS", "1")
    startup = str(startup_folder())
    others = [entry for entry in env.get("PYTHONPATH", "").split(os.pathsep) if entry != startup]
    env["PYTHONPATH"] = os.pathsep.join([startup, *filter(None, others)])
    return env


def startup_folder() -> Path:
    """The folder that `patches/moetion.sh` puts on PYTHONPATH, of a wheel or of a checkout.

    Raises:
        UsageError: the installation lacks it.
    """
    spec = find_spec("megatron_moetion_patches")
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    places.append(str(Path(__file__).resolve().parents[2] / "patches"))
    for place in places:
        if (Path(place) / "startup" / "sitecustomize.py").is_file():
            return Path(place) / "startup"
    raise UsageError("megatron_moetion_patches is not installed: install megatron-moetion again")
