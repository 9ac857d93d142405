"""Whoever begins to write again never leaves the name of a folder that is not complete."""

from pathlib import Path

import pytest

from megatron_moetion.unfinished import Unfinished


def make(tmp_path: Path, named: str | None) -> Unfinished:
    """The folder of iteration 10 is to be written; that of 5 is there."""
    made = Unfinished(tmp_path / "iter_10", tmp_path / "latest", "10")
    (tmp_path / "iter_5").mkdir()
    if named is not None:
        made.names.write_text(named)
    return made


def write(made: Unfinished, names: str | None) -> None:
    """The host is cut short before, while or after it writes the name."""
    made.folder.mkdir(exist_ok=True)
    (made.folder / "part").write_text("some bytes")
    if names is not None:
        made.names.write_text(names)


@pytest.mark.parametrize("before", [None, "5"])
@pytest.mark.parametrize("names", [None, ""])
def test_what_is_half_written_is_taken_away_and_the_name_is_what_it_was(
    tmp_path: Path, before: str | None, names: str | None
) -> None:
    made = make(tmp_path, before)
    note = made.note()
    write(made, names)
    assert not made.again(note)
    assert not made.folder.exists()
    assert made.note() == note
    assert (tmp_path / "iter_5").exists()


@pytest.mark.parametrize("before", [None, "5"])
def test_what_is_named_is_complete_and_left_alone(tmp_path: Path, before: str | None) -> None:
    made = make(tmp_path, before)
    note = made.note()
    write(made, "10")
    assert made.again(note)
    assert (made.folder / "part").read_text() == "some bytes"


def test_what_was_named_before_it_was_begun_tells_nothing_and_is_written_again(
    tmp_path: Path,
) -> None:
    made = make(tmp_path, "10")
    note = made.note()
    write(made, None)
    assert not made.again(note)
    assert made.folder.exists()


def test_nothing_may_have_been_written(tmp_path: Path) -> None:
    made = make(tmp_path, "5")
    note = made.note()
    assert not made.again(note)
    assert made.note() == note
