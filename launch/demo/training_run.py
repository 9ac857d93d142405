"""One training run of the demo: starts it, shows how far it is, keeps its output in a file."""

import os
import re
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

LOG_NAME = "output.log"
TAIL_LINES = 40
_ITERATION = re.compile(r"iteration +(\d+)/ *\d+ .*lm loss: (\S+)")


class RunFailed(RuntimeError):
    """A run ended with an exit code other than 0; the message holds the end of its output."""


def train(
    console: Console, name: str, command: Sequence[str], directory: Path, num_iterations: int
) -> None:
    """Run a training command to its end.

    Args:
        console: where progress is shown: a moving bar on a terminal, a line now and then elsewhere.
        name: how the run is called there.
        command: the whole command line.
        directory: gets the output as ``output.log``; must exist.
        num_iterations: how many log lines to expect.

    Raises:
        RunFailed: naming the exit code and the log, with its last lines.
    """
    # Without it a machine with a GPU would train there, and other machines elsewhere.
    env = {**os.environ, "MOETION_PLATFORM": "cpu"}
    path = directory / LOG_NAME
    with subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
    ) as process:
        show = _show_bar if console.is_terminal else _show_lines
        show(console, name, _kept(process, path), num_iterations)
    if process.returncode:
        with path.open() as log:
            tail = "".join(deque(log, TAIL_LINES))
        raise RunFailed(f"{tail}{name} ended with code {process.returncode}; all of it: {path}")


def moetion_run(num_workers: int, *words: str) -> list[str]:
    """The launcher's command line, by this interpreter, so that no PATH is needed."""
    launcher = [sys.executable, "-m", "megatron_moetion.agent"]
    return [*launcher, "--nproc-per-node", str(num_workers), *words]


def _kept(process: "subprocess.Popen[str]", path: Path) -> Iterator[str]:
    assert process.stdout is not None
    with path.open("w", buffering=1) as log:
        for line in process.stdout:
            log.write(line)
            yield line


def _show_bar(console: Console, name: str, lines: Iterator[str], num_iterations: int) -> None:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(name, total=num_iterations, note="starting the processes")
        for line in lines:
            if found := _ITERATION.search(line):
                note = f"loss {float(found[2]):.4f}"
                progress.update(task, completed=int(found[1]), note=note)
            elif line.startswith("moetion-run: "):
                progress.console.print(f"  {line.strip()}", highlight=False, soft_wrap=True)


def _show_lines(console: Console, name: str, lines: Iterator[str], num_iterations: int) -> None:
    console.print(f"{name}: starting the processes")
    for line in lines:
        if found := _ITERATION.search(line):
            iteration = int(found[1])
            if iteration % 6 == 0 or iteration == num_iterations:
                loss = float(found[2])
                console.print(f"  iteration {iteration} of {num_iterations}, loss {loss:.4f}")
        elif line.startswith("moetion-run: "):
            console.print(f"  {line.strip()}", soft_wrap=True)
