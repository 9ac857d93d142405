"""What the agent has to know of the script's flags; the workers read all of them."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from megatron_moetion import faults
from megatron_moetion.agent.membership import Members
from megatron_moetion.config import AUTO_REPLICAS, Config, ConfigError, from_command_line
from megatron_moetion.vault.placement import Placement, most_copies, place

SWITCHES = ("--moetion", "--moetion-same-domain")
FLAGS = (
    "--moetion-replicas",
    "--moetion-fault",
    "--moetion-cut",
    "--moetion-hang-factor",
    "--moetion-max-retries",
    "--moetion-restart-budget",
)


def option(args: Sequence[str], name: str) -> str | None:
    """Value of an option of the script, the last one if it is repeated."""
    value = None
    for index, arg in enumerate(args):
        if arg == name and index + 1 < len(args):
            value = args[index + 1]
        elif arg.startswith(name + "="):
            value = arg.partition("=")[2]
    return value


def agents_config(script_args: Sequence[str], num_nodes: int) -> Config:
    """The fields of SWITCHES and FLAGS; all others have their defaults.

    Raises:
        ConfigError: one of these is wrong.
    """
    if "--moetion" not in script_args:
        return Config()
    wanted = [flag for flag in SWITCHES if flag in script_args]
    for flag in FLAGS:
        value = option(script_args, flag)
        wanted += [] if value is None else [flag, value]
    return from_command_line(wanted, {"GROUP_WORLD_SIZE": str(num_nodes)})[1]


def placement_of(members: Members, config: Config) -> Placement:
    """Where copies of frames go; says so if there are fewer than usual.

    Raises:
        PlacementError: as asked for, copies would be lost together.
        ConfigError: a fault names a copy that there is not.
    """
    domains = [node.domain for node in members.nodes]
    found = place(domains, _num_copies(domains, config), config.same_domain)
    few = found.num_copies < AUTO_REPLICAS and len(domains) > 1
    if config.moetion and config.replicas == "auto" and few and members.own_node_rank == 0:
        print(
            f"moetion-run: each frame has {found.num_copies} copies on other nodes and not"
            f" {AUTO_REPLICAS}: the {len(domains)} nodes are in {len(set(domains))} failure domains"
            " (label them with --failure-domain, or add --moetion-same-domain)",
            file=sys.stderr,
        )
    named = [fault.copy for fault in faults.parse(config.fault) if fault.copy is not None]
    if named and max(named) >= found.num_copies + bool(found.num_copies):
        raise ConfigError(
            f"--moetion-fault names copy={max(named)} and each frame has {found.num_copies} copies"
            " on other nodes"
        )
    return found


def _num_copies(domains: Sequence[str], config: Config) -> int:
    if not config.moetion:
        return 0
    if config.replicas == "auto":
        return min(AUTO_REPLICAS, most_copies(domains, config.same_domain))
    return config.replicas
