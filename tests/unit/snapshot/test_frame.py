"""A frame gives back every bit, whatever the dtype and shape."""

from __future__ import annotations

import json

import pytest
import torch

from megatron_moetion.operators import Kind, Operator, ParamState, StateAccess
from megatron_moetion.parts import Part
from megatron_moetion.schedule import FramePlan
from megatron_moetion.snapshot.frame import (
    BUFFERS,
    Source,
    copy_in,
    layout,
    live_tensors,
    not_finite,
    operator_ends,
    pieces_of,
    poison,
    sources,
    to_meta,
    view,
)

Entries = list[Source]


def random_bits(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Any bit pattern, NaNs with payload included."""
    count = dtype.itemsize
    for n in shape:
        count *= n
    raw = torch.randint(0, 256, (count,), dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


SOME: Entries = [
    Source("a", "a.w", "main", random_bits(torch.float32, 3, 5)),
    Source("a", "a.w", "exp_avg", random_bits(torch.float32, 1)),
    Source("a", "a.w", "step", torch.tensor(7.0)),
    Source("b", "b.w", "light", random_bits(torch.bfloat16, 17)),
    Source("b", "b.none", "light", torch.empty(0, dtype=torch.bfloat16)),
    Source(BUFFERS, "tokens", "light", random_bits(torch.int64, 2, 2)),
    Source(BUFFERS, "flag", "light", torch.tensor([True, False])),
    Source(BUFFERS, "last", "light", torch.empty(0)),
]


def test_every_piece_comes_back_bit_for_bit_also_after_its_meta_went_through_json() -> None:
    pieces, nbytes = layout(SOME)
    data = torch.full((nbytes,), 0xEE, dtype=torch.uint8)
    copy_in(SOME, pieces, data)
    meta = json.loads(json.dumps(to_meta(4, FramePlan((Part("a"),), ("b",)), pieces)))
    assert pieces_of(meta) == pieces
    for piece, (*name, tensor, _) in zip(pieces_of(meta), SOME, strict=True):
        assert [piece.operator, piece.param, piece.tensor] == name
        found = view(piece, data)
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert bits(found) == bits(tensor)


def test_pieces_are_aligned_and_do_not_overlap() -> None:
    pieces, nbytes = layout(SOME)
    ends = [p.offset + p.nbytes for p in pieces]
    assert all(p.offset % 64 == 0 for p in pieces)
    assert all(end <= p.offset for end, p in zip(ends, pieces[1:], strict=False))
    assert ends[-1] <= nbytes


def test_a_frame_copied_in_two_halves_is_the_same() -> None:
    pieces, nbytes = layout(SOME)
    whole, halves = (torch.zeros(nbytes, dtype=torch.uint8) for _ in range(2))
    copy_in(SOME, pieces, whole)
    copy_in(SOME[:3], pieces[:3], halves)
    copy_in(SOME[3:], pieces[3:], halves)
    assert torch.equal(whole, halves)


def test_a_source_that_is_not_contiguous_is_captured_by_value() -> None:
    source = torch.arange(6.0).view(2, 3).t()
    entries: Entries = [Source("a", "a.w", "light", source)]
    pieces, nbytes = layout(entries)
    data = torch.zeros(nbytes, dtype=torch.uint8)
    copy_in(entries, pieces, data)
    source.zero_()
    assert torch.equal(view(pieces[0], data), torch.arange(6.0).view(2, 3).t())


def test_what_is_not_finite_is_named_but_for_gradients_that_nothing_was_made_of() -> None:
    entries: Entries = [
        Source("a", "a.w", "main", torch.ones(3)),
        Source("a", "a.w", "exp_avg", torch.ones(3, dtype=torch.bfloat16)),
        Source("b", "b.w", "gradient", torch.tensor([1.0, float("inf")])),
        Source(BUFFERS, "tokens", "light", torch.ones(2, dtype=torch.int64)),
    ]
    pieces, nbytes = layout(entries)
    data = torch.full((nbytes,), 0xFF, dtype=torch.uint8)
    copy_in(entries, pieces, data)
    assert not_finite(pieces, data, stepped=False) is None
    assert not_finite(pieces, data, stepped=True) == (
        "not finite when it was sealed: gradient of b.w"
    )
    poison(pieces, data)
    assert not_finite(pieces, data, stepped=True) == (
        "not finite when it was sealed: main of a.w and 1 more"
    )


def test_a_frame_without_anything_still_has_a_size_and_a_meta() -> None:
    pieces, nbytes = layout([])
    copy_in([], pieces, torch.zeros(nbytes, dtype=torch.uint8))
    assert pieces == ()
    assert nbytes > 0


@pytest.fixture
def two_operators() -> dict[str, Operator]:
    found = {}
    for name in ("a", "b"):
        param = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
        main = torch.ones(4)
        access = StateAccess({main: {"exp_avg": torch.zeros(4), "step": torch.tensor(1.0)}}, main)
        state = ParamState(f"{name}.w", param, param.detach(), main, access)
        found[name] = Operator(name, Kind.LAYER, [state])
    return found


def test_full_operators_give_main_and_optimizer_tensors_light_ones_their_weights(
    two_operators: dict[str, Operator],
) -> None:
    buffers = {"bias": torch.zeros(1)}
    found = list(sources(FramePlan((Part("b"),), ("a",)), two_operators, buffers))
    assert [entry[:3] for entry in found] == [
        ("b", "b.w", "main"),
        ("b", "b.w", "exp_avg"),
        ("b", "b.w", "step"),
        ("a", "a.w", "light"),
        (BUFFERS, "bias", "light"),
    ]
    assert found[0][3] is two_operators["b"].params[0].main


def test_a_part_gives_its_stretch_of_every_tensor_of_the_shard_and_all_of_the_others(
    two_operators: dict[str, Operator],
) -> None:
    state = two_operators["a"].params[0]
    state.main.copy_(torch.arange(4.0))
    plan = FramePlan((Part("a", 1, 3),), ("a",))
    found = list(sources(plan, two_operators, {}))
    assert [(entry.tensor, entry.stretch) for entry in found] == [
        ("main", (1, 2)),
        ("exp_avg", (1, 2)),
        ("step", None),
        ("light", None),
    ]
    assert found[0].live.tolist() == [1.0]
    pieces, _ = layout(found)
    again = pieces_of(json.loads(json.dumps(to_meta(1, plan, pieces))))
    assert again == pieces
    assert [piece.shape for piece in again] == [(1,), (1,), (), (4,)]


def test_stretches_of_operators_are_named_in_order_and_an_empty_frame_has_none(
    two_operators: dict[str, Operator],
) -> None:
    plan = FramePlan((Part("a"),), ("b",))
    pieces, nbytes = layout(list(sources(plan, two_operators, {})))
    start_of_b = next(piece.offset for piece in pieces if piece.operator == "b")
    assert operator_ends(pieces, nbytes) == [("a", start_of_b), ("b", nbytes)]
    assert operator_ends(*layout([])) == []


def test_before_the_first_step_a_full_capture_is_the_main_alone(
    two_operators: dict[str, Operator],
) -> None:
    state = two_operators["a"].params[0]
    state.states.clear()
    assert [name for name, _ in live_tensors(state)] == ["main"]
