"""One scratch folder for the whole suite: starting processes is the cost, so runs are shared."""

import os
import subprocess
import sys
from collections.abc import Generator, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from .harness import RECOVERED, ROOT, TORCHRUN, Run, Runner, once
from .matrix import PROPERTY

LONGEST = 115
"""Iterations of the longest run; the reference that others are compared with has as many."""
SHARED = {"killed", "hung"}
"""Fixtures that are a run which several tests of a file look at."""


@pytest.fixture(scope="session")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    base = tmp_path_factory.getbasetemp()
    # A worker of pytest-xdist has a folder of its own in that of the session.
    scratch = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "equivalence"
    scratch.mkdir(exist_ok=True)
    prefix = scratch / "stdlib"
    once(scratch / "stdlib.made", lambda: _make_corpus(prefix))
    runs = Runner(scratch, str(prefix))
    yield runs
    runs.close()


def _make_corpus(prefix: Path) -> int:
    corpus = ROOT / "launch" / "demo" / "corpus.py"
    env = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "MOETION_PLATFORM": "cpu"}
    command = [sys.executable, "-W", "ignore", str(corpus), "--output", str(prefix)]
    return subprocess.run(command, cwd=ROOT, check=True, env=env).returncode


@pytest.fixture(scope="session")
def off(runner: Runner) -> Run:
    # The reference has nothing of ours but the digest row, not even the launcher.
    run = runner.run("off", iterations=LONGEST, launcher=TORCHRUN)
    assert run.code == 0, run.tail()
    return run


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks these tests and puts them first, as they take longest.

    One makes the reference; what needs none fills the other processes meanwhile. Tests of one run
    are dealt out together: elsewhere they would only wait for it.
    """
    ours = [item for item in items if Path(item.fspath).parent == Path(__file__).parent]
    for item in ours:
        item.add_marker(pytest.mark.multirank)
        for name in SHARED.intersection(getattr(item, "fixturenames", ())):
            cut = item.callspec.params.get(name, "") if hasattr(item, "callspec") else ""
            item.add_marker(pytest.mark.xdist_group(f"{item.path.stem} {cut}"))
    with_reference = [item for item in ours if "off" in item.fixturenames]
    alone = [item for item in ours if item not in with_reference]
    others = [item for item in items if item not in ours]
    items[:] = [*with_reference[:1], *alone, *with_reference[1:], *others]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    """What a test compared and found the same becomes rows; a test that fails adds none."""
    RECOVERED.clear()
    yield
    item.user_properties += [(PROPERTY, asdict(row)) for row in RECOVERED]
