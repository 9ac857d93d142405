"""`compare` says what differs and exits as a script expects."""

from pathlib import Path

import pytest
import torch

from megatron_moetion import digest
from megatron_moetion.cli import main


def _run(directory: Path, value: float) -> Path:
    hashes = {"w main": digest.tensor_hash(torch.tensor([value]))}
    digest.record(directory, 0, 1, {"lm loss": torch.tensor(1.0)}, hashes)
    return directory


@pytest.mark.parametrize(("value", "code", "text"), [
    (1.0, 0, "equal: 1 records, 2 tensor hashes"),
    (2.0, 1, "different: iteration 1, global rank 0: w main"),
])  # fmt: skip
def test_equal_runs_exit_0_and_others_name_the_first_difference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], value: float, code: int, text: str
) -> None:
    a, b = _run(tmp_path / "a", 1.0), _run(tmp_path / "b", value)
    assert main(["compare", str(a), str(b)]) == code
    assert capsys.readouterr().out.strip() == text


def test_a_run_without_digests_is_one_line_and_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = _run(tmp_path / "a", 1.0)
    assert main(["compare", str(a), str(tmp_path / "b")]) == 2
    assert "holds no digests" in capsys.readouterr().err
