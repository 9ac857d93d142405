"""One runner for the whole suite: starting processes is the cost, so runs are shared."""

import subprocess
import sys
from pathlib import Path

import pytest

from .harness import ROOT, Run, Runner

LONGEST = 179
"""Iterations of the longest run; the reference that others are compared with has as many."""


@pytest.fixture(scope="session")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    scratch = tmp_path_factory.mktemp("equivalence")
    prefix = scratch / "stdlib"
    corpus = ROOT / "launch" / "demo" / "corpus.py"
    env = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "MOETION_PLATFORM": "cpu"}
    command = [sys.executable, "-W", "ignore", str(corpus), "--output", str(prefix)]
    subprocess.run(command, cwd=ROOT, check=True, env=env)
    return Runner(scratch, str(prefix))


@pytest.fixture(scope="session")
def off(runner: Runner) -> Run:
    # The reference has nothing of ours but the digest row, not even the launcher.
    run = runner.run("off", iterations=LONGEST, launcher="torch.distributed.run")
    assert run.code == 0, run.tail()
    return run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(item.fspath).parent == Path(__file__).parent:
            item.add_marker(pytest.mark.multirank)
