"""The flag rows: the only ones that a job without ``--moetion`` gets.

The host has no seam for flags of an add-on (its ``extra_args_provider`` belongs to the script), so
its parser function is wrapped. The third row is where moment 2 happens: the host hands its final
arguments to this function exactly once, before anything is built from them.
"""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from typing import Any

from megatron_moetion import config as flags
from megatron_moetion.config import Config, ConfigError
from megatron_moetion.interception import Patch

from .. import activation

_FOLDER = __name__.split(".")[-2]


def _add_arguments(host: Callable[..., ArgumentParser], parser: ArgumentParser) -> ArgumentParser:
    return flags.add_arguments(host(parser))


def _parse_args(
    host: Callable[..., Namespace],
    extra_args_provider: Any = None,
    ignore_unknown_args: Any = False,
) -> Namespace:
    try:
        # The host reads the same sys.argv, so a script that edits it is followed.
        ours, config = flags.from_command_line(sys.argv[1:])
    except ConfigError as error:
        activation.refuse(str(error))
    args = host(extra_args_provider, ignore_unknown_args)
    # With --yaml-cfg the host throws its parsed flags away, ours among them.
    for name, value in vars(ours).items():
        setattr(args, name, getattr(args, name, value))
    if config.active:
        activation.check_support(args, config, _FOLDER)
    return args


def _set_global_variables(
    host: Callable[..., None], args: Namespace, build_tokenizer: bool = True
) -> None:
    config = _config(args)
    if config.active:
        activation.moment_two(args, config, _FOLDER)
    host(args, build_tokenizer)


def _config(args: Namespace) -> Config:
    try:
        return flags.from_namespace(args)
    except ConfigError as error:
        activation.refuse(str(error))


ROWS: tuple[Patch, ...] = (
    Patch(
        target="megatron.training.arguments:add_megatron_arguments",
        how="around",
        handler=_add_arguments,
        signature="(parser)",
        digest="580b80fbe586",
        stage="flags",
        group="flags",
        why="adds the --moetion flags to the host's parser",
        retire_when="the host lets an add-on register flags",
    ),
    Patch(
        target="megatron.training.arguments:parse_args",
        how="around",
        handler=_parse_args,
        signature="(extra_args_provider=..., ignore_unknown_args=...)",
        digest="9ae61a4f954f",
        stage="flags",
        group="flags",
        why="refuses bad flags and unsupported features in one line, before the host validates",
        retire_when="the host lets an add-on validate flags",
    ),
    Patch(
        target="megatron.training.global_vars:set_global_variables",
        how="around",
        handler=_set_global_variables,
        signature="(args, build_tokenizer=...)",
        digest="538de84d9ce4",
        stage="flags",
        group="flags",
        why="moment 2: the arguments are final, nothing has been built from them",
        retire_when="the host calls add-ons when its arguments are final",
        also=("megatron.training.arguments:set_global_variables",),
    ),
)
