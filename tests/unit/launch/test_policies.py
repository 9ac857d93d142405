"""The table of window policies in the docs is the one that the command prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.bench import policies
from launch.bench.policies import main, rank_of_a_stage, row
from megatron_moetion.schedule import WindowPolicy


def test_the_table_in_the_docs_is_current() -> None:
    assert main(["--check"]) == 0, "run: python -m launch.bench.policies --write"


def test_a_stale_table_is_noticed_and_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    current = policies.DOCUMENT.read_text()
    stale = tmp_path / "windows.md"
    stale.write_text(current.replace("| 1 | rolling |", "| 9 | rolling |", 1))
    monkeypatch.setattr(policies, "DOCUMENT", stale)
    assert main(["--check"]) == 1
    assert main(["--write"]) == 0
    assert stale.read_text() == current


def test_the_command_prints_the_windows_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--window", "1", "5"]) == 0
    rows = [line.split("|")[1:3] for line in capsys.readouterr().out.splitlines()[4:]]
    assert {(w.strip(), p.strip()) for w, p in rows} == {
        (w, str(p)) for w in "15" for p in WindowPolicy
    }


def test_frames_are_smaller_than_a_dense_one_by_about_what_the_paper_says() -> None:
    # About 55 % at W = 3, which is the largest frame of six equal operators.
    for policy in WindowPolicy:
        found = row(rank_of_a_stage(), 3, policy, 0)
        assert 0.5 < 1 - found.peak_bytes / found.dense_bytes < 0.6
        assert found.mean_bytes <= found.peak_bytes
