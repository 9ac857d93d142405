"""The agent of a node whose workers another launcher starts: plain torchrun.

The first local worker starts it, and it outlives the worker group: when the launcher has ended all
workers and started them anew, they find what the old ones had captured, and every stage converts
and replays. It ends with the job or with the launcher.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from megatron_moetion.agent.wire import ABSTRACT_MARK

LAUNCHED = "TORCHELASTIC_RUN_ID"
"""Only torchrun's workers have it; its children are the workers themselves."""


class NoAgent(RuntimeError):
    """The agent of this node could not be started; one line with what to do."""


def join(script_args: Sequence[str]) -> bool:
    """Have this worker find the agent of its node in the environment, as moetion-run's do.

    Args:
        script_args: the command line behind the script's name.

    Returns:
        Whether there is one: not with several nodes, nor without torchrun.

    Raises:
        NoAgent: it could not be started.
    """
    if os.environ.get("MOETION_AGENT"):
        return True
    num_workers = int(os.environ.get("LOCAL_WORLD_SIZE") or 0)
    if LAUNCHED not in os.environ or num_workers != int(os.environ.get("WORLD_SIZE") or 0):
        return False
    launcher = os.getppid()
    folder = Path(tempfile.gettempdir()) / f"moetion-{os.getuid()}-{launcher}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise NoAgent(f"{folder} belongs to somebody else: remove it or set TMPDIR")
    with _locked(folder / "starting"):
        if not _held(folder / "alive"):
            # Its worker may have been started anew by a launcher with the pid of an older one.
            secret, number = secrets.token_hex(16), secrets.token_hex(6)
            spec = {
                "name": f"{ABSTRACT_MARK}moetion-{number}-0",
                "run_id": number,
                "secret": secret,
                "num_workers": num_workers,
                "launcher": launcher,
                "folder": str(folder),
                "script_args": list(script_args),
            }
            _start(spec)
            (folder / "address").write_text(f"{spec['name']} {secret}")
        name, secret = (folder / "address").read_text().split()
    os.environ |= {"MOETION_AGENT": name, "MOETION_SECRET": secret}
    return True


def _start(spec: dict[str, Any]) -> None:
    command = [sys.executable, "-W", "ignore", "-m", __name__]
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


def main() -> NoReturn:
    """Run the agent that a specification on standard input describes."""
    # Behind these imports is torch, which a worker has imported itself.
    from megatron_moetion.agent.coldstart import NoSpillLeft, SpillDoesNotFit
    from megatron_moetion.agent.environment import UsageError
    from megatron_moetion.config import ConfigError
    from megatron_moetion.vault.placement import PlacementError

    spec = json.load(sys.stdin)
    folder = Path(spec["folder"])
    code = 1
    with (folder / "alive").open("w") as alive:
        fcntl.flock(alive, fcntl.LOCK_EX)
        try:
            code = _run(spec)
        except (UsageError, ConfigError, PlacementError, NoSpillLeft, SpillDoesNotFit) as error:
            print(f"moetion: error: {error}", file=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)
        sys.stderr.flush()
        # The connection threads wait in system calls for ever; nothing is left to be cleaned up.
        os._exit(code)


def _run(spec: dict[str, Any]) -> int:
    from megatron_moetion import faults
    from megatron_moetion.agent import launcher
    from megatron_moetion.agent.guests import Alone, HostedNode
    from megatron_moetion.agent.job import Job
    from megatron_moetion.agent.membership import BACKLOG, Member, Members
    from megatron_moetion.agent.script import agents_config, placement_of
    from megatron_moetion.agent.wire import listen_tcp
    from megatron_moetion.config import from_command_line
    from megatron_moetion.vault.store import VaultStore

    script_args = tuple(spec["script_args"])
    config = from_command_line(script_args, {"GROUP_WORLD_SIZE": "1"})[1]
    listener = listen_tcp("127.0.0.1", BACKLOG)
    own = Member(0, "127.0.0.1", listener.getsockname()[1], spec["num_workers"], 0, "this node")
    members = Members((own,), 0)
    job = Job(
        members=members,
        program=None,
        env={"MOETION_RUN_ID": spec["run_id"], "MOETION_AGENT": spec["name"]},
        protected=True,
        num_spares=0,
        directory=str(config.dir),
        secret=bytes.fromhex(spec["secret"]),
        timeout=config.timeout,
        placement=placement_of(members, agents_config(script_args, 1)),
        faults=faults.parse(config.fault) if config.fault else (),
        spills=launcher.spill_folder(script_args),
    )
    store = VaultStore()
    record = launcher.cold_start(job, script_args, Alone(), store)
    outcome = HostedNode(job, listener, store, record, spec["launcher"], _ready).run()
    # Here the launcher starts everything anew, if it is to be.
    assert isinstance(outcome, int)
    return outcome


def _ready() -> None:
    print("ready", flush=True)
    # What is printed from here on is read by nobody.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())


if __name__ == "__main__":
    main()
