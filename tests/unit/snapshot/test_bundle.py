"""Nested state comes back equal, with types; what would need pickling is refused by its path."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from megatron_moetion.snapshot.bundle import Unsupported, pack, unpack


def through_json(value: Any) -> Any:
    """What the vault does: meta as JSON, data as bytes."""
    meta, data = pack(value)
    return unpack(json.loads(json.dumps(meta)), data)


def test_nested_containers_come_back_with_their_types_and_key_types() -> None:
    value = {
        "list": [1, 2.5, "x", None, True],
        "tuple": (1, (2, [3])),
        "empty": [[], (), {}],
        7: "an integer key",
        (1, "a"): {"deep": [{"deeper": ()}]},
        None: False,
    }
    found = through_json(value)
    assert found == value
    assert list(found) == list(value)
    assert type(found["list"][4]) is bool
    assert type(found["list"][0]) is int


def test_floats_keep_all_bits() -> None:
    values = [0.1, -0.0, math.inf, -math.inf, 5e-324, 1.7976931348623157e308]
    found = through_json([*values, math.nan])
    assert found[:-1] == values
    assert math.copysign(1, found[1]) == -1
    assert math.isnan(found[-1])
    assert through_json(2**200) == 2**200


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 4, dtype=torch.bfloat16),
        torch.randn(2, 2),
        torch.tensor(3, dtype=torch.int64),
        torch.tensor([True, False]),
        torch.empty(0, 3),
        torch.empty(0, dtype=torch.bfloat16),
        torch.arange(6.0).view(2, 3).t(),
        torch.tensor([math.nan, -0.0]),
        torch.get_rng_state(),
    ],
    ids=lambda t: f"{t.dtype}{list(t.shape)}",
)
def test_tensors_keep_dtype_shape_and_bits(tensor: torch.Tensor) -> None:
    found = through_json({"before": torch.ones(3), "it": tensor})["it"]
    assert (found.dtype, found.shape, found.device) == (tensor.dtype, tensor.shape, tensor.device)
    as_bytes = [t.contiguous().reshape(-1).view(torch.uint8) for t in (found, tensor)]
    assert torch.equal(*as_bytes)


def test_requires_grad_is_kept_and_the_graph_is_not() -> None:
    source = torch.ones(2, requires_grad=True) * 2
    found = through_json([source, torch.ones(2)])
    assert [t.requires_grad for t in found] == [True, False]
    assert found[0].is_leaf


@pytest.mark.parametrize(
    "array",
    [
        np.arange(5, dtype=np.uint32),
        np.arange(624, dtype=np.uint64),
        np.zeros((2, 0)),
        np.array(3),
        np.arange(6).reshape(2, 3)[:, ::-1],
    ],
    ids=lambda a: f"{a.dtype}{list(a.shape)}",
)
def test_arrays_keep_dtype_shape_and_values(array: np.ndarray[Any, Any]) -> None:
    found = through_json([array])[0]
    assert isinstance(found, np.ndarray)
    assert (found.dtype, found.shape) == (array.dtype, array.shape)
    assert np.array_equal(found, array)


def test_numpy_scalars_become_plain_numbers() -> None:
    assert through_json([np.int64(3), np.float64(0.5), np.bool_(True)]) == [3, 0.5, True]


def test_random_generators_can_be_put_back_from_a_bundle() -> None:
    state = np.random.get_state(legacy=True)
    expected = np.random.random(3)
    np.random.set_state(through_json(tuple(state)))
    assert np.array_equal(np.random.random(3), expected)


def test_sources_may_be_overwritten_once_packed_and_results_are_fresh() -> None:
    source = torch.ones(4)
    meta, data = pack([source])
    source.zero_()
    first, second = unpack(meta, data)[0], unpack(meta, data)[0]
    first.fill_(5)
    assert second.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ({"a": [1, {"b": object()}]}, r"\.a\[1\]\.b is a object"),
        ([(1, {2})], r"\[0\]\[1\] is a set"),
        (b"bytes", "value is a bytes"),
        ({"f": torch.float32}, r"\.f is a dtype"),
        ({"arrays": [np.array(["text"])]}, r"\.arrays\[0\] is a"),
        ({"arrays": [np.array([None])]}, r"\.arrays\[0\] is a"),
    ],
)
def test_a_value_that_needs_pickling_is_refused_by_its_path(value: Any, path: str) -> None:
    with pytest.raises(Unsupported, match=path):
        pack(value)
