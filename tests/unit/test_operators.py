"""Every byte of training state belongs to exactly one operator."""

from __future__ import annotations

import pytest
import torch

from megatron_moetion.operators import (
    Kind,
    Operator,
    OwnershipError,
    ParamState,
    StateAccess,
    prove_ownership,
    table,
)


def operator(name: str, *numels: int, kind: Kind = Kind.EXPERT) -> Operator:
    made = Operator(name, kind, numel=sum(numels))
    for index, numel in enumerate(numels):
        param = torch.nn.Parameter(torch.ones(numel, dtype=torch.bfloat16))
        main = torch.ones(numel)
        light = param.detach().view(-1)
        access = StateAccess({}, main)
        made.params.append(ParamState(f"{name}.{index}", param, light, main, access))
    return made


def parameters(*operators: Operator) -> dict[str, torch.nn.Parameter]:
    return {s.name: s.param for o in operators for s in o.params}


def mains(*operators: Operator) -> list[torch.Tensor]:
    return [s.main for o in operators for s in o.params]


def test_a_partition_is_accepted() -> None:
    a, b = operator("a", 3, 4), operator("b", 5)
    prove_ownership([a, b], parameters(a, b), mains(a, b))


def test_a_parameter_of_no_operator_is_refused_by_name() -> None:
    a, b = operator("a", 3), operator("b", 5)
    with pytest.raises(OwnershipError, match=r"parameter b\.0 belongs to no operator"):
        prove_ownership([a], parameters(a, b), mains(a))


def test_a_parameter_of_two_operators_is_refused_with_both_names() -> None:
    a, b = operator("a", 3), operator("b")
    b.params = a.params
    with pytest.raises(OwnershipError, match=r"parameter a\.0 belongs to a and to b"):
        prove_ownership([a, b], parameters(a), mains(a))


def test_an_optimizer_shard_of_no_operator_is_refused() -> None:
    a = operator("a", 3)
    with pytest.raises(OwnershipError, match="an optimizer shard of 7 elements"):
        prove_ownership([a], parameters(a), [*mains(a), torch.ones(7)])


def test_bytes_are_those_of_bf16_weights_and_of_an_fp32_main_with_two_moments() -> None:
    made = operator("a", 3, 4)
    assert (made.rest_bytes, made.full_bytes) == (2 * 7, 12 * 7)


def test_the_table_has_one_row_per_kind_and_adds_up() -> None:
    lines = table([operator("a", 3), operator("b", 4), operator("r", 2, kind=Kind.ROUTER)])
    rows = [line.split() for line in lines.splitlines()[1:]]
    assert rows == [["expert", "2", "7", "84", "14"], ["router", "1", "2", "24", "4"]]


def test_optimizer_state_is_seen_live_by_name_and_non_tensors_are_named() -> None:
    main = torch.ones(2)
    state: dict[torch.Tensor, dict[str, object]] = {}
    access = StateAccess(state, main)
    assert (access.tensors(), access.others()) == ({}, [])
    moment = torch.zeros(2)
    access.put("exp_avg", moment)
    state[main]["step"] = 3
    state[main]["max_exp_avg"] = None
    assert access.tensors()["exp_avg"] is moment
    assert access.others() == ["step"]
    access.clear()
    assert access.tensors() == {}
