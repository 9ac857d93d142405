"""The commands of ``python -m megatron_moetion``; each imports what it needs when it is called."""

import argparse
import importlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_moetion import patch_location


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code: 0 well, 1 something differs, 2 bad usage."""
    parser = argparse.ArgumentParser(prog="python -m megatron_moetion", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_commands(commands)
    args = parser.parse_args(argv)
    code: int = args.action(args)
    return code


def _add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    doctor = commands.add_parser(
        "doctor", help="print versions, every patch row and its state, and what is unsupported"
    )
    doctor.add_argument(
        "command_line", nargs=argparse.REMAINDER, help="after --: a training command to check"
    )
    doctor.set_defaults(action=_doctor)

    path = commands.add_parser("patch-path", help="print the file to source in the job script")
    path.set_defaults(action=_patch_path)

    run = commands.add_parser("run", help="run a training script as if moetion.sh were sourced")
    run.add_argument("-m", dest="module", action="store_true", help="SCRIPT is a module's name")
    run.add_argument("script", metavar="SCRIPT")
    run.add_argument("script_args", nargs=argparse.REMAINDER, metavar="...")
    run.set_defaults(action=_run)

    compare = commands.add_parser("compare", help="compare the digests of two runs")
    compare.add_argument("run_a", type=Path, metavar="RUN_A")
    compare.add_argument("run_b", type=Path, metavar="RUN_B")
    compare.set_defaults(action=_compare)

    export = commands.add_parser(
        "export", help="write the newest spill of a run as an ordinary Megatron checkpoint"
    )
    export.add_argument("directory", type=Path, metavar="DIR")
    export.add_argument(
        "command_line", nargs=argparse.REMAINDER, help="after --: the command line of the run"
    )
    export.set_defaults(action=_export)

    ledger = commands.add_parser("ledger", help="write the table of all patch rows")
    ledger.add_argument("--check", action="store_true", help="only fail when it is stale")
    ledger.set_defaults(action=_ledger)

    describe = commands.add_parser(
        "describe", help="print what a new row needs to know of a target"
    )
    describe.add_argument("targets", nargs="+", metavar="package.module:name")
    describe.set_defaults(action=_describe)


def _doctor(args: argparse.Namespace) -> int:
    command_line = args.command_line[args.command_line[:1] == ["--"] :]
    # Under a sourced moetion.sh the host's import would refuse what the doctor is to explain.
    del sys.argv[1:]
    code: int = patch_location.load_patches("doctor").run(command_line)
    return code


def _patch_path(args: argparse.Namespace) -> int:
    del args
    print(patch_location.patch_directory() / "moetion.sh")
    return 0


def _run(args: argparse.Namespace) -> int:
    env = patch_location.activated(os.environ)
    # The same process goes on as the script, so a launcher keeps watching the right one.
    options = [sys.executable, *subprocess._args_from_interpreter_flags()]  # type: ignore[attr-defined]  # private
    script = ["-m", args.script] if args.module else [args.script]
    os.execve(sys.executable, [*options, *script, *args.script_args], env)


def _compare(args: argparse.Namespace) -> int:
    # Needs torch, which the other commands do without.
    digest = importlib.import_module("megatron_moetion.digest")
    try:
        comparison = digest.compare(args.run_a, args.run_b)
    except digest.NoDigest as error:
        print(f"moetion: error: {error}", file=sys.stderr)
        return 2
    print(comparison)
    return int(comparison.difference is not None)


def _export(args: argparse.Namespace) -> int:
    command_line = args.command_line[args.command_line[:1] == ["--"] :]
    if not command_line:
        print("moetion: error: give the run's own command line after --", file=sys.stderr)
        return 2
    # The run itself does it: what is rebuilt is spread over its workers, on all of its nodes.
    command = [*command_line, "--moetion-export", str(args.directory.absolute())]
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"moetion: error: cannot start {command[0]}: {error.strerror}", file=sys.stderr)
        return 2


def _ledger(args: argparse.Namespace) -> int:
    code: int = patch_location.load_patches("ledger").run(check=args.check)
    return code


def _describe(args: argparse.Namespace) -> int:
    code: int = patch_location.load_patches("doctor").describe(args.targets)
    return code
