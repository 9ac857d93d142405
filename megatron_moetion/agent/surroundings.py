"""What another launcher, torchrun or srun, tells the workers that it starts."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

TORCHRUN = "TORCHELASTIC_RUN_ID"
SRUN = "SLURM_STEP_ID"
"""Variables that only workers of that launcher have."""
STEP_DAEMON = "slurmstepd"


@dataclass(frozen=True)
class Surroundings:
    """A worker's place in a job of another launcher.

    Attributes:
        launcher: pid of the process on this node that starts the workers and ends after them.
        node_rank: of this node.
        num_nodes: of the job.
        num_workers: on this node.
        store: where torch's store of the job is: host and port.
        hosts_store: nobody hosts that store yet; node 0's agent is to.
        starts_anew: the launcher starts workers again after a failure, if it may at all.
    """

    launcher: int
    node_rank: int
    num_nodes: int
    num_workers: int
    store: tuple[str, int]
    hosts_store: bool
    starts_anew: bool


def find(env: Mapping[str, str]) -> Surroundings | None:
    """Where this worker is; None without a launcher that is known.

    Raises:
        ValueError: the launcher's own variables do not say it.
    """
    if TORCHRUN in env:
        num_nodes = int(env.get("GROUP_WORLD_SIZE", "1"))
        if num_nodes > 1 and env.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            raise ValueError("torchrun shares no store: unset TORCH_DISABLE_SHARE_RDZV_TCP_STORE")
        return Surroundings(
            launcher=os.getppid(),
            node_rank=int(env.get("GROUP_RANK", "0")),
            num_nodes=num_nodes,
            num_workers=int(env["LOCAL_WORLD_SIZE"]),
            store=_store(env),
            hosts_store=False,
            starts_anew=True,
        )
    if SRUN in env and "RANK" in env:
        node_rank, tasks = (
            int(env["SLURM_NODEID"]),
            tasks_per_node(env["SLURM_STEP_TASKS_PER_NODE"]),
        )
        ranks = range(sum(tasks[:node_rank]), sum(tasks[: node_rank + 1]))
        if int(env["RANK"]) not in ranks:
            raise ValueError(
                f"rank {env['RANK']} is on node {node_rank} and not among ranks {ranks.start} to"
                f" {ranks.stop - 1}: let neighbours be together (srun --distribution=block)"
            )
        return Surroundings(
            launcher=_ancestor(STEP_DAEMON),
            node_rank=node_rank,
            num_nodes=int(env["SLURM_STEP_NUM_NODES"]),
            num_workers=len(ranks),
            store=_store(env),
            hosts_store=True,
            starts_anew=False,
        )
    return None


def tasks_per_node(text: str) -> list[int]:
    """Slurm's short form, for example "2(x3),1"."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(times or 1)
    return counts


def _store(env: Mapping[str, str]) -> tuple[str, int]:
    return env.get("MASTER_ADDR", "127.0.0.1"), int(env.get("MASTER_PORT") or 0)


def _ancestor(name: str) -> int:
    """The nearest process above this one that has this name."""
    pid = os.getpid()
    while pid > 1:
        # "pid (name) state parent ..."; a name may hold anything, parentheses too.
        fields = Path(f"/proc/{pid}/stat").read_text()
        command, _, rest = fields.partition("(")[2].rpartition(")")
        if command == name:
            return pid
        pid = int(rest.split()[1])
    raise ValueError(f"no process above this one is {name}")
