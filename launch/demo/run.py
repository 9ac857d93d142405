"""Trains a small mixture of experts twice, kills a worker in the second run, compares every bit.

Usage: python launch/demo/run.py [--directory DIR] [--train-iters N] [--fault SPEC]

With $MEGATRON_LM, a checkout of Megatron-LM, its own pretrain_gpt.py is trained instead of
pretrain_moe.py. Exit code 0 when the run with the failure is bit-identical to the one without.
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from model_args import model_args
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from story import NoRecovery, aftermath, timeline, verdict
from training_run import RunFailed, moetion_run, train

from megatron_moetion import digest, events, faults

PP_SIZE = EP_SIZE = DP_SIZE = 2
WORLD_SIZE = PP_SIZE * DP_SIZE
HERE = Path(__file__).resolve().parent


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--directory", type=Path, default=HERE.parents[1] / ".moetion" / "demo")
    parser.add_argument("--train-iters", type=int, default=18, help="iterations of each run")
    parser.add_argument(
        "--fault",
        default="kill:global_rank=3,iteration=8,at=backward:1",
        help="the one failure of run B, as for --moetion-fault",
    )
    options = parser.parse_args()
    try:
        (fault,) = faults.parse(options.fault)
    except ValueError as error:
        parser.error(f"--fault takes one failure: {error}")
    # A pipe has no width; sentences are not to be folded there.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    try:
        return demo(console, options.directory.resolve(), options.train_iters, fault, options.fault)
    except (RunFailed, NoRecovery, digest.NoDigest) as error:
        console.print(str(error), markup=False, soft_wrap=True)
        console.print("VERDICT: NOT shown, see above")
        return 1


def demo(
    console: Console, directory: Path, train_iters: int, fault: faults.Fault, spec: str
) -> int:
    """Both runs, the timeline, the verdict; returns the exit code."""
    run_a, run_b = (fresh(directory / name) for name in ("run-a", "run-b"))
    prefix = corpus(console, directory)
    script, words = training_command(prefix, train_iters)
    record = ("--moetion-digest-interval", "1", "--moetion-dir")
    console.print(f"training {shown(script)}: PP{PP_SIZE} x EP{EP_SIZE} on {WORLD_SIZE} processes")
    plain = moetion_run(WORLD_SIZE, "--spares", "0", script, *words, *record, str(run_a))
    train(console, "run A, unprotected, no failure", plain, run_a, train_iters)
    protected = [script, *words, *record, str(run_b), "--moetion", "--moetion-fault", spec]
    name = f"run B, --moetion, {spec}"
    train(console, name, moetion_run(WORLD_SIZE, *protected), run_b, train_iters)
    print_timeline(console, run_b)
    found = verdict(
        digest.compare(run_a, run_b),
        aftermath(run_b, WORLD_SIZE),
        num_records=train_iters * WORLD_SIZE,
        failed_rank=fault.global_rank,
        stage_size=DP_SIZE,
    )
    console.print(found.text, soft_wrap=True)
    return 0 if found.good else 1


def training_command(prefix: Path, train_iters: int) -> tuple[str, list[str]]:
    """The script, ours or Megatron-LM's own, and its arguments."""
    script = HERE / "pretrain_moe.py"
    if checkout := os.environ.get("MEGATRON_LM"):
        script = Path(checkout) / "pretrain_gpt.py"
        if not script.is_file():
            sys.exit(
                f"MEGATRON_LM={checkout}: {script} does not exist; set it to a checkout or unset it"
            )
    words = model_args(
        data_prefix=str(prefix),
        train_iters=train_iters,
        pp_size=PP_SIZE,
        ep_size=EP_SIZE,
        dp_size=DP_SIZE,
    )
    return str(script), words


def shown(script: str) -> str:
    """A path as a reader would type it."""
    path = Path(script)
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def corpus(console: Console, directory: Path) -> Path:
    """Prefix of the data set of this interpreter's own library; made once."""
    prefix = directory / "corpus" / f"stdlib-{platform.python_version()}"
    if not prefix.with_name(prefix.name + ".idx").is_file():
        console.print(f"making a data set of the sources of Python {platform.python_version()}")
        builder = [sys.executable, str(HERE / "corpus.py"), "--output", str(prefix)]
        done = subprocess.run(builder, capture_output=True, text=True)
        if done.returncode:
            raise RunFailed(f"{done.stdout}{done.stderr}making the data set failed")
    return prefix


def fresh(directory: Path) -> Path:
    """An empty directory; what an earlier demo left there would be compared too."""
    if directory.exists():
        shutil.rmtree(directory)
    directory.mkdir(parents=True)
    return directory


def print_timeline(console: Console, run_b: Path) -> None:
    """The recovery, as the events tell it."""
    table = Table(
        "recovery", "ms", "took ms", "", title="timeline of run B", title_justify="left", box=SIMPLE
    )
    table.columns[1].justify = table.columns[2].justify = "right"
    before = 0.0
    for row in timeline(events.read(run_b)):
        table.add_row(row.what, f"{row.at_ms:.1f}", f"{row.at_ms - before:.1f}", row.detail)
        before = row.at_ms
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
