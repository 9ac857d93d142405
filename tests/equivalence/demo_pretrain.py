"""The demo's script, in a file that costs nothing to import.

Megatron starts a process of its own at the first save of each rank, by `spawn`, which imports the
file again that the rank was started with. In the demo's own that is torch, Megatron and all.
"""

from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "launch" / "demo" / "pretrain_moe.py"

if __name__ == "__main__":
    exec(compile(SCRIPT.read_text(), SCRIPT, "exec"))
