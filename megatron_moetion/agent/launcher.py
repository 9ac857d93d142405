"""`moetion-run`: torchrun's command line, with an agent that keeps the survivors."""

from __future__ import annotations

import argparse
import os
import secrets
import socket
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

from torch.distributed.run import determine_local_world_size, get_args_parser

from megatron_moetion import faults
from megatron_moetion.agent.coldstart import (
    CheckpointsDiffer,
    ColdStart,
    NoSpillLeft,
    SpillDoesNotFit,
    Start,
    share_over,
)
from megatron_moetion.agent.environment import UsageError, interpreter, worker_base_env
from megatron_moetion.agent.escalation import NOTHING_TRIED
from megatron_moetion.agent.fallback import Begun, FallBack, begin_again, inherited, run_again
from megatron_moetion.agent.job import Job, Program
from megatron_moetion.agent.membership import (
    ANY_PLACE,
    Arrival,
    KeyValues,
    Meeting,
    MembershipError,
    Rendezvous,
    arrive,
    meet,
)
from megatron_moetion.agent.node import Node
from megatron_moetion.agent.script import agents_config, option, placement_of
from megatron_moetion.agent.spares import Spare
from megatron_moetion.agent.standby import Dismissed, Signalled, stand_by
from megatron_moetion.agent.wire import ABSTRACT_MARK
from megatron_moetion.config import Config, ConfigError
from megatron_moetion.patch_location import load_patches
from megatron_moetion.vault.placement import PlacementError
from megatron_moetion.vault.spill import FOLDER
from megatron_moetion.vault.store import VaultStore

Outcome = int | FallBack
DEFAULT_PORT = 29500
USAGE_EXIT_CODE = 2
REFUSED = {
    "redirects": "redirect the output of moetion-run instead",
    "tee": "use tee on the output of moetion-run instead",
    "run_path": "give the script's path",
    "virtual_local_rank": "leave it out",
    "numa_binding": "leave it out",
    "local_ranks_filter": "leave it out",
}
"""What torchrun has and moetion-run does not, and what to do instead."""


def build_parser() -> argparse.ArgumentParser:
    """torchrun's parser plus ours."""
    parser = get_args_parser()
    parser.prog = "moetion-run"
    parser.description = "torchrun's command line; a dead worker is replaced, the others live on"
    parser.add_argument(
        "--spares",
        type=int,
        metavar="N",
        help="1 or more: a warm process imports once and forks all workers of this node; where it "
        "cannot fork, N are kept that become one worker each; 0: cold starts (default 1 with "
        "--moetion, else 0)",
    )
    parser.add_argument(
        "--failure-domain",
        default=os.environ.get("MOETION_FAILURE_DOMAIN") or socket.gethostname(),
        metavar="LABEL",
        help="what fails together with this node, for example its rack; copies of frames go to "
        "nodes with other labels (default: $MOETION_FAILURE_DOMAIN, else the host's name)",
    )
    parser.add_argument(
        "--standby",
        action="store_true",
        help="wait, without a part in the job, and take the place of a node that is lost; several "
        "take their turns (--node-rank is not used)",
    )
    # torchrun's defaults cannot be told from a choice; ours depend on the number of nodes.
    parser.set_defaults(
        master_port=os.environ.get("PET_MASTER_PORT"), node_rank=os.environ.get("PET_NODE_RANK")
    )
    return parser


def main(argv: Sequence[str] | None = None, spare: Spare | None = None) -> NoReturn:
    """Run a job's part on this node and exit with the job's code.

    Args:
        argv: without the program's name.
        spare: started ahead, with the environment of `worker_base_env`; ends with this process.
    """
    args = build_parser().parse_args(argv)
    try:
        check(args)
        fall_back = inherited()
        if fall_back is not None and fall_back.node_rank is not None:
            args.standby, args.node_rank = False, fall_back.node_rank
        outcome = _run(args, fall_back, spare)
    except (UsageError, SpillDoesNotFit) as error:
        _fail(str(error), USAGE_EXIT_CODE)
    except (MembershipError, NoSpillLeft, CheckpointsDiffer) as error:
        _fail(str(error), 1)
    except Dismissed as dismissed:
        if dismissed.anew:
            run_again()
        print("moetion-run: the job is over; this standby ends with it", file=sys.stderr)
        outcome = 0
    except Signalled as signalled:
        outcome = 128 + signalled.number
    except KeyboardInterrupt:
        _fail("interrupted before the job started", 130)
    if isinstance(outcome, FallBack):
        begin_again(outcome)
    sys.stdout.flush()
    sys.stderr.flush()
    # The connection threads wait in system calls for ever; nothing is left to be cleaned up.
    os._exit(outcome)


def _run(args: argparse.Namespace, fall_back: FallBack | None, spare: Spare | None) -> Outcome:
    rendezvous = rendezvous_of(args)
    secret = secret_of(rendezvous.num_nodes)
    num_workers = local_world_size(args.nproc_per_node)
    met = arrive(rendezvous, num_workers) if args.standby else meet(rendezvous, num_workers)
    seat, start, store = None, Start(), VaultStore()
    if isinstance(met, Arrival):
        met, seat = stand_by(met, bytes.fromhex(secret), rendezvous.lease)
    job = job_of(args, rendezvous, met, secret, fall_back)
    if seat is None:
        start = cold_start(job, met.store, store, fall_back)
        highest = start.source
        if fall_back is not None:
            highest = max(highest, fall_back.limit.highest)
        job = replace(job, begun=Begun(highest, start.source))
    return Node(job, met.listener, store, start.record, spare, seat).run()


def check(args: argparse.Namespace) -> None:
    """Refuse what torchrun has and moetion-run does not.

    Raises:
        UsageError: naming the option and what to do instead.
    """
    defaults = build_parser()
    for name, instead in REFUSED.items():
        if getattr(args, name, None) != defaults.get_default(name):
            option_name = "--" + name.replace("_", "-")
            raise UsageError(f"{option_name} is not supported by moetion-run: {instead}")
    if args.spares is not None and args.spares < 0:
        raise UsageError(f"--spares {args.spares}: give a number of at least 0")
    if args.no_python and args.module:
        raise UsageError("--no-python and -m contradict each other: drop one")


def rendezvous_of(args: argparse.Namespace) -> Rendezvous:
    """Read --nnodes, --node-rank, --master-*, --rdzv-endpoint and --standalone.

    Raises:
        UsageError: elastic node counts, a missing or impossible node rank, a bad port.
    """
    low, _, high = str(args.nnodes).partition(":")
    if high not in ("", low) or not low.isdecimal() or int(low) < 1:
        raise UsageError(f"--nnodes {args.nnodes}: the number of nodes is fixed, give one number")
    num_nodes = 1 if args.standalone else int(low)
    if args.standby and num_nodes == 1:
        raise UsageError("--standby is for jobs with several nodes: give the --nnodes of the job")
    if num_nodes > 1 and args.node_rank is None and not args.standby:
        raise UsageError(f"--nnodes {num_nodes} needs --node-rank 0..{num_nodes - 1} on each node")
    node_rank = ANY_PLACE if args.standby else int(args.node_rank or 0)
    if node_rank >= num_nodes:
        raise UsageError(f"--node-rank {node_rank} must be below --nnodes {num_nodes}")
    host, _, port = str(args.rdzv_endpoint).rpartition(":")
    if not args.rdzv_endpoint or args.standalone:
        host, port = args.master_addr, args.master_port or ""
    # On one node nobody has to know the port, so no two jobs need to collide.
    fallback = 0 if num_nodes == 1 else DEFAULT_PORT
    script_args = args.training_script_args
    return Rendezvous(
        num_nodes=num_nodes,
        node_rank=node_rank,
        master_addr=host or "127.0.0.1",
        master_port=_number("the master port", port) if port else fallback,
        timeout=seconds_of(script_args, "--moetion-timeout", Config().timeout_seconds),
        domain=args.failure_domain,
        lease=seconds_of(script_args, "--moetion-lease", Config().lease_seconds),
    )


def seconds_of(script_args: Sequence[str], name: str, default: float) -> timedelta:
    """A time that the agents and the workers share.

    Raises:
        UsageError: it is none, or none that can be waited for.
    """
    given = option(script_args, name)
    try:
        seconds = default if given is None else float(given)
    except ValueError:
        raise UsageError(f"{name} {given}: give a number of seconds") from None
    if not 0.0 < seconds < float("inf"):
        raise UsageError(f"{name} {given}: give a number of seconds above 0")
    return timedelta(seconds=seconds)


def secret_of(num_nodes: int) -> str:
    """The job's secret as hex: inherited, or made here when there is only this node.

    Raises:
        UsageError: it is missing or not hex.
    """
    secret = os.environ.get("MOETION_SECRET")
    if secret is None and num_nodes == 1:
        return secrets.token_hex(16)
    hint = "set it to the same random hex string on every node (openssl rand -hex 16)"
    if secret is None:
        raise UsageError(f"several nodes authenticate each other by MOETION_SECRET: {hint}")
    try:
        bytes.fromhex(secret)
    except ValueError:
        raise UsageError(f"MOETION_SECRET is not hex: {hint}") from None
    return secret


def local_world_size(nproc_per_node: str) -> int:
    """torchrun's reading of --nproc-per-node: a number, cpu, gpu or auto.

    Raises:
        UsageError: it is none of these.
    """
    try:
        num_workers = int(determine_local_world_size(nproc_per_node))
    except ValueError as error:
        raise UsageError(f"--nproc-per-node {nproc_per_node}: {error}") from None
    if num_workers < 1:
        raise UsageError(f"--nproc-per-node {nproc_per_node}: at least one worker is needed")
    return num_workers


def job_of(
    args: argparse.Namespace,
    rendezvous: Rendezvous,
    meeting: Meeting,
    secret: str,
    fall_back: FallBack | None = None,
) -> Job:
    """Put together what this node runs.

    Raises:
        UsageError: a flag of ours that the agent has to know is wrong.
    """
    script_args = tuple(args.training_script_args)
    protected = "--moetion" in script_args
    try:
        config = agents_config(script_args, rendezvous.num_nodes)
        placement = placement_of(meeting.members, config)
    except (ConfigError, PlacementError) as error:
        raise UsageError(str(error)) from None
    default_dir, own = str(Config().dir) if protected else None, meeting.members.own
    env = {
        **worker_base_env(own.num_workers),
        "MASTER_ADDR": rendezvous.master_addr,
        "MASTER_PORT": str(meeting.port),
        "TORCHELASTIC_RUN_ID": meeting.run_id,
        "MOETION_RUN_ID": meeting.run_id,
        "MOETION_SECRET": secret,
        # An agent that had this place before may still hold its name, if it was on this host.
        "MOETION_AGENT": f"{ABSTRACT_MARK}moetion-{meeting.run_id}-{own.node_rank}.{own.tenure}",
        "MOETION_TIMEOUT": f"{rendezvous.timeout.total_seconds():g}",
    }
    return Job(
        members=meeting.members,
        program=Program(
            interpreter=() if args.no_python else interpreter(),
            module=args.module,
            script=args.training_script,
            args=script_args,
        ),
        env=env,
        protected=protected,
        num_spares=int(protected) if args.spares is None else args.spares,
        directory=option(script_args, "--moetion-dir") or default_dir,
        secret=bytes.fromhex(secret),
        timeout=rendezvous.timeout,
        placement=placement,
        faults=faults.parse(config.fault),
        fired=() if fall_back is None else fall_back.fired,
        spills=spill_folder(script_args),
        script_args=script_args,
        replaces_nodes=protected and placement.num_copies > 0,
        hang_factor=config.hang_factor if protected else 0.0,
        max_retries=config.max_retries,
        budget=config.restart_budget,
        tried=NOTHING_TRIED if fall_back is None else fall_back.tried,
        distrusted=fall_back is not None and fall_back.distrusted,
        lease=rendezvous.lease,
    )


def cold_start(
    job: Job, exchange: KeyValues, store: VaultStore, fall_back: FallBack | None = None
) -> Start:
    """Find what all nodes can go on from, and load it into this node's vault if it is a spill.

    Args:
        exchange: where the nodes tell each other what they have.
        fall_back: why this job begins again, if it does.

    Raises:
        NoSpillLeft: see `ColdStart.take`.
        CheckpointsDiffer: see `ColdStart.take`.
        UsageError: there is nothing to export.
        SpillDoesNotFit: see `ColdStart.take`.
    """
    if not job.protected:
        return Start()
    idle = Path(job.directory) / FOLDER if job.spills is None and job.directory else None
    if idle is not None and any(idle.glob("*-*")):
        line = f"the spills in {idle} are not used without --moetion-spill-interval"
        print(f"moetion-run: {line}", file=sys.stderr)
    checkpoint = load_patches("checkpoint").newest(job.script_args)
    share = share_over(exchange, job.members)
    limit = None if fall_back is None else fall_back.limit
    start = ColdStart(job.spills, job.members, share, checkpoint, limit).take(store)
    exports = job.spills is not None and option(job.script_args, "--moetion-export") is not None
    if exports and start.record is None:
        raise UsageError(f"--moetion-export: no spill in {job.spills} to be exported")
    return start


def spill_folder(script_args: Sequence[str]) -> Path | None:
    """Where spills lie; None when the script's flags ask for none."""
    interval = option(script_args, "--moetion-spill-interval") or "0"
    if "--moetion" not in script_args or not interval.isdecimal() or not int(interval):
        # What is not a number is refused by the workers, with all other flags.
        return None
    return Path(option(script_args, "--moetion-dir") or Config().dir).absolute() / FOLDER


def _number(what: str, text: str | int) -> int:
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"{what}: {text!r} is not a number") from None


def _fail(line: str, code: int) -> NoReturn:
    print(f"moetion-run: error: {line}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
