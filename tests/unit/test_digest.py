"""Hashes see every bit; a comparison names the first difference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_moetion.digest import NoDigest, compare, read, record, state_hashes, tensor_hash
from megatron_moetion.operators import Kind, Operator, ParamState, StateAccess


def write(where: Path, loss: float = 1.0, last: str = "aa") -> Path:
    for rank in (0, 1):
        for iteration in (1, 2):
            value = last if (rank, iteration) == (1, 2) else "aa"
            record(where, rank, iteration, {"lm loss": torch.tensor(loss)}, {"w main": value})
    return where


def test_equal_runs_compare_equal_and_say_how_much_was_compared(tmp_path: Path) -> None:
    outcome = compare(write(tmp_path / "a"), write(tmp_path / "b"))
    assert outcome.difference is None
    assert str(outcome) == "equal: 4 records, 8 tensor hashes"


def test_the_first_tensor_rank_and_iteration_that_differ_are_named(tmp_path: Path) -> None:
    outcome = compare(write(tmp_path / "a"), write(tmp_path / "b", last="ab"))
    assert str(outcome) == "different: iteration 2, global rank 1: w main"


def test_a_loss_that_differs_in_its_last_bit_differs(tmp_path: Path) -> None:
    nearby = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0)).item()
    outcome = compare(write(tmp_path / "a"), write(tmp_path / "b", loss=nearby))
    assert str(outcome) == "different: iteration 1, global rank 0: loss lm loss"


def test_an_iteration_that_only_one_run_recorded_is_a_difference(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a"), write(tmp_path / "b")
    record(b, 0, 3, {}, {"w main": "aa"})
    assert f"iteration 3, global rank 0: recorded only in {b}" in str(compare(a, b))


def test_the_same_record_twice_is_one_but_with_other_bits_it_is_an_error(tmp_path: Path) -> None:
    record(tmp_path, 0, 1, {}, {"w main": "aa"})
    record(tmp_path, 0, 1, {}, {"w main": "aa"})
    assert read(tmp_path) == {(1, 0): {"w main": "aa"}}
    record(tmp_path, 0, 1, {}, {"w main": "ab"})
    with pytest.raises(NoDigest, match="iteration 1 was recorded twice, with different bits"):
        read(tmp_path)


def test_a_directory_without_digests_says_which_flag_makes_them(tmp_path: Path) -> None:
    with pytest.raises(NoDigest, match="--moetion-digest-interval"):
        compare(tmp_path, tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64, torch.bool])
def test_a_hash_depends_on_bits_shape_and_dtype(dtype: torch.dtype) -> None:
    base = torch.zeros(4, dtype=dtype)
    changed = base.clone()
    changed[3] = 1
    hashes = {tensor_hash(t) for t in (base, changed, base.view(2, 2), base.view(torch.uint8))}
    assert len(hashes) == 4
    assert tensor_hash(base) == tensor_hash(torch.stack([base, changed], 1)[:, 0])


def test_zeros_of_different_sign_and_nans_of_different_payload_hash_differently() -> None:
    zeros = torch.tensor([0.0, -0.0])
    assert tensor_hash(zeros[:1]) != tensor_hash(zeros[1:])
    nans = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    assert tensor_hash(nans[:1]) != tensor_hash(nans[1:])
    assert tensor_hash(torch.tensor(1.0)) != tensor_hash(torch.empty(0))


def test_state_hashes_cover_weights_mains_optimizer_tensors_and_buffers() -> None:
    param, main = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16)), torch.ones(2)
    access = StateAccess({main: {"exp_avg": torch.zeros(2)}}, main)
    elsewhere = torch.nn.Parameter(torch.ones(2))
    nothing = torch.empty(0)
    operator = Operator(
        "o",
        Kind.LAYER,
        [
            ParamState("w", param, param.detach().view(-1), main, access),
            ParamState("other rank's", elsewhere, nothing, nothing, StateAccess({}, nothing)),
        ],
    )
    hashes = state_hashes([operator], {"bias": torch.zeros(1)})
    assert list(hashes) == ["bias buffer", "w exp_avg", "w main", "w weight"]
    main[1] = 2.0
    again = state_hashes([operator], {"bias": torch.zeros(1)})
    assert [name for name in hashes if hashes[name] != again[name]] == ["w main"]
