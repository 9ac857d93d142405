"""`export` is the run's own command line with one flag more."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_moetion.cli import main


def test_the_command_line_of_the_run_gets_the_flag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(os, "execvp", lambda program, argv: started.append(argv))
    main(["export", str(tmp_path), "--", "moetion-run", "train.py", "--moetion"])
    flag = ["--moetion-export", str(tmp_path)]
    assert started == [["moetion-run", "train.py", "--moetion", *flag]]


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["export", "out"], "give the run's own command line after --"),
        (["export", "out", "--", "no-such-program"], "cannot start no-such-program"),
    ],
)
def test_what_cannot_be_started_is_one_line(
    argv: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert line in said
