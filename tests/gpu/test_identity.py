"""Off == on == killed and recovered on one GPU, by real training runs."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.multirank]
TRAIN_ITERS = 16


@pytest.fixture(scope="session")
def outcomes(script: Callable[[str], Any]) -> Iterator[list[Any]]:
    """Collects what was shown; written down at the end when $MOETION_RESULTS names a folder."""
    collected: list[Any] = []
    yield collected
    if collected and (folder := os.environ.get("MOETION_RESULTS")):
        print(*script("results").write(collected, Path(folder)), sep="\n")


class Runs:
    """The runs without a failure of each variant, trained once."""

    def __init__(self, identity: Any, directory: Path) -> None:
        self.identity, self.directory = identity, directory
        self.corpus = self.identity.make_corpus(directory)
        self._undisturbed: dict[str, tuple[Any, Any]] = {}

    def setting(self, variant: str) -> Any:
        return self.identity.Setting("shared-gpu", variant, TRAIN_ITERS, self.corpus)

    def undisturbed(self, variant: str) -> tuple[Any, Any]:
        if variant not in self._undisturbed:
            setting, folder = self.setting(variant), self.directory / variant
            off = self.identity.train(setting, folder / "off")
            on = self.identity.train(setting, folder / "on", "--moetion")
            self._undisturbed[variant] = (off, on)
        return self._undisturbed[variant]


@pytest.fixture(scope="session")
def runs(gpu: None, script: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(script("identity"), tmp_path_factory.mktemp("gpu"))


@pytest.mark.parametrize(
    ("variant", "fault"),
    [
        ("demo", "kill:global_rank=3,iteration=6,at=backward:1"),
        ("demo", "kill:global_rank=0,iteration=6,at=capture"),
        # Dropout draws from the GPU's generators.
        ("dropout", "kill:global_rank=2,iteration=5,at=forward:2"),
    ],
)
def test_a_killed_and_recovered_run_has_the_bits_of_one_without_failure(
    runs: Runs, outcomes: list[Any], variant: str, fault: str
) -> None:
    setting = runs.setting(variant)
    off, on = runs.undisturbed(variant)
    place = fault.rpartition("=")[2].replace(":", "-")
    failed = runs.identity.train(
        setting, runs.directory / variant / place, "--moetion", "--moetion-fault", fault
    )
    outcome = runs.identity.judge(setting, off, on, failed, fault)
    outcomes.append(outcome)
    assert outcome.good, str(outcome)
