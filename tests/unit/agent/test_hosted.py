"""The agent that a worker starts: one for all of them, ending with whoever started the workers."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_moetion.agent import hosted
from megatron_moetion.agent.surroundings import SRUN, TORCHRUN

WORKER = """
import os, sys
from megatron_moetion.agent import hosted
from megatron_moetion.agent.link import AgentLink
joined = hosted.join(["--moetion", "--moetion-dir", sys.argv[1]])
link = AgentLink.connect()
hello = {"op": "hello", "pid": os.getpid(), "global_rank": int(os.environ["RANK"])}
welcome = link.request({**hello, "generation": int(os.environ["TORCHELASTIC_RESTART_COUNT"])})
print(joined, os.environ["MOETION_AGENT"], welcome["epoch"], flush=True)
sys.stdin.readline()
"""
LAUNCHER = """
import json, os, subprocess, sys
worker, directory, number = sys.argv[1], sys.argv[2], 3
def start(rank):
    env = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(number), "TORCHELASTIC_RUN_ID": "x",
           "LOCAL_WORLD_SIZE": str(number), "TORCHELASTIC_RESTART_COUNT": "0"}
    return subprocess.Popen([sys.executable, "-c", worker, directory], env=env, text=True,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE)
workers = [start(rank) for rank in range(number)]
print(json.dumps([w.stdout.readline().split() for w in workers]), flush=True)
sys.stdin.readline()
for worker in workers:
    worker.kill()
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for temporary files, and no agent yet."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    for name in ("MOETION_AGENT", "MOETION_SECRET", "MOETION_EPOCH", TORCHRUN, SRUN):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_all_workers_of_a_launcher_find_one_agent_that_ends_with_it(here: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, WORKER, str(here / "events")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as launcher:  # fmt: skip
        assert launcher.stdin is not None
        assert launcher.stdout is not None
        said = json.loads(launcher.stdout.readline())
        assert len(said) == 3
        assert {tuple(words) for words in said} == {("True", said[0][1], "0")}
        (folder,) = here.glob("moetion-*")
        assert folder.stat().st_mode & 0o777 == 0o700
        with (folder / "alive").open() as alive:
            launcher.stdin.close()
            # Held for as long as the agent lives.
            fcntl.flock(alive, fcntl.LOCK_EX)
    assert not folder.exists()


def test_without_a_launcher_that_is_known_there_is_none(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not hosted.join(["--moetion"])
    assert list(here.iterdir()) == []
    assert "MOETION_AGENT" not in os.environ


def test_the_agents_of_several_nodes_need_a_secret(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    several = {"LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "2", "GROUP_RANK": "1", TORCHRUN: "x"}
    for name, value in {**several, "TORCHELASTIC_USE_AGENT_STORE": "True"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(hosted.NoAgent, match="MOETION_SECRET: set it to the same random hex"):
        hosted.join(["--moetion"])
    assert list(here.iterdir()) == []


def test_what_moetion_run_has_set_stays(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOETION_AGENT", "@somewhere")
    assert hosted.join(["--moetion"])
    assert os.environ["MOETION_AGENT"] == "@somewhere"


def test_an_agent_that_cannot_start_is_said(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(TORCHRUN, "x")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    with pytest.raises(hosted.NoAgent, match="did not start"):
        hosted.join(["--moetion", "--moetion-replicas", "7"])
    assert "--moetion-replicas 7" in capfd.readouterr().err
