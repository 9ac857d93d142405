"""A spare imports, waits, and becomes whatever it is told to be."""

from __future__ import annotations

import os
import select
import sys
from pathlib import Path

import pytest

from megatron_moetion.agent import supervision
from megatron_moetion.agent.spare import PREIMPORT
from megatron_moetion.agent.spares import Spare, SparePool
from megatron_moetion.agent.supervision import Child

SCRIPT = """
import os, sys
import sibling
assert __name__ == "__main__"
assert "MOETION_SPARE_FD" not in os.environ
with open(os.environ["REPORT"], "w") as report:
    print(os.environ["RANK"], sys.argv[1:], "fractions" in sys.modules, os.getpid(), file=report)
sys.exit(5)
"""


def pool_of(size: int, **env: str) -> SparePool:
    return SparePool(size, [sys.executable], {**os.environ, PREIMPORT: "fractions", **env})


def ended(child: Child) -> int:
    assert select.select([child.pidfd], [], [], 60)[0]
    return supervision.reap(child)


def await_ready(spare: Spare) -> None:
    assert select.select([spare.socket], [], [], 60)[0]
    assert spare.poll_ready()


@pytest.mark.parametrize("ready", [True, False])
def test_a_spare_becomes_the_script(tmp_path: Path, ready: bool) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "sibling.py").write_text("")
    report = tmp_path / "report"
    pool = pool_of(1)
    (child,) = pool.fill(during_training=False)
    spare = pool.take()
    assert spare is not None
    if ready:
        await_ready(spare)
    spare.assign(
        False, [str(tmp_path / "script.py"), "--x", "1"], {"RANK": "3", "REPORT": str(report)}
    )
    assert ended(child) == 5
    assert report.read_text() == f"3 ['--x', '1'] True {child.pid}\n"


def test_a_spare_becomes_a_module(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pool = pool_of(1)
    (child,) = pool.fill(during_training=True)
    spare = pool.take()
    assert spare is not None
    spare.assign(True, ["this"], {})
    assert ended(child) == 0
    assert "Zen of Python" in capfd.readouterr().out


def test_a_pool_keeps_its_size_and_forgets_the_dead() -> None:
    pool = pool_of(2)
    first, second = pool.fill(during_training=False)
    assert pool.fill(during_training=False) == []
    first.kill(9)
    assert select.select([first.pidfd], [], [], 60)[0]
    spare = pool.take()
    assert spare is not None
    assert spare.child is second
    assert pool.lost(first)
    assert not pool.lost(second)
    supervision.reap(first)
    assert pool.take() is None
    (third,) = pool.fill(during_training=False)[:1]
    supervision.end_all([second, third, *[s.child for s in pool._spares if s.child is not third]])


def test_a_pool_of_none_has_nothing_to_give() -> None:
    pool = pool_of(0)
    assert pool.fill(during_training=False) == []
    assert pool.take() is None


def test_a_spare_ends_quietly_when_its_agent_lets_go(capfd: pytest.CaptureFixture[str]) -> None:
    pool = pool_of(1)
    (child,) = pool.fill(during_training=False)
    spare = pool.take()
    assert spare is not None
    await_ready(spare)
    spare.socket.close()
    assert ended(child) == 0
    assert capfd.readouterr().err == ""


def test_a_module_that_cannot_be_imported_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    pool = pool_of(1, **{PREIMPORT: "no_such_module,fractions"})
    (child,) = pool.fill(during_training=False)
    spare = pool.take()
    assert spare is not None
    await_ready(spare)
    supervision.end_all([child])
    assert "the spare could not import no_such_module" in capfd.readouterr().err
