"""GPU tests run when asked for (`make gpu`, `pytest -m gpu`), and then say what they lack."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).parent
LAUNCH = HERE.parents[1] / "launch" / "gpu"


def load(name: str) -> ModuleType:
    """A module of `launch/gpu`, which is no package."""
    if name not in sys.modules:
        sys.path.insert(0, str(LAUNCH))
        spec = importlib.util.spec_from_file_location(name, LAUNCH / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Takes this folder's tests out of runs that do not ask for the marker."""
    if "gpu" in config.getoption("-m"):
        return
    ours = [item for item in items if HERE in item.path.parents]
    if ours:
        config.hook.pytest_deselected(items=ours)
        items[:] = [item for item in items if item not in ours]


@pytest.fixture(scope="session")
def script() -> Callable[[str], ModuleType]:
    """Gives a script of `launch/gpu` by its name."""
    return load


@pytest.fixture(scope="session")
def gpu() -> None:
    """Skips, naming what is missing, where there is no GPU."""
    if missing := load("results").missing_gpu():
        pytest.skip(missing)
