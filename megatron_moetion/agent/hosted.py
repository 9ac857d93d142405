"""The agent of a node whose workers another launcher starts: plain torchrun or srun.

The first local worker starts it, and it outlives the worker group: when the launcher has ended the
workers of a node and started them anew, they find what the old ones had captured, convert it and
replay. It ends with the job or with the launcher. The agents of several nodes meet as those of
moetion-run do.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_moetion.agent import surroundings
from megatron_moetion.agent.wire import ABSTRACT_MARK

AGENT = "megatron_moetion.agent.guests"


class NoAgent(RuntimeError):
    """The agent of this node could not be started; one line with what to do."""


def join(script_args: Sequence[str]) -> bool:
    """Have this worker find the agent of its node in the environment, as moetion-run's do.

    Args:
        script_args: the command line behind the script's name.

    Returns:
        Whether there is one: not without a launcher that is known.

    Raises:
        NoAgent: it could not be started.
    """
    if os.environ.get("MOETION_AGENT"):
        return True
    try:
        place = surroundings.find(os.environ)
    except (KeyError, ValueError) as error:
        raise NoAgent(f"the launcher does not say where this worker is: {error}") from None
    if place is None:
        return False
    shared = os.environ.get("MOETION_SECRET")
    if shared is None and place.num_nodes > 1:
        raise NoAgent(
            "the agents of several nodes authenticate each other by MOETION_SECRET: set it to the"
            " same random hex string on every node (openssl rand -hex 16)"
        )
    folder = Path(tempfile.gettempdir()) / f"moetion-{os.getuid()}-{place.launcher}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise NoAgent(f"{folder} belongs to somebody else: remove it or set TMPDIR")
    with _locked(folder / "starting"):
        if not _held(folder / "alive"):
            # Its worker may have been started anew by a launcher with the pid of an older one.
            secret, number = shared or secrets.token_hex(16), secrets.token_hex(6)
            spec = {
                "name": f"{ABSTRACT_MARK}moetion-{number}-{place.node_rank}",
                "run_id": number,
                "secret": secret,
                "place": asdict(place),
                "folder": str(folder),
                "script_args": list(script_args),
            }
            _start(spec)
            (folder / "address").write_text(f"{spec['name']} {secret}")
        name, secret = (folder / "address").read_text().split()
    os.environ |= {"MOETION_AGENT": name, "MOETION_SECRET": secret}
    if place.hosts_store and place.num_nodes > 1:
        # Rank 0 must not want to host it, too.
        os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    return True


def _start(spec: dict[str, Any]) -> None:
    command = [sys.executable, "-W", "ignore", "-m", AGENT]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    ) as agent:
        assert agent.stdin is not None
        assert agent.stdout is not None
        agent.stdin.write(json.dumps(spec).encode())
        agent.stdin.close()
        ready = agent.stdout.readline()
        if not ready:
            raise NoAgent("the agent of this node did not start: see the lines above")
        # It lives on; what is left here is not to be waited for.
        agent.returncode = 0


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _held(path: Path) -> bool:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False
