"""The program of the warm spare: import everything once, then fork a worker for each assignment.

Run by path, so that it needs nothing on `sys.path`. A worker is forked twice: its parent in between
ends at once, so that the worker becomes a child of the agent, which adopts orphans
(`supervision.adopt_orphans`), and neither lives nor dies with the spare.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import socket
import sys
import time
import warnings
from typing import Any, NoReturn

SPARE_FD = "MOETION_SPARE_FD"
PREIMPORT = "MOETION_PREIMPORT"
LEFT_ALONE = "MOETION_LEFT_ALONE"
"""Set by a worker that has left a native call alone."""
MAX_MESSAGE = 1 << 20
HERE = os.path.dirname(os.path.abspath(__file__))


def main() -> None:
    """Prepare, report, serve; the end of the agent's side of the socket ends this process."""
    agent = os.getppid()
    if sys.path[0] == HERE:
        # No import may find a module of ours in place of its own.
        del sys.path[0]
    # Messages keep their borders on this socket (SOCK_SEQPACKET).
    channel = socket.socket(fileno=int(os.environ.pop(SPARE_FD)))
    channel.set_inheritable(False)
    started = time.monotonic()
    # The first worker shows what its own imports warn of. Only the printing is off: filters that a
    # module installs must stay.
    show, warnings.showwarning = warnings.showwarning, lambda *_, **__: None
    for name in modules_to_import():
        preimport(name)
    warnings.showwarning = show
    # Neither the collector nor a recovery (`recovery/references.py`) has to pass that again, in any
    # worker, and its pages stay shared.
    gc.freeze()
    obstacle = why_not_to_fork()
    ready = {"ready_after_ms": round((time.monotonic() - started) * 1000), "obstacle": obstacle}
    channel.send(json.dumps(ready).encode())
    while message := receive(channel):
        assignment = json.loads(message)
        if obstacle or fork_worker(agent):
            channel.send(json.dumps({"born": assignment["who"], "pid": os.getpid()}).encode())
            channel.close()
            become(assignment)
            return


def receive(channel: socket.socket) -> bytes:
    """The agent's next message; empty when it is gone, whatever it had not read."""
    try:
        return channel.recv(MAX_MESSAGE)
    except ConnectionResetError:
        return b""


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


def preimport(name: str) -> None:
    """Import ahead of time; a module that this job lacks is the script's own business later."""
    try:
        importlib.import_module(name)
    except ImportError as error:
        print(f"moetion-run: the spare could not import {name}: {error}", file=sys.stderr)


def why_not_to_fork() -> str:
    """What a fork would leave broken in the child, or nothing: threads and CUDA do not survive it.

    CUDA is seen by its device files, whoever initialised it.
    """
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        return f"{threads} threads run after the imports"
    if any(target.startswith("/dev/nvidia") for target in open_files()):
        return "the imports opened a GPU"
    return ""


def open_files() -> list[str]:
    """What the descriptors of this process refer to."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        # The descriptor that lists the folder is gone by now.
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/self/fd/{name}"))
    return found


def fork_worker(agent: int) -> bool:
    """Fork a worker as a child of the agent, in a session of its own; True in the worker."""
    adopted, adopt = os.pipe()
    between = os.fork()
    if between:
        os.close(adopted)
        # When this returns, the worker has its new parent.
        os.waitpid(between, 0)
        os.close(adopt)
        return False
    if os.fork():
        os._exit(0)
    os.close(adopt)
    os.read(adopted, 1)
    os.close(adopted)
    runpy.run_path(os.path.join(HERE, "tether.py"))["tie"](agent)
    os.setsid()
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        # A fresh interpreter has a seed of its own; Python's random sees to that by itself.
        numpy.random.seed()
    return True


def become(assignment: dict[str, Any]) -> None:
    """Run the script as a fresh interpreter would."""
    os.environ.update(assignment["env"])
    sys.argv = assignment["argv"]
    script = sys.argv[0]
    if not sys.flags.safe_path:
        # What Python does: `python -m` puts the current directory first, a path its own.
        folder = os.path.dirname(os.path.abspath(script))
        sys.path.insert(0, os.getcwd() if assignment["module"] else folder)
    try:
        if assignment["module"]:
            runpy.run_module(script, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(script, run_name="__main__")
    except SystemExit as ended:
        end(ended.code)
    else:
        end(0)


def end(code: Any) -> NoReturn:
    """What the interpreter does at its end, but for what would wait for threads or crash on them:
    a call into a process group that was left alone never ends.
    """
    if LEFT_ALONE not in os.environ:
        sys.exit(code)
    atexit._run_exitfuncs()
    if isinstance(code, str):
        print(code, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    main()
