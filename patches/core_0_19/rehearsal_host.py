"""Stand-ins for host code that a machine without a GPU cannot run.

Each takes the imported host module and changes one name in it; which module is said in
``AFTER_IMPORT`` of this package. They belong to the rehearsal, so a GPU run never sees them.
"""

import copy
import logging
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

_EXPECTED = "CPU RNG state changed within GPU RNG context"


def use_compiled_helpers(datasets_utils: Any) -> None:
    """Skip compiling the data-set index helper where a compiled one is installed.

    The wheel ships the compiled helper but no Makefile, and the host's start-up runs ``make``. A
    checkout that was never built borrows the helper of the wheel installed beside it.

    Args:
        datasets_utils: ``megatron.core.datasets.utils``.
    """
    compile_helpers = datasets_utils.compile_helpers
    datasets: Any = sys.modules[datasets_utils.__name__.rpartition(".")[0]]
    pattern = "megatron/core/datasets/helpers_cpp*.so"
    found = [path for entry in sys.path for path in sorted(Path(entry or ".").glob(pattern))]
    if found and str(found[0].parent) not in datasets.__path__:
        datasets.__path__.append(str(found[0].parent))

    def compile_unless_found() -> None:
        if not found:
            compile_helpers()

    datasets_utils.compile_helpers = compile_unless_found


def allow_sequence_parallel_norm(torch_norm: Any) -> None:
    """Let the local layer spec's norm take part in sequence parallelism.

    The host refuses torch's norms there because their parameters lack the mark by which the
    gradient of a replicated parameter is summed over tensor-parallel ranks; here they get it.

    Args:
        torch_norm: ``megatron.core.transformer.torch_norm``.
    """
    wrapped = torch_norm.WrappedTorchNorm
    build = wrapped.__new__

    def new(cls: type, config: Any, *args: Any, **kwargs: Any) -> Any:
        if not config.sequence_parallel:
            return build(cls, config, *args, **kwargs)
        admitted = copy.copy(config)
        admitted.sequence_parallel = False
        norm = build(cls, admitted, *args, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = True
        return norm

    wrapped.__new__ = staticmethod(new)


def expect_cpu_draws(rng: ModuleType) -> None:
    """Drop the host's warning about CPU draws inside a device generator's scope.

    In a rehearsal the two generators are one, so it would come with every dropout.

    Args:
        rng: ``megatron.core.tensor_parallel.random``.
    """
    logging.getLogger(rng.__name__).addFilter(lambda record: record.getMessage() != _EXPECTED)


def load_into_torch_adam(distrib_optimizer: Any) -> None:
    """Let the distributed optimizer load a checkpoint into torch's own Adam, the only one on a CPU.

    Two things stand in the way. The host's loading first asks for the optimizer's state and
    expects a step count in it: its fused Adams keep one from the start, torch's has none before
    its first step. And the loaded count reaches the parameter groups only: what the state holds is
    a stale one, or one tensor that all parameters share and would each advance.

    Args:
        distrib_optimizer: ``megatron.core.optimizer.distrib_optimizer``.
    """
    optimizer = distrib_optimizer.DistributedOptimizer
    state_dict, load_state_dict = optimizer.state_dict, optimizer.load_state_dict

    def state_dict_with_steps(self: Any) -> Any:
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                state = self.optimizer.state[parameter]
                # What the first step would itself start from.
                state.setdefault("step", torch.tensor(0.0))
                for moment in self.optimizer_state_keys:
                    if moment not in state:
                        state[moment] = torch.zeros_like(parameter)
        return state_dict(self)

    def load_state_dict_with_steps(self: Any, loaded: Any) -> None:
        load_state_dict(self, loaded)
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                self.optimizer.state[parameter]["step"] = torch.tensor(float(group["step"]))

    optimizer.state_dict = state_dict_with_steps
    optimizer.load_state_dict = load_state_dict_with_steps
