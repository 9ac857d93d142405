"""``python -m megatron_moetion doctor``: what is installed, if it fits, what would be refused."""

import argparse
import importlib
import importlib.metadata
import inspect
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_moetion import config as flags
from megatron_moetion.config import ConfigError
from megatron_moetion.fingerprint import signature_of, source_digest
from megatron_moetion.interception import (
    InterceptionError,
    Patch,
    locate,
    verify_all,
)

from . import activation

LOCALIZED = "moetion-run"
"""The launcher under which a failed stage is rebuilt while the others wait."""

_HOST_MODULES = ("megatron.training", "megatron.training.arguments", "megatron.training.training")


def run(command_line: Sequence[str]) -> int:
    """Prints the report.

    Returns:
        0 when every row fits and the command line, if one is given, would be accepted; else 1.
    """
    console = Console() if os.isatty(1) else Console(width=160)
    activation.install_rehearsal()
    try:
        for name in _HOST_MODULES:
            importlib.import_module(name)
    except ModuleNotFoundError as error:
        console.print(f"host: cannot be imported, no module {error.name}: install megatron-core")
        return 1
    version = activation.host_version()
    folder = activation.host_folder(version)
    console.print(_versions(version, folder))
    if folder is None:
        console.print(
            f"megatron-core {version} is not supported: install one of "
            f"{activation.supported_hosts()}"
        )
        return 1
    table, num_errors = _row_states(folder)
    console.print(table)
    console.print(_unsupported_table(folder))
    console.print(
        f"localized recovery: single workers only under {LOCALIZED}; when plain torchrun starts "
        "all workers of a node anew (--max-restarts), they go on from what the node's agent holds; "
        "under srun a failure ends the job, and the same command goes on from the newest spill"
    )
    complaints = _complaints(command_line, folder) if command_line else []
    for line in complaints:
        console.print(f"command line: {line}", soft_wrap=True)
    if command_line and not complaints:
        console.print("command line: accepted")
    return 1 if num_errors or complaints else 0


def describe(targets: Sequence[str]) -> int:
    """Prints signature, digest and further bindings of host attributes, for writing rows."""
    activation.install_rehearsal()
    for name in _HOST_MODULES:
        importlib.import_module(name)
    code = 0
    for target in targets:
        try:
            host = locate(target)
        except InterceptionError as error:
            print(error)
            code = 1
            continue
        print(f"target={target!r},")
        print(f"signature={signature_of(host)!r},")
        print(f"digest={source_digest(host)!r},")
        probe = Patch(target, "around", None, signature_of(host), "", "", "")
        for problem in verify_all((probe,), activation.SWEEP):
            print(f"# {problem.text}")
    return code


def _versions(version: str, folder: str | None) -> Table:
    torch: Any = importlib.import_module("torch")
    rehearsal: Any = importlib.import_module("megatron_moetion.rehearsal")
    core: Any = importlib.import_module("megatron.core")
    table = Table("what", "version", "where or how", title="versions", title_justify="left")
    product: Any = importlib.import_module("megatron_moetion")
    table.add_row("megatron_moetion", product.__version__, str(Path(product.__file__).parent))
    state = f"rows of {folder}" if folder else f"supported: {activation.supported_hosts()}"
    table.add_row("megatron-core", version, f"{Path(core.__file__).parent.parent} ({state})")
    how = "rehearsal on CPU" if rehearsal.wanted() else f"CUDA {torch.version.cuda}"
    table.add_row("torch", torch.__version__, how)
    table.add_row("python", platform.python_version(), platform.platform())
    for name in ("transformer-engine", "nvidia-resiliency-ext"):
        table.add_row(name, _installed(name), "optional")
    return table


def _installed(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "-"


def _row_states(folder: str) -> tuple[Table, int]:
    rows: tuple[Patch, ...] = (
        *activation.part(folder, "flags").ROWS,
        *activation.part(folder, "rows").ROWS,
    )
    problems = verify_all(rows, activation.SWEEP)
    table = Table("target", "how", "group", "stage", "state", title="rows", title_justify="left")
    for row in rows:
        found = [problem for problem in problems if problem.target == row.target]
        state = "; ".join(f"{problem.severity}: {problem.text}" for problem in found) or "ok"
        table.add_row(row.target, row.how, row.group, row.stage, state)
    return table, sum(problem.severity == "error" for problem in problems)


def _unsupported_table(folder: str) -> Table:
    title = "refused in a protected run"
    table = Table("feature", "instead", title=title, title_justify="left")
    for row in activation.part(folder, "support").TABLE:
        table.add_row(row.feature, row.instead)
    return table


def _complaints(command_line: Sequence[str], folder: str) -> list[str]:
    """What in a training command line would be refused, or would not do what it seems to."""
    arguments: Any = importlib.import_module("megatron.training.arguments")
    parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
    # Under a sourced moetion.sh the host's function is ours around theirs.
    flags.add_arguments(inspect.unwrap(arguments.add_megatron_arguments)(parser))
    try:
        flags.check_spelling(command_line)
        args, _ = parser.parse_known_args(list(command_line))
        config = flags.from_namespace(args, _launch_env(command_line))
    except (argparse.ArgumentError, ConfigError) as error:
        return [str(error)]
    if not config.active:
        return ["neither --moetion nor --moetion-digest-interval is on: nothing would be patched"]
    support = activation.part(folder, "support")
    refused = support.unsupported(args, digest_only=not config.moetion)
    complaints = [str(row) for row in refused]
    if config.moetion and not any(_is_launcher(token, LOCALIZED) for token in command_line):
        complaints.append(f"no localized recovery without {LOCALIZED} as the launcher")
    return complaints


def _is_launcher(token: str, name: str) -> bool:
    return Path(token).name == name or token == "megatron_moetion.agent"


def _launch_env(command_line: Sequence[str]) -> dict[str, str]:
    """What a launcher's own options say about the size of the job, as its workers will see it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--nnodes", "--nodes", "-N", default="1")
    parser.add_argument("--nproc-per-node", "--nproc_per_node", default="")
    known, _ = parser.parse_known_args(list(command_line))
    nodes = known.nnodes.rpartition(":")[2]
    env = {"GROUP_WORLD_SIZE": nodes} if nodes.isdecimal() else {}
    if nodes.isdecimal() and known.nproc_per_node.isdecimal():
        env["WORLD_SIZE"] = str(int(nodes) * int(known.nproc_per_node))
    return env
