"""An agent begins again in place of itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from megatron_moetion.agent.escalation import Tier, Tried
from megatron_moetion.agent.fallback import VARIABLE, FallBack, inherited

PROGRAM = """
import os, sys
from megatron_moetion.agent.fallback import FallBack, begin_again, inherited
before = inherited()
print(os.getpid(), sys.argv[1:], before, flush=True)
if before is None:
    begin_again(FallBack(12, (0, 3)))
"""


def test_it_is_the_same_process_with_the_same_command_line() -> None:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "a", "b c"],
        capture_output=True, text=True, env=env, check=True,
    )  # fmt: skip
    first, second = done.stdout.splitlines()
    pid = first.partition(" ")[0]
    assert first == f"{pid} ['a', 'b c'] None"
    assert second == f"{pid} ['a', 'b c'] {FallBack(12, (0, 3))}"


def test_no_child_sees_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, json.dumps([6, [], 2, [[1.0], [["memory restart", 2.0]]]]))
    tried = Tried((1.0,), ((Tier.MEMORY, 2.0),))
    assert inherited() == FallBack(6, (), node_rank=2, tried=tried)
    assert VARIABLE not in os.environ
