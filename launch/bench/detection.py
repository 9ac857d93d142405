"""How long a death is unknown: of a process, of a node, and of what only goes silent.

Usage: python -m launch.bench.detection [--samples N] [--lease SECONDS]

Real agents on this machine, with workers that only sleep; prints a table. A process is killed and
its agent sees that; an agent is killed and the leader sees its connection end; an agent is stopped
(SIGSTOP: its kernel still answers, so no connection ends) and the leader misses its beats. Then the
demo's model is trained, and one worker after the other is stopped, each once the limit for hangs is
learned again. Times are from just before the signal to the event in the log of whoever notices, on
one clock.
"""

from __future__ import annotations

import argparse
import os
import random
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from launch.bench.counted import DEMO
from launch.demo.model_args import model_args
from launch.demo.training_run import LOG_NAME, moetion_run
from megatron_moetion import events
from megatron_moetion.agent import launcher
from tests.ports import free_port
from tests.waiting import readable

TICK_SECONDS = 0.01
FOREVER = 20_000
NUM_WORKERS, LEARNED = 4, 8
"""Iterations after a recovery until the limit for hangs is learned for sure."""
TIMEOUT_SECONDS = 60
"""--moetion-timeout, of which the limit is a 20th at least."""
WORKER = ["--no-python", "bash", "-c", "exec sleep 3600"]


class Agent:
    """An agent forked off this process, which has imported all that it needs."""

    def __init__(self, *argv: str) -> None:
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            quiet = os.open(os.devnull, os.O_RDWR)
            for fd in range(3):
                os.dup2(quiet, fd)
            launcher.main(argv)
        self.pidfd = os.pidfd_open(self.pid)

    def send(self, number: int) -> None:
        """Signal it."""
        os.kill(self.pid, number)

    def wait(self) -> None:
        """Let it end."""
        os.waitpid(self.pid, 0)
        os.close(self.pidfd)


def script(directory: Path, *flags: str) -> list[str]:
    """The worker, and flags that only the agent reads."""
    return [*WORKER, "--moetion", "--moetion-dir", str(directory), *flags]


def until(leader: Agent, directory: Path, kind: str, number: int) -> list[dict[str, Any]]:
    """Wait for so many events of a kind."""
    while True:
        over = readable(leader.pidfd, TICK_SECONDS)
        found = [event for event in events.read(directory) if event["kind"] == kind]
        if len(found) >= number:
            return found
        if over:
            raise RuntimeError(f"the leader has ended, and there was no {kind}")


def timed(act: Callable[[], None]) -> int:
    """When something was done that is noticed later."""
    before = time.monotonic_ns()
    act()
    return before


def processes(samples: int, directory: Path) -> list[float]:
    """Seconds from the death of a worker to its agent's knowing, each in a job of its own."""
    taken = []
    for number in range(samples):
        here = directory / f"process-{number}"
        agent = Agent("--spares", "0", *script(here))
        (worker,) = until(agent, here, "started", 1)
        killed = timed(lambda pid=worker["pid"]: os.kill(pid, signal.SIGKILL))
        agent.wait()
        (exited,) = [event for event in events.read(here) if event["kind"] == "exited"]
        assert exited["code"] == 128 + signal.SIGKILL, exited
        taken.append((exited["monotonic_ns"] - killed) / 1e9)
    return taken


def nodes(samples: int, directory: Path, lease: float) -> tuple[list[float], list[float]]:
    """Seconds until the leader of one job knows of nodes that are killed, and of stopped ones."""
    os.environ["MOETION_SECRET"] = secrets.token_hex(16)
    number, where = 1 + 2 * samples, ["--master-port", str(free_port())]
    flags = ["--moetion-cut", "shard", "--moetion-replicas", "1", "--moetion-lease", str(lease)]
    words = script(directory, *flags)
    agents = []
    for node in range(number):
        argv = ["--nnodes", str(number), "--node-rank", str(node), *where, "--spares", "0"]
        agents.append(Agent(*argv, "--failure-domain", f"rack-{node}", *words))
    leader = agents[0]
    until(leader, directory, "started", number)
    signalled: dict[int, int] = {}
    for node in range(1, 1 + samples):
        signalled[node] = timed(lambda agent=agents[node]: agent.send(signal.SIGKILL))
        until(leader, directory, "node-lost", node)
    for node in range(1 + samples, number):
        signalled[node] = timed(lambda agent=agents[node]: agent.send(signal.SIGSTOP))
        # They are at different places of their beats.
        readable(leader.pidfd, lease / samples)
    lost = until(leader, directory, "node-lost", number - 1)
    taken = {e["node_rank"]: (e["monotonic_ns"] - signalled[e["node_rank"]]) / 1e9 for e in lost}
    for agent in agents[1 + samples :]:
        agent.send(signal.SIGCONT)
    leader.send(signal.SIGTERM)
    for agent in agents:
        agent.wait()
    by_node = [taken[node] for node in range(1, number)]
    return by_node[:samples], by_node[samples:]


def workers(samples: int, directory: Path) -> tuple[list[float], list[float]]:
    """Seconds until the leader knows of workers that are stopped in training, and the limit that
    was learned by then, for each.
    """
    directory.mkdir()
    data = f"{directory}/data"
    subprocess.run([sys.executable, str(DEMO / "corpus.py"), "--output", data], check=True)
    words = [*model_args(train_iters=FOREVER, data_prefix=data), "--eval-iters", "0", "--moetion"]
    words += ["--moetion-dir", str(directory), "--moetion-timeout", str(TIMEOUT_SECONDS)]
    command = moetion_run(NUM_WORKERS, str(DEMO / "pretrain_moe.py"), *words)
    env = {**os.environ, "MOETION_PLATFORM": "cpu"}
    log, draw, since, stopped = directory / LOG_NAME, random.Random(1), 0, list[int]()
    with (
        log.open("w", buffering=1) as kept,
        subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            kept.write(line)
            since += "elapsed time per iteration" in line
            if " recovered, training again" in line:
                since = 0
                if len(stopped) == samples:
                    process.send_signal(signal.SIGTERM)
            elif since == LEARNED and len(stopped) < samples:
                since += 1
                rank = draw.randrange(NUM_WORKERS)
                started = [e for e in events.read(directory) if e["kind"] == "started"]
                pid = {e["global_rank"]: e["pid"] for e in started}[rank]
                stopped.append(timed(lambda pid=pid: os.kill(pid, signal.SIGSTOP)))
    found = [event for event in events.read(directory) if event["kind"] == "hang"]
    if len(found) != samples:
        raise RuntimeError(f"{len(found)} hangs found of {len(stopped)}; all of it: {log}")
    taken = [(e["monotonic_ns"] - at) / 1e9 for e, at in zip(found, stopped, strict=True)]
    return taken, [event["limit"] for event in found]


def table(rows: Sequence[tuple[str, str, list[float]]]) -> str:
    """As Markdown."""
    lines = ["| what is lost | noticed by | times | median | worst |", "|---|---|---:|---:|---:|"]
    for what, how, taken in rows:
        times = f"{1000 * median(taken):.1f} ms | {1000 * max(taken):.1f} ms"
        lines.append(f"| {what} | {how} | {len(taken)} | {times} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--lease", type=float, default=4.0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="moetion-bench-") as scratch:
        directory = Path(scratch)
        killed = processes(args.samples, directory)
        lost, silent = nodes(args.samples, directory / "nodes", args.lease)
        stopped, limits = workers(args.samples, directory / "workers")
    learned = " to ".join(f"{each:.3g} s" for each in sorted({min(limits), max(limits)}))
    print(f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.0f}")
    rows = [
        ("a worker process, killed", "waitpid", killed),
        ("a node, its agent killed", "the end of its connection", lost),
        ("a node, its agent stopped", f"its lease of {args.lease:g} s", silent),
        ("a worker, stopped in training", f"the learned limit, {learned}", stopped),
    ]
    print(table(rows))
    behind = max(1000 * (seconds - limit) for seconds, limit in zip(stopped, limits, strict=True))
    print(f"\nagainst its own limit, the latest of the stopped workers: {behind:+.1f} ms")


if __name__ == "__main__":
    main()
