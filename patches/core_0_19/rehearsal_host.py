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

_EXPECTED = "CPU RNG state changed within GPU RNG context"


def use_compiled_helpers(datasets_utils: ModuleType) -> None:
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


def allow_sequence_parallel_norm(torch_norm: ModuleType) -> None:
    """Let the local layer spec's norm take part in sequence parallelism.

    The host refuses torch's norms there because their parameters lack the mark by which the
    gradient of a replicated parameter is summed over tensor-parallel ranks; here they get it.

    Args:
        torch_norm: ``megatron.core.transformer.torch_norm``.
    """
    wrapped: Any = torch_norm.WrappedTorchNorm
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
