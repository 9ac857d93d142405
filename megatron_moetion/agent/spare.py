"""The program of a warm spare: import, wait for an assignment, become the worker.

Run by path, and only the standard library at the top, so that it needs nothing on `sys.path`.
"""

import contextlib
import importlib
import json
import os
import runpy
import sys
import threading
import time
import warnings
from typing import Any

SPARE_FD = "MOETION_SPARE_FD"
SPARE_NICENESS = "MOETION_SPARE_NICENESS"
PREIMPORT = "MOETION_PREIMPORT"
NICENESS = 10


def main() -> None:
    """Prepare, report, wait; the end of the agent's side of the socket ends this process."""
    fd = int(os.environ.pop(SPARE_FD))
    os.set_inheritable(fd, False)
    niceness = int(os.environ.pop(SPARE_NICENESS, "0"))
    nice = niceness > 0 and may_renice()
    if nice:
        os.setpriority(os.PRIO_PROCESS, 0, niceness)
    started = time.monotonic()
    # The workers have shown what these imports warn of. Only the printing is off: filters that a
    # module installs must stay.
    show, warnings.showwarning = warnings.showwarning, lambda *_, **__: None
    for name in modules_to_import():
        preimport(name)
    warnings.showwarning = show
    ready = {"ready_after_ms": round((time.monotonic() - started) * 1000)}
    # The agent closes its end when it assigns, which it may do before this process is ready.
    with contextlib.suppress(BrokenPipeError):
        os.write(fd, json.dumps(ready).encode() + b"\n")
    with open(fd, "rb") as lines:
        line = lines.readline()
    if not line.endswith(b"\n"):
        sys.exit(0)
    if nice:
        os.setpriority(os.PRIO_PROCESS, 0, 0)
    become(json.loads(line))


def modules_to_import() -> list[str]:
    """MOETION_PREIMPORT (comma separated) if it is set, else what the patch layer names."""
    chosen = os.environ.get(PREIMPORT)
    if chosen is not None:
        return [name for name in chosen.split(",") if name]
    try:
        patches = importlib.import_module("megatron_moetion_patches")
    except ModuleNotFoundError:
        return ["torch"]
    return list(patches.PREIMPORT)


def may_renice() -> bool:
    """Whether this process may take its niceness back, tried on a throw-away thread."""
    allowed = []

    def probe() -> None:
        # Linux keeps niceness per thread, so this leaves the process as it is.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        try:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 0)
        except PermissionError:
            return
        allowed.append(True)

    thread = threading.Thread(target=probe)
    thread.start()
    thread.join()
    return bool(allowed)


def preimport(name: str) -> None:
    """Import ahead of time; a module that this job lacks is the script's own business later."""
    try:
        importlib.import_module(name)
    except ImportError as error:
        print(f"moetion-run: the spare could not import {name}: {error}", file=sys.stderr)


def become(assignment: dict[str, Any]) -> None:
    """Run the script as a fresh interpreter would."""
    os.environ.update(assignment["env"])
    sys.argv = assignment["argv"]
    if assignment["module"]:
        # What `python -m` does: the current directory comes first.
        sys.path[0] = os.getcwd()
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
