"""Rows for megatron-core 0.19: `flags` at moment 1, `rows` at moment 2, `support`: refused.

``AFTER_IMPORT`` belongs to the rehearsal alone: functions of `rehearsal_host` by the host module
that each of them takes, called right after that module's import.
"""

AFTER_IMPORT: dict[str, str] = {
    "megatron.core.datasets.utils": "use_compiled_helpers",
    "megatron.core.optimizer.distrib_optimizer": "load_into_torch_adam",
    "megatron.core.tensor_parallel.random": "expect_cpu_draws",
    "megatron.core.transformer.torch_norm": "allow_sequence_parallel_norm",
}
