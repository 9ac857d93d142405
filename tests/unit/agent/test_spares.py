"""A spare imports once and forks every worker that it is told to be, as children of ours."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_moetion.agent import supervision
from megatron_moetion.agent.spare import PREIMPORT
from megatron_moetion.agent.spares import Assignment, Heard, Spare
from megatron_moetion.agent.supervision import Child
from tests.waiting import readable

SCRIPT = """
import os, random, signal, sys
import sibling
assert __name__ == "__main__"
assert "MOETION_SPARE_FD" not in os.environ
assert os.getsid(0) == os.getpid()
with open(os.environ["REPORT"], "w") as report:
    first = sys.modules["slow_start"].PID
    print(os.environ["RANK"], sys.argv[1:], first, os.getpid(), random.random(), file=report)
if "--wait" in sys.argv:
    signal.pause()
sys.exit(5)
"""


@pytest.fixture(scope="module", autouse=True)
def adopting() -> None:
    supervision.adopt_orphans()


class Scene:
    """A folder with a script and modules, and spares that import from it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.spares: list[Spare] = []
        self.children: list[Child] = []
        self.write("script", SCRIPT)
        self.write("sibling", "")
        self.write("slow_start", "import os\nPID = os.getpid()")

    def write(self, module: str, text: str) -> None:
        (self.folder / f"{module}.py").write_text(text)

    def spare(self, preimport: str = "slow_start") -> Spare:
        env = {**os.environ, PREIMPORT: preimport, "PYTHONPATH": str(self.folder)}
        self.spares.append(Spare([sys.executable], env))
        return self.spares[-1]

    def assignment(self, who: int, *args: str) -> Assignment:
        env = {"RANK": str(who), "REPORT": str(self.folder / f"report{who}")}
        return Assignment(who, False, (str(self.folder / "script.py"), *args), env)

    def hear(self, spare: Spare) -> Heard:
        assert readable(spare.socket, 60)
        heard = spare.hear()
        self.children += heard.born.values()
        return heard

    def hear_births(self, spare: Spare, count: int) -> dict[int, Child]:
        born: dict[int, Child] = {}
        while len(born) < count:
            born |= self.hear(spare).born
        return born

    def report(self, who: int) -> list[str]:
        return (self.folder / f"report{who}").read_text().split()


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    scene = Scene(tmp_path)
    yield scene
    everybody = {*scene.children, *(spare.child for spare in scene.spares)}
    supervision.end_all([child for child in everybody if not child.reaped])


def await_end(child: Child) -> None:
    assert readable(child.pidfd, 60)


def ended(child: Child) -> int:
    await_end(child)
    return supervision.reap(child)


def test_workers_are_forked_whether_asked_for_before_the_imports_or_after(scene: Scene) -> None:
    spare = scene.spare()
    assert spare.assign(scene.assignment(3, "--x", "1"))
    assert spare.assign(scene.assignment(4))
    born = scene.hear_births(spare, 2)
    assert spare.ready
    assert spare.assign(scene.assignment(5))
    born |= scene.hear_births(spare, 1)
    assert [ended(born[who]) for who in (3, 4, 5)] == [5, 5, 5]
    rank, *args, imported_by, pid, _ = scene.report(3)
    assert (rank, args) == ("3", ["['--x',", "'1']"])
    assert (imported_by, pid) == (str(spare.child.pid), str(born[3].pid))
    # Each has random numbers of its own, as fresh interpreters have.
    assert len({scene.report(who)[-1] for who in (3, 4, 5)}) == 3
    assert spare.child.alive


def test_a_worker_outlives_the_spare_and_dies_by_its_own_code(scene: Scene) -> None:
    spare = scene.spare()
    spare.assign(scene.assignment(0, "--wait"))
    (worker,) = scene.hear_births(spare, 1).values()
    spare.child.kill(signal.SIGKILL)
    assert ended(spare.child) == 137
    assert worker.alive
    assert not spare.assign(scene.assignment(1))
    worker.kill(signal.SIGTERM)
    assert ended(worker) == 143


def test_what_a_dead_spare_did_not_get_to_is_told(scene: Scene) -> None:
    spare = scene.spare()
    spare.child.kill(signal.SIGSTOP)
    assert spare.assign(scene.assignment(1))
    assert spare.assign(scene.assignment(2))
    spare.child.kill(signal.SIGKILL)
    await_end(spare.child)
    assert scene.hear(spare).over
    assert spare.close() == [1, 2]


def test_a_spare_that_must_not_fork_becomes_the_first_worker(scene: Scene) -> None:
    wait = "threading.Thread(target=threading.Event().wait, daemon=True).start()"
    scene.write("threaded", f"import threading\n{wait}")
    spare = scene.spare("slow_start,threaded")
    for who in (1, 2):
        assert spare.assign(scene.assignment(who))
    cold: list[int] = []
    born: dict[int, Child] = {}
    while not (cold and born):
        heard = scene.hear(spare)
        cold += heard.cold
        born |= heard.born
    assert (cold, born) == ([2], {1: spare.child})
    assert spare.obstacle == "2 threads run after the imports"
    assert not spare.assign(scene.assignment(3))
    assert spare.close() == []
    assert ended(spare.child) == 5


def test_a_spare_becomes_a_module(scene: Scene, capfd: pytest.CaptureFixture[str]) -> None:
    spare = scene.spare()
    spare.assign(Assignment(0, True, ("this",), {}))
    (worker,) = scene.hear_births(spare, 1).values()
    assert ended(worker) == 0
    assert "Zen of Python" in capfd.readouterr().out


ENDS = """\
import atexit, os, sys, threading
atexit.register(print, "handlers run")
os.environ["MOETION_LEFT_ALONE"] = "1"
threading.Thread(target=threading.Event().wait).start()
sys.exit(5)
"""


def test_a_worker_with_a_call_that_never_ends_ends_with_its_code_all_the_same(
    scene: Scene, capfd: pytest.CaptureFixture[str]
) -> None:
    scene.write("script", ENDS)
    spare = scene.spare()
    spare.assign(scene.assignment(0))
    (worker,) = scene.hear_births(spare, 1).values()
    assert ended(worker) == 5
    assert "handlers run" in capfd.readouterr().out


def test_a_spare_ends_quietly_when_its_agent_lets_go(
    scene: Scene, capfd: pytest.CaptureFixture[str]
) -> None:
    spare = scene.spare()
    scene.hear(spare)
    assert spare.close() == []
    assert ended(spare.child) == 0
    assert capfd.readouterr().err == ""


def test_a_module_that_cannot_be_imported_is_named(
    scene: Scene, capfd: pytest.CaptureFixture[str]
) -> None:
    scene.hear(scene.spare("no_such_module,slow_start"))
    assert "the spare could not import no_such_module" in capfd.readouterr().err
