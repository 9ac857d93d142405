"""What the agent of a node has been asked to run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from megatron_moetion.agent.escalation import NOTHING_TRIED, Tried
from megatron_moetion.agent.fallback import BEGUN_AFRESH, Begun
from megatron_moetion.agent.membership import DEFAULT_LEASE, Members
from megatron_moetion.config import DEFAULT_BUDGET, RestartBudget
from megatron_moetion.faults import Fault
from megatron_moetion.vault.placement import Placement


@dataclass(frozen=True)
class Program:
    """What a worker runs.

    Attributes:
        interpreter: how Python is started; empty with --no-python.
        module: `script` is a module's name.
        script: path, module or (--no-python) executable.
        args: its arguments.
    """

    interpreter: tuple[str, ...]
    module: bool
    script: str
    args: tuple[str, ...]

    @property
    def command(self) -> list[str]:
        """For a cold start."""
        return [*self.interpreter, *(["-m"] if self.module else []), self.script, *self.args]


@dataclass(frozen=True)
class Job:
    """All that the agent of a node needs to know.

    Attributes:
        members: all nodes.
        program: what the workers run; None where somebody else starts them.
        env: environment of every worker, without its rank.
        protected: --moetion is among the script's arguments.
        num_spares: warm spares that this node keeps where they cannot fork; 0 keeps none.
        directory: of the run's events; None keeps none.
        secret: the job's.
        timeout: for each phase of a recovery.
        placement: where copies of frames go.
        faults: the script of the whole job.
        fired: those that were injected before this agent began again, by index.
        spills: folder of this node's spills; None without them.
        script_args: what the workers are given, whoever starts them.
        begun: what it starts from; the leader's counts.
        replaces_nodes: another node may take the place of a lost one.
        hang_factor: of --moetion-hang-factor.
        max_retries: of --moetion-max-retries.
        budget: of --moetion-restart-budget.
        tried: against failures, before this agent began again.
        distrusted: before that the host had rejected what came of the state.
        lease: how long an agent that is silent counts as there; the leader's counts.
    """

    members: Members
    program: Program | None
    env: Mapping[str, str]
    protected: bool
    num_spares: int
    directory: str | None
    secret: bytes
    timeout: timedelta
    placement: Placement
    faults: tuple[Fault, ...]
    fired: tuple[int, ...] = ()
    spills: Path | None = None
    script_args: tuple[str, ...] = ()
    begun: Begun = BEGUN_AFRESH
    replaces_nodes: bool = False
    hang_factor: float = 0.0
    max_retries: int = 3
    budget: RestartBudget = DEFAULT_BUDGET
    tried: Tried = NOTHING_TRIED
    distrusted: bool = False
    lease: timedelta = DEFAULT_LEASE

    def rank_env(self, global_rank: int, epoch: int) -> dict[str, str]:
        """What a worker's environment has besides `env`: torchrun's names, and ours."""
        members, own = self.members, self.members.own
        return {
            "RANK": str(global_rank),
            "LOCAL_RANK": str(global_rank - own.first_global_rank),
            "ROLE_RANK": str(global_rank),
            "GROUP_RANK": str(own.node_rank),
            "WORLD_SIZE": str(members.world_size),
            "ROLE_WORLD_SIZE": str(members.world_size),
            "LOCAL_WORLD_SIZE": str(own.num_workers),
            "GROUP_WORLD_SIZE": str(len(members.nodes)),
            # Above 0 it is a replacement.
            "MOETION_EPOCH": str(epoch),
        }
