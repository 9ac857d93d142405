"""Runs a command that dies with its parent: `python -I -S tether.py PARENT_PID COMMAND...`.

Only the standard library, as it runs before every worker. The pid stays: the command replaces it.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def tie(parent: int) -> None:
    """Have the kernel end this process with its parent; ends it here if the parent is gone."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        sys.exit(f"moetion-run: prctl failed: {os.strerror(ctypes.get_errno())}")
    # The parent may have died before the tie was made.
    if os.getppid() != parent:
        sys.exit(1)


def main() -> None:
    """Tie this process to its parent, then become the command."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    tie(parent)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"moetion-run: cannot start {command[0]}: {error.strerror}")


if __name__ == "__main__":
    main()
