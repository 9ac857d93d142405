"""What torchrun and srun tell their workers."""

from __future__ import annotations

import os

import pytest

from megatron_moetion.agent import surroundings
from megatron_moetion.agent.surroundings import Surroundings, find, tasks_per_node

ELASTIC = {
    surroundings.TORCHRUN: "none",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "host",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
STEP = {
    surroundings.SRUN: "0",
    "RANK": "5",
    "SLURM_NODEID": "2",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),3",
    "MASTER_ADDR": "host",
    "MASTER_PORT": "29500",
}


def test_of_torchrun() -> None:
    place = Surroundings(os.getppid(), 1, 2, 4, ("host", 29500), False, True)
    assert find(ELASTIC) == place
    # Torchrun itself may run under srun.
    assert find({**STEP, **ELASTIC}) == place


def test_of_torchrun_without_its_store() -> None:
    alone = {**ELASTIC, "TORCHELASTIC_USE_AGENT_STORE": "False"}
    with pytest.raises(ValueError, match="unset TORCH_DISABLE_SHARE_RDZV_TCP_STORE"):
        find(alone)
    place = find({**alone, "GROUP_WORLD_SIZE": "1", "GROUP_RANK": "0"})
    assert place is not None
    assert place.num_nodes == 1


def test_of_srun(monkeypatch: pytest.MonkeyPatch) -> None:
    # Any name of a process above this one will do.
    with open("/proc/self/comm") as comm:
        monkeypatch.setattr(surroundings, "STEP_DAEMON", comm.read().strip())
    assert find(STEP) == Surroundings(os.getpid(), 2, 3, 3, ("host", 29500), True, False)
    with pytest.raises(ValueError, match="rank 3 is on node 2 and not among ranks 4 to 6: let"):
        find({**STEP, "RANK": "3"})


def test_srun_without_its_daemon_above_is_said() -> None:
    with pytest.raises(ValueError, match="no process above this one is slurmstepd"):
        find(STEP)


@pytest.mark.parametrize(
    ("text", "counts"), [("4", [4]), ("2(x3),1", [2, 2, 2, 1]), ("1,2(x2)", [1, 2, 2])]
)
def test_tasks_per_node(text: str, counts: list[int]) -> None:
    assert tasks_per_node(text) == counts


@pytest.mark.parametrize("env", [{}, {"RANK": "0", "WORLD_SIZE": "1"}])
def test_of_nobody(env: dict[str, str]) -> None:
    assert find(env) is None
