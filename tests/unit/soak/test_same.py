"""Digests of any length are compared line by line, and the first difference is named."""

import json
from pathlib import Path

import pytest

from megatron_moetion.digest import FOLDER
from tests.soak.same import NotSame, Same, assert_same, newest


def write(directory: Path, rank: int, rows: list[tuple[int, str]]) -> None:
    (directory / FOLDER).mkdir(parents=True, exist_ok=True)
    with (directory / FOLDER / f"rank{rank}.jsonl").open("a") as file:
        for iteration, bits in rows:
            tensors = {"a weight": bits, "b weight": "00"}
            line = {"iteration": iteration, "loss": {"lm": "ff"}, "tensors": tensors}
            file.write(f"{json.dumps(line)}\n")


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    """A run that recorded iteration 2 of rank 1 twice, and its reference."""
    run, reference = tmp_path / "run", tmp_path / "reference"
    for rank in (0, 1):
        write(reference, rank, [(1, "11"), (2, "22"), (3, "33")])
        write(run, rank, [(1, "11"), (2, "22")])
    write(run, 1, [(2, "22"), (3, "33")])
    return run, reference


def test_what_agrees_is_counted_once(runs: tuple[Path, Path]) -> None:
    assert newest(runs[0], 2) == 2
    assert assert_same(*runs, 2, 2) == Same(records=5, hashes=15)


def test_another_bit_is_named(runs: tuple[Path, Path]) -> None:
    write(runs[0], 0, [(3, "34")])
    with pytest.raises(NotSame, match=r"^rank 0, iteration 3: tensors a weight$"):
        assert_same(*runs, 2, 3)


def test_other_bits_when_run_again_are_named(runs: tuple[Path, Path]) -> None:
    write(runs[0], 1, [(1, "12")])
    with pytest.raises(NotSame, match=r"^run again: rank 1, iteration 1: tensors a weight$"):
        assert_same(*runs, 2, 2)


def test_a_record_that_lacks_is_named(runs: tuple[Path, Path]) -> None:
    with pytest.raises(NotSame, match="rank 0 recorded nothing of iteration 3"):
        assert_same(*runs, 2, 3)


def test_a_record_that_the_reference_lacks_is_named(runs: tuple[Path, Path]) -> None:
    for rank in (0, 1):
        write(runs[0], rank, [(3, "33"), (4, "44")])
    with pytest.raises(NotSame, match="the reference has no iteration 4 of rank 0"):
        assert_same(*runs, 2, 4)
