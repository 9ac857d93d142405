"""The two moments: what is patched when, and the one way a job is refused.

Before the host's first import the rehearsal is installed where it is wanted, and the import of the
host's argument module is awaited. Moment 1, right after that import: the flag rows, and nothing
else. Moment 2, when the arguments are final and before any process group exists: every other row
of the groups that the flags ask for.
"""

import functools
import importlib
import sys
from argparse import Namespace
from collections.abc import Callable
from types import ModuleType
from typing import NoReturn

from megatron_moetion import arming
from megatron_moetion import config as flags
from megatron_moetion.config import Config
from megatron_moetion.interception import InterceptionError, Patch, apply, verify_all

from . import SUPPORTED_HOSTS

SWEEP = ("megatron", "__main__")
"""Packages that are searched for from-imports of a target that its row does not list."""

_undo_stack: list[Callable[[], None]] = []


def refuse(text: str) -> NoReturn:
    """Ends the process with code 2 and one line on stderr.

    Every rank says it: whichever ends first makes a launcher end the others, perhaps before they
    got to say anything.
    """
    sys.stderr.write(f"moetion: error: {' '.join(text.split())}\n")
    sys.stderr.flush()
    raise SystemExit(2)


def before_host_import() -> None:
    """Runs once, before anything of the host is imported.

    Bad flags are refused here already: the host's imports take seconds and print warnings.
    """
    try:
        flags.from_command_line(sys.argv[1:])
    except flags.ConfigError as error:
        refuse(str(error))
    install_rehearsal()
    arming.when_imported("megatron.training.arguments", _moment_one)


def host_version() -> str:
    """Returns the version of the imported megatron-core."""
    return str(importlib.import_module("megatron.core").__version__)


def host_folder(version: str) -> str | None:
    """Returns the folder with the rows for this host version, or nothing when it is unknown."""
    numbers = version.split(".")
    if len(numbers) < 2 or not (numbers[0].isdecimal() and numbers[1].isdecimal()):
        return None
    return SUPPORTED_HOSTS.get((int(numbers[0]), int(numbers[1])))


def supported_hosts() -> str:
    """Returns the supported host versions as one reads them."""
    return ", ".join(f"{major}.{minor}.x" for major, minor in SUPPORTED_HOSTS)


def part(folder: str, name: str) -> ModuleType:
    """Returns one module of a host version's folder."""
    return importlib.import_module(f"{__package__}.{folder}.{name}")


def selected_rows(rows: tuple[Patch, ...], config: Config) -> tuple[Patch, ...]:
    """Returns the rows of the groups that the flags ask for, in their order."""
    groups = {"moetion": config.moetion, "digest": config.digest_interval > 0}
    return tuple(row for row in rows if groups.get(row.group, False))


def check_support(args: Namespace, config: Config, folder: str) -> None:
    """Refuses the first feature in the host's arguments that the run cannot have."""
    for row in part(folder, "support").unsupported(args, digest_only=not config.moetion):
        refuse(str(row))


def moment_two(args: Namespace, config: Config, folder: str) -> None:
    """Refuses what cannot be protected, applies the selected rows, and starts the product.

    Args:
        args: the host's arguments, final: validated, not yet used for anything.
        config: our flags among them.
        folder: rows of which host version.
    """
    check_support(args, config, folder)
    rows = selected_rows(part(folder, "rows").ROWS, config)
    problems = verify_all(rows, SWEEP)
    errors = [str(problem) for problem in problems if problem.severity == "error"]
    if errors:
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        refuse(
            f"megatron-core {host_version()} does not fit the patches: {errors[0]}{more}; "
            f"supported are {supported_hosts()}, 'python -m megatron_moetion doctor' lists all rows"
        )
    for problem in problems:
        if args.rank == 0:
            print(f"moetion: warning: {problem}", file=sys.stderr, flush=True)
    _undo_stack.append(apply(rows))
    part(folder, "activate").activate(args, config)


def undo() -> None:
    """Takes every applied row back, the last moment first."""
    while _undo_stack:
        _undo_stack[-1]()
        _undo_stack.pop()


def _moment_one(module: ModuleType) -> None:
    version = host_version()
    folder = host_folder(version)
    if folder is None:
        # Without our flags this is somebody else's job: it runs as if nothing were installed.
        if any(token.startswith("--moetion") for token in sys.argv[1:]):
            refuse(
                f"megatron-core {version} is not supported: install one of {supported_hosts()}, "
                "or drop the --moetion flags"
            )
        return
    try:
        _undo_stack.append(apply(part(folder, "flags").ROWS))
    except InterceptionError as error:
        refuse(f"megatron-core {version} does not fit the flag rows: {error}")


@functools.cache
def install_rehearsal() -> None:
    """Makes the CPU stand in for CUDA where that is wanted; before the host is imported, once."""
    rehearsal = importlib.import_module("megatron_moetion.rehearsal")
    try:
        if rehearsal.shares_gpu():
            rehearsal.install(rehearsal.SHARED_GPU)
            return
        if not rehearsal.wanted():
            return
    except ValueError as error:
        refuse(str(error))
    rehearsal.install()
    # The host's version is not known before its import; the newest folder's names are tried.
    folder = SUPPORTED_HOSTS[max(SUPPORTED_HOSTS)]
    table: dict[str, str] = importlib.import_module(f"{__package__}.{folder}").AFTER_IMPORT
    for module_name, function in table.items():
        arming.when_imported(module_name, getattr(part(folder, "rehearsal_host"), function))
