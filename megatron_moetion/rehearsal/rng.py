"""Stands in for the device's random number generator.

Kernels that would draw from the device's generator draw from the CPU's default generator here, so
the two must be one: saving, forking and restoring "the device's" state has to move the state that
dropout really uses.
"""

from typing import Any

import torch


class _EveryIndex:
    """``torch.cuda.default_generators``: any index is the CPU's generator."""

    def __getitem__(self, index: object) -> torch.Generator:
        return torch.default_generator

    def __len__(self) -> int:
        return 1


def _get_rng_state(device: object = "cuda") -> torch.Tensor:
    return torch.default_generator.get_state()


def _set_rng_state(new_state: torch.Tensor, device: object = "cuda") -> None:
    torch.default_generator.set_state(new_state)


def _seed_with(seed: int) -> None:
    torch.default_generator.manual_seed(int(seed))


def _seed_anew() -> None:
    torch.default_generator.seed()


def install() -> None:
    """Bind the CPU's generator under every name the device's is known by."""
    stand_ins = {
        "get_rng_state": _get_rng_state,
        "set_rng_state": _set_rng_state,
        "get_rng_state_all": lambda: [_get_rng_state()],
        "set_rng_state_all": lambda new_states: _set_rng_state(next(iter(new_states))),
        "manual_seed": lambda seed: _seed_with(seed),
        "manual_seed_all": lambda seed: _seed_with(seed),
        "seed": lambda: _seed_anew(),
        "seed_all": lambda: _seed_anew(),
        "initial_seed": lambda: torch.default_generator.initial_seed(),
    }
    for module in (torch.cuda, torch.cuda.random):
        for name, stand_in in stand_ins.items():
            setattr(module, name, stand_in)
    cuda: Any = torch.cuda
    cuda.default_generators = _EveryIndex()
