"""Operators: the units of capture, found in a built model.

An operator is one expert of one layer, one router, the non-expert rest of one layer, the embedding,
or the output head (design section 2). Here they are plain records over the tensors of one rank; the
host adapter in `patches/` finds them by walking modules.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import torch

from megatron_moetion.parts import Part

LIGHT, GRADIENT = "light", "gradient"
"""Names of what a frame holds of an operator when it is not its turn: its compute weights under the
stage cut, the gradient of that iteration under the shard cut.
"""


class Kind(StrEnum):
    """What an operator is; members in order of capture inside a window, coldest first."""

    EXPERT = "expert"
    EMBEDDING = "embedding"
    HEAD = "head"
    LAYER = "layer"
    ROUTER = "router"


class StateAccess:
    """Access to one entry of a torch optimizer's `state`."""

    def __init__(self, state: dict[torch.Tensor, dict[str, object]], key: torch.Tensor) -> None:
        self._state, self._key = state, key

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor that the optimizer keeps for this parameter, by name; live, not copies."""
        entry = self._state.get(self._key, {})
        return {k: v for k, v in sorted(entry.items()) if isinstance(v, torch.Tensor)}

    def others(self) -> list[str]:
        """Names of entries that are no tensors; such an optimizer is refused at start."""
        entry = self._state.get(self._key, {})
        return [k for k, v in entry.items() if not isinstance(v, torch.Tensor) and v is not None]

    def put(self, name: str, value: torch.Tensor) -> None:
        self._state.setdefault(self._key, {})[name] = value

    def clear(self) -> None:
        self._state.pop(self._key, None)


class GradientAccess:
    """Access to the gradient that the optimizer's update takes; an attribute of what it updates."""

    def __init__(self, main: torch.Tensor, attribute: str) -> None:
        self._main, self._attribute = main, attribute

    def get(self) -> torch.Tensor | None:
        """Live, not a copy; None where there is none, and then the update passes this parameter."""
        found: torch.Tensor | None = getattr(self._main, self._attribute, None)
        return found

    def put(self, value: torch.Tensor | None) -> None:
        setattr(self._main, self._attribute, value)


@dataclass
class ParamState:
    """The state of one parameter on one rank.

    Attributes:
        name: canonical name, the same in every run with the same parallel layout.
        param: the model's parameter, frozen and thawed in replay.
        light: flat view of this rank's shard of the compute weights (2 B/param in BF16).
        main: this rank's FP32 shard, or the same tensor as `light` for parameters trained in FP32.
        states: the optimizer's tensors for `main`; none before the first step.
        gradient: what the update takes, of the shape of `main`; None under the stage cut.
    """

    name: str
    param: torch.nn.Parameter
    light: torch.Tensor
    main: torch.Tensor
    states: StateAccess
    gradient: GradientAccess | None = None

    @property
    def rest(self) -> tuple[str, torch.Tensor | None]:
        """What a frame holds of this parameter when it is not its turn, and the name of that."""
        if self.gradient is None:
            return LIGHT, self.light
        return GRADIENT, self.gradient.get()


@dataclass
class Operator:
    """One unit of capture on this rank.

    `numel` is what a rank holds on average: whole parameters divided by the ranks that share their
    state, not this rank's shard, so that data-parallel peers order, split and balance alike.
    """

    name: str
    kind: Kind
    params: list[ParamState] = field(default_factory=list)
    numel: int = 0

    @property
    def rest_bytes(self) -> int:
        """Bytes of a frame in which it is not this operator's turn, at most."""
        return sum((p.light if p.gradient is None else p.main).nbytes for p in self.params)

    @property
    def full_bytes(self) -> int:
        """Bytes of the full state once the optimizer has stepped (FP32 main and two moments)."""
        return self.part_bytes(Part(self.name))

    def part_bytes(self, part: Part) -> int:
        """Bytes of a part of the full state."""
        return sum(3 * p.main.itemsize * part.stretch(p.main.numel()).numel for p in self.params)


class OwnershipError(RuntimeError):
    """A byte of training state belongs to no operator, or to two."""


def prove_ownership(
    operators: Sequence[Operator],
    parameters: Mapping[str, torch.nn.Parameter],
    mains: Iterable[torch.Tensor],
) -> None:
    """Checks that every parameter and every optimizer shard is in exactly one operator.

    Args:
        operators: what was found.
        parameters: all trainable parameters of this rank's model chunks, by canonical name.
        mains: every tensor in the optimizer's param groups on this rank.

    Raises:
        OwnershipError: naming the first parameter that is missing or owned twice.
    """
    owner: dict[int, str] = {}
    for operator in operators:
        for state in operator.params:
            if id(state.param) in owner:
                raise OwnershipError(
                    f"parameter {state.name} belongs to {owner[id(state.param)]} "
                    f"and to {operator.name}"
                )
            owner[id(state.param)] = operator.name
    for name, param in parameters.items():
        if id(param) not in owner:
            raise OwnershipError(f"parameter {name} belongs to no operator")
    owned = {id(s.main) for o in operators for s in o.params}
    for main in mains:
        if id(main) not in owned:
            raise OwnershipError(
                f"an optimizer shard of {main.numel()} elements belongs to no operator"
            )


def table(operators: Sequence[Operator]) -> str:
    """The ownership table printed at start: one row per kind, bytes of this rank's shard."""
    lines = [
        f"{'kind':<10} {'operators':>9} {'parameters':>12} {'full bytes':>12} {'other bytes':>12}"
    ]
    for kind in Kind:
        group = [o for o in operators if o.kind is kind]
        if group:
            lines.append(
                f"{kind.value:<10} {len(group):>9} {sum(o.numel for o in group):>12} "
                f"{sum(o.full_bytes for o in group):>12} {sum(o.rest_bytes for o in group):>12}"
            )
    return "\n".join(lines)
