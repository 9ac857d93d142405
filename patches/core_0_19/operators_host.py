"""Finds the operators in a built Megatron model, and this rank's optimizer shards of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from megatron_moetion.operators import (
    GradientAccess,
    Kind,
    Operator,
    ParamState,
    StateAccess,
    prove_ownership,
)

_LAYER = re.compile(r"^(?P<stack>.*?layers)\.(?P<layer>\d+)\.(?P<rest>.*)$")
_EXPERT = re.compile(
    r"mlp\.experts\.(?:local_experts\.(\d+)\.|linear_fc[12]\.(?:weight|bias)(\d+)$)"
)


def canonical_parameters(model: Sequence[torch.nn.Module]) -> dict[str, torch.nn.Parameter]:
    """Trainable parameters of all model chunks by a name that wrappers do not change."""
    return {name: p for name, p in _named(model, "parameters") if p.requires_grad}


def canonical_buffers(model: Sequence[torch.nn.Module]) -> dict[str, torch.Tensor]:
    """Buffers of all model chunks by name; shared buffers once."""
    return dict(_named(model, "buffers"))


def _named(model: Sequence[torch.nn.Module], what: str) -> Iterator[tuple[str, Any]]:
    for index, chunk in enumerate(model):
        for name, value in getattr(chunk, f"named_{what}")():
            if value is not None:
                yield f"chunk{index}.{name.replace('module.', '')}", value


def find_operators(
    model: Sequence[torch.nn.Module], optimizer: Any, gradients: bool = False
) -> list[Operator]:
    """Groups every trainable parameter into operators; proves that each is owned exactly once.

    Args:
        gradients: give access to what the optimizers' updates take.

    Raises:
        operators.OwnershipError: naming what is missing or owned twice.
    """
    shards = {
        id(param): (light, main, state) for param, light, main, state in optimizer_shards(optimizer)
    }
    parameters, sharers = canonical_parameters(model), _sharers(optimizer)
    found: dict[str, Operator] = {}
    for name, param in parameters.items():
        kind, operator_name = _place(name)
        operator = found.setdefault(operator_name, Operator(operator_name, kind))
        operator.numel += -(-param.numel() // sharers.get(id(param), 1))
        nothing = torch.empty(0, dtype=param.dtype, device=param.device)
        light, main, state = shards.get(id(param), (nothing, nothing, {}))
        access = StateAccess(state, main)
        gradient = GradientAccess(main, "grad") if gradients else None
        operator.params.append(ParamState(name, param, light, main, access, gradient))
    prove_ownership(list(found.values()), parameters, [main for _, main, _ in shards.values()])
    return list(found.values())


def _place(name: str) -> tuple[Kind, str]:
    chunk, _, rest = name.partition(".")
    match = _LAYER.match(rest)
    if match is None:
        if rest.startswith("embedding."):
            return Kind.EMBEDDING, f"{chunk}.embedding"
        if rest.startswith("output_layer."):
            return Kind.HEAD, f"{chunk}.output_layer"
        return Kind.LAYER, f"{chunk}.rest"
    layer = f"{chunk}.{match['stack']}.{match['layer']}"
    expert = _EXPERT.search(match["rest"])
    if expert is not None:
        return Kind.EXPERT, f"{layer}.expert.{expert[1] or expert[2]}"
    if "mlp.router." in match["rest"]:
        return Kind.ROUTER, f"{layer}.router"
    return Kind.LAYER, f"{layer}.rest"


def expert_places(
    model: Sequence[torch.nn.Module],
) -> tuple[dict[int, int], dict[str, tuple[int, int]]]:
    """Routers by id, each with its number in this stage, and where the load of each expert of this
    rank stands, by operator name: (number of its router, its number among all experts).
    """
    routers: dict[int, int] = {}
    places: dict[str, tuple[int, int]] = {}
    for index, chunk in enumerate(model):
        for name, module in chunk.named_modules():
            indices = getattr(module, "local_expert_indices", None)
            router = getattr(module, "router", None)
            if indices is None or router is None:
                continue
            number = routers.setdefault(id(router), len(routers))
            place = f"chunk{index}.{name.replace('module.', '')}.experts.local_experts"
            for local, expert in enumerate(indices):
                places[_place(f"{place}.{local}.")[1]] = (number, expert)
    return routers, places


def inner_optimizers(optimizer: Any) -> list[Any]:
    """The optimizers under a chain, without the stubs of ranks that have nothing to optimize."""
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return [o for o in chained if not getattr(o, "is_stub_optimizer", False)]


def _sharers(optimizer: Any) -> dict[int, int]:
    """By id of a parameter: over how many ranks a distributed optimizer spreads its state."""
    return {
        id(param): buffer.data_parallel_world_size
        for inner in inner_optimizers(optimizer)
        for buffer in getattr(inner, "buffers", ())
        for param in buffer.params
    }


Shard = tuple[torch.nn.Parameter, torch.Tensor, torch.Tensor, dict[torch.Tensor, dict[str, Any]]]


def optimizer_shards(optimizer: Any) -> Iterator[Shard]:
    """(model parameter, flat view of its weights here, FP32 shard, torch optimizer state)."""
    for inner in inner_optimizers(optimizer):
        state = inner.optimizer.state
        if hasattr(inner, "shard_fp32_from_float16_groups"):
            halves = zip(
                inner.model_float16_groups,
                inner.shard_float16_groups,
                inner.shard_fp32_from_float16_groups,
                strict=True,
            )
            wholes = zip(
                inner.model_fp32_groups,
                inner.shard_fp32_groups,
                inner.shard_fp32_groups,
                strict=True,
            )
        elif hasattr(inner, "fp32_from_float16_groups"):
            halves = zip(
                inner.float16_groups,
                inner.float16_groups,
                inner.fp32_from_float16_groups,
                strict=True,
            )
            wholes = zip(*[inner.fp32_from_fp32_groups] * 3, strict=True)
        else:
            halves = zip((), (), (), strict=True)
            groups = [g["params"] for g in inner.optimizer.param_groups]
            wholes = zip(groups, groups, groups, strict=True)
        for params, lights, mains in (*halves, *wholes):
            for param, light, main in zip(params, lights, mains, strict=True):
                yield param, light.detach().view(-1), main, state
