"""A spare is started ahead only where the command line is sure to want one."""

from __future__ import annotations

import pytest

from megatron_moetion.agent import __main__ as entry

SCRIPT = ["pretrain_gpt.py", "--lr", "1e-4"]


class Started(Exception):
    """In place of a process."""


@pytest.fixture(autouse=True)
def no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(interpreter: tuple[str, ...], env: dict[str, str]) -> None:
        raise Started(env.get("OMP_NUM_THREADS"))

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(entry, "Spare", start)


@pytest.mark.parametrize(
    ("argv", "threads"),
    [
        (["--nproc-per-node", "4", *SCRIPT, "--moetion"], "1"),
        (["--nproc_per_node", "1", *SCRIPT, "--moetion"], "None"),
        (["--nproc-per-node", "4", "--spares", "1", *SCRIPT], "1"),
        (["--nproc-per-node", "4", "--spares", "3", *SCRIPT], "1"),
    ],
)
def test_it_is_started_with_the_environment_of_a_worker(argv: list[str], threads: str) -> None:
    with pytest.raises(Started, match=threads):
        entry.spare_ahead(argv)


@pytest.mark.parametrize(
    "argv",
    [
        ["--nproc-per-node", "4", *SCRIPT],
        ["--nproc-per-node", "4", "--spares", "0", *SCRIPT, "--moetion"],
        ["--nproc-per-node", "4", "--spares=0", *SCRIPT, "--moetion"],
        ["--nproc-per-node", "gpu", *SCRIPT, "--moetion"],
        ["--nproc-per-node", "4", "--no-python", "bash", "--moetion"],
        ["--help"],
        [],
    ],
)
def test_it_is_not_started_where_it_may_not_be_wanted(argv: list[str]) -> None:
    assert entry.spare_ahead(argv) is None
