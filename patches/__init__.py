"""The only place that imports the host: rows that tie the product to Megatron, and nothing else.

``startup/`` is what `moetion.sh` puts on the path, ``core_0_19/`` holds the rows of one host minor
version. No algorithm lives here; handlers hand over to `megatron_moetion`.
"""

from pathlib import Path

SUPPORTED_HOSTS: dict[tuple[int, int], str] = {(0, 19): "core_0_19"}
"""Supported (major, minor) of megatron-core, and the folder with the rows for it."""

PREIMPORT: tuple[str, ...] = (
    "torch",
    "torch.distributed",
    "torch._dynamo",
    "megatron.core",
    "megatron.training",
    "megatron.training.arguments",
    "megatron.training.training",
    "megatron.core.tokenizers.text.models",
    "megatron_moetion_patches.core_0_19.warm",
)
"""What a warm spare imports before it knows which rank it will be."""

STARTUP = Path(__file__).resolve().parent / "startup"
"""The directory that has to come first on ``PYTHONPATH``."""
