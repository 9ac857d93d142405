"""Runs a training script and writes down which files its process imported.

Usage: python launch/gpu/trace.py OUTPUT.json SCRIPT [ARGUMENT ...]

What the host does without when it is missing is made missing here, so that a bundle of what was
imported stays small and is proved to be enough.
"""

import atexit
import importlib
import json
import runpy
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

OPTIONAL = frozenset(
    {
        "wandb",  # logging to a service
        "transformers",  # tokenizers and checkpoints of others
        "tokenizers",
        "huggingface_hub",
        "sentencepiece",
        "tiktoken",
        "regex",
        "opentelemetry",
        "httpx2",
        "httpcore2",
    }
)
"""Packages that the host imports where it finds them, and trains without."""

LATER = (
    "megatron_moetion.agent",
    "megatron_moetion.agent.spare",
    "torch.testing._internal.distributed.fake_pg",
)
"""Imported by the launcher, a spare and a replacement, none of which the traced run has."""


class _Missing:
    """Makes optional packages look as if they were not installed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Refuses the optional packages, leaves all others to the next finder."""
        if fullname.partition(".")[0] in OPTIONAL:
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)
        return None


def _write(output: str) -> None:
    for name in LATER:
        importlib.import_module(name)
    files = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
    with open(output, "w") as file:
        json.dump(sorted(path for path in files if path), file)


def main() -> None:
    """Command line."""
    output, script, *arguments = sys.argv[1:]
    sys.meta_path.insert(0, _Missing())
    atexit.register(_write, output)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
