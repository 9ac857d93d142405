"""`moetion-run`: its spare imports while it does the same itself, which takes seconds each."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from megatron_moetion.agent.environment import UsageError, interpreter, worker_base_env
from megatron_moetion.agent.spares import Spare


def main() -> NoReturn:
    """Run a job's part on this node and exit with the job's code."""
    # Until the agent has a loop: while it waits for others in the store, no handler would run.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    spare = spare_ahead(sys.argv[1:])
    # Behind this import is torch.
    from megatron_moetion.agent import launcher

    launcher.main(spare=spare)


def spare_ahead(argv: Sequence[str]) -> Spare | None:
    """A spare for a command line that is not parsed yet, where it is sure to want one."""
    words = [word.replace("_", "-") for word in argv]
    options = dict(zip(words, [*argv[1:], ""], strict=False))
    spares, num_workers = options.get("--spares"), options.get("--nproc-per-node", "")
    unclear = {"--no-python", "--help", "-h"} & set(words) or any("spares=" in w for w in words)
    wanted = "--moetion" in argv if spares is None else spares not in ("", "0")
    if not wanted or unclear or not num_workers.isdecimal():
        return None
    try:
        return Spare(interpreter(), worker_base_env(int(num_workers)))
    except UsageError:
        # The launcher says so, in its turn.
        return None


if __name__ == "__main__":
    main()
