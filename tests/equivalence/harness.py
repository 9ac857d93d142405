"""Runs the real training loop in real processes and compares what they recorded, bit for bit."""

from __future__ import annotations

import os
import re
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

from filelock import FileLock

from launch.demo.model_args import model_args
from megatron_moetion import digest, events
from megatron_moetion.agent.standby import LAPSED_CODE
from tests.nursery import ROOT, Launcher, Nursery
from tests.ports import free_port

from . import matrix

PRETRAIN = Path(__file__).with_name("demo_pretrain.py")
SABOTAGED = Path(__file__).with_name("sabotaged_pretrain.py")
AGENT, TORCHRUN = "megatron_moetion.agent", "torch.distributed.run"
Started = Launcher | subprocess.Popen[bytes]
Starter = Callable[[Sequence[str], Mapping[str, str], IO[str], IO[str]], Started]
CUTS = ("stage", "shard")
LINE = re.compile(
    r"iteration +(\d+)/.*?consumed samples: +(\d+) .*?learning rate: (\S+) "
    r".*?(lm loss: .*?nan iterations: +\d+)"
)
OVER = '{"kind":"over","who":"test","time":0,"monotonic_ns":0}\n'
"""Ends what `follow` reads; an event that is none, so that it may stand in either kind of file."""
MICROBATCHES = 3
"""Of an iteration, on each rank: two stages warm up, alternate, and cool down as with four."""
LIMIT_SECONDS = 900
"""A run that hangs is killed, not waited for; far above what any of them takes."""


@dataclass(frozen=True)
class Run:
    """What a finished run left.

    Attributes:
        flags: that it was given besides those that all runs have.
        num_stages: of its pipeline.
    """

    directory: Path
    code: int
    log: str
    flags: tuple[str, ...] = ()
    num_stages: int = 2

    @property
    def records(self) -> dict[tuple[int, int], dict[str, str]]:
        """{(iteration, global_rank): {name: bits}}."""
        return digest.read(self.directory)

    @property
    def lines(self) -> list[tuple[str, ...]]:
        """The log lines without clock times: (iteration, consumed samples, learning rate, losses
        and norms).
        """
        return [match.groups() for match in map(LINE.search, self.log.splitlines()) if match]

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Events of one kind, in time order; none when the run recorded none."""
        if not (self.directory / events.FOLDER).exists():
            return []
        return [e for e in events.read(self.directory) if e["kind"] == kind]

    @property
    def recoveries(self) -> list[dict[str, Any]]:
        """What the leader says of each recovery that ended with training."""
        return [e for e in self.events("resumed") if e["who"].startswith("agent")]

    def flag(self, name: str, default: str) -> str:
        """The value of a flag."""
        return dict(pairwise(self.flags)).get(name, default)

    def tail(self) -> str:
        """The end of the log, for an assertion's message."""
        return f"exit code {self.code}\n" + "\n".join(self.log.splitlines()[-40:])


def once(outcome: Path, make: Callable[[], object]) -> str:
    """What `make` came to, in words, for whoever came first: here or in another test process.

    Args:
        outcome: where that is kept; written last, so that what was made is complete by then.
    """
    with FileLock(f"{outcome}.lock"):
        if not outcome.exists():
            outcome.write_text(str(make()))
        return outcome.read_text()


class Runner:
    """Starts runs one after the other; a run with the same name is run once by all the runners that
    share a scratch folder.
    """

    def __init__(self, scratch: Path, data_prefix: str) -> None:
        self.scratch, self._data_prefix = scratch, data_prefix
        self._nursery: Nursery | None = None

    def close(self) -> None:
        """Nothing is run afterwards."""
        if self._nursery is not None:
            self._nursery.close()

    def _starter(self, launcher: str, afresh: bool) -> Starter:
        if afresh or launcher != AGENT:
            return _start_afresh
        if self._nursery is None:
            self._nursery = Nursery(_environment({}))
        return self._nursery.start

    def run(
        self,
        name: str,
        *,
        iterations: int,
        flags: Sequence[str] = (),
        variant: str = "demo",
        launcher: str = AGENT,
        launcher_flags: Sequence[str] = (),
        script: Path = PRETRAIN,
        env: Mapping[str, str] | None = None,
        model: Mapping[str, int] | None = None,
        layers: int = 2,
        nodes: int = 1,
        workers_of_node: Sequence[int] | None = None,
        without: Sequence[str] = (),
        meddle: Callable[[Path], None] | None = None,
        port: int | None = None,
        restarts: bool = False,
        afresh: bool = False,
        limit_seconds: float | None = LIMIT_SECONDS,
        standbys: int = 0,
    ) -> Run:
        """Trains and returns what was recorded; the exit code is the caller's business.

        Args:
            workers_of_node: for each agent, one failure domain each; else 4 on `nodes` agents that
                are all in this host's domain.
            meddle: called with the run's directory in a thread of its own while the run goes on.
            port: of the job's store, for whoever meddles with it.
            restarts: an agent that is killed, or was not heard for too long, is started again, to
                stand by.
            standbys: agents that take the places of lost ones.
            limit_seconds: after which a run is killed; None never kills it.
            afresh: everything is started and ends as for a user, not from the nursery.
        """
        directory = self.scratch / name
        sizes = {"num_microbatches": MICROBATCHES, **(model or {})}
        words = model_args(variant, train_iters=iterations, data_prefix=self._data_prefix, **sizes)
        # The last of two equal flags counts. Decay reaches beyond the longest run, so that every
        # step shows. Two experts on a rank are as good as four, and faster.
        words += ["--num-layers", str(layers), "--num-experts", "4"]
        words += ["--lr-decay-iters", "400", "--eval-iters", "0"]
        words += ["--moetion-digest-interval", "1", "--moetion-dir", str(directory), *flags]
        words = [word for word in words if word not in without]
        program = [*launcher_flags, str(script), *words]
        agents = list(workers_of_node or [4 // nodes] * nodes)
        environments = [
            _environment({**({} if workers_of_node is None else domain(node)), **(env or {})})
            for node in range(len(agents) + standbys)
        ]
        code = once(
            self.scratch / f"{name}.code",
            lambda: _train(
                self._starter(launcher, afresh),
                _command(launcher, len(agents), port),
                agents,
                program,
                environments,
                directory,
                meddle,
                restarts,
                limit_seconds,
            ),
        )
        num_stages = (model or {}).get("pp_size", 2)
        log = (directory / "log").read_text()
        return Run(directory, int(code), log, tuple(flags), num_stages)

    def off(self, name: str, **options: Any) -> Run:
        """Trains without protection: only the digest row."""
        return self.run(name, launcher_flags=["--spares", "1"], **options)


def domain(node: int) -> dict[str, str]:
    """A failure domain of its own for an agent on this host."""
    return {"MOETION_FAILURE_DOMAIN": f"rack-{node}"}


def _start_afresh(
    command: Sequence[str], env: Mapping[str, str], out: IO[str], errors: IO[str]
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=errors
    )


def _command(launcher: str, num_nodes: int, port: int | None) -> list[str]:
    """What the command lines of all launchers begin with."""
    command = [sys.executable, "-W", "ignore", "-m", launcher]
    if num_nodes > 1:
        command += ["--nnodes", str(num_nodes), "--master-addr", "127.0.0.1"]
    if num_nodes > 1 or launcher == TORCHRUN:
        # By itself torchrun takes the same port for every job.
        command += ["--master-port", str(port or free_port())]
    return command


def _train(
    starter: Starter,
    command: list[str],
    agents: Sequence[int],
    program: list[str],
    environments: Sequence[dict[str, str]],
    directory: Path,
    meddle: Callable[[Path], None] | None,
    restarts: bool,
    limit_seconds: float | None,
) -> int:
    """Runs the launchers and whoever meddles; the exit code."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "log").touch()
    meddling = threading.Thread(target=meddle, args=(directory,)) if meddle else None
    if meddling is not None:
        meddling.start()
    launched = (starter, command, agents, program, environments, directory)
    code = _launch(*launched, restarts, limit_seconds)
    if meddling is not None:
        for file in (directory / "log", *(directory / events.FOLDER).iterdir()):
            with file.open("a") as log:
                log.write(OVER)
        meddling.join()
    return code


def _launch(
    starter: Starter,
    command: list[str],
    agents: Sequence[int],
    program: list[str],
    environments: Sequence[dict[str, str]],
    directory: Path,
    restarts: bool,
    limit_seconds: float | None,
) -> int:
    """Runs one launcher per node on loopback, all writing to one log; the first code that is not 0,
    or 0. Each one's own is in a file, too.

    Args:
        command: what each command line begins with.
        agents: workers by node.
        environments: by node, then by standby.
    """
    shared = {"MOETION_SECRET": secrets.token_hex(16)} if len(agents) > 1 else {}
    places = [[str(count), "--node-rank", str(node)] for node, count in enumerate(agents)]
    places += [[str(agents[-1]), "--standby"]] * (len(environments) - len(agents))
    commands = [[*command, "--nproc-per-node", *place, *program] for place in places]
    with (directory / "log").open("w") as out:

        def start(node: int) -> Started:
            started = starter(commands[node], {**environments[node], **shared}, out, out)
            (directory / f"launcher-{node}.pid").write_text(str(started.pid))
            return started

        def end(node: int) -> int:
            while True:
                code = launchers[node].wait(timeout=limit_seconds)
                if not restarts or code not in (-signal.SIGKILL, LAPSED_CODE):
                    (directory / f"launcher-{node}.code").write_text(str(code))
                    return code
                # With that its node rank does not count any more.
                commands[node].insert(len(command), "--standby")
                launchers[node] = start(node)

        launchers = {node: start(node) for node in range(len(commands))}
        try:
            # Each in a thread: whichever is killed has to come back while the others wait for it.
            with ThreadPoolExecutor(len(commands)) as waiting:
                codes = list(waiting.map(end, range(len(commands))))
        finally:
            for each in launchers.values():
                each.kill()
    return next((code for code in codes if code), 0)


def _environment(extra: Mapping[str, str]) -> dict[str, str]:
    startup = str(ROOT / "patches" / "startup")
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([startup, str(ROOT)]),
        "MOETION": "1",
        "MOETION_PLATFORM": "cpu",
        "OMP_NUM_THREADS": "1",
        # A worker that crashes in native code says where.
        "PYTHONFAULTHANDLER": "1",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        **extra,
    }


def follow(file: Path, after: int = 0) -> Iterator[str]:
    """Lines behind the first `after` bytes, as they are written, until the caller has seen enough
    or the run is over.
    """
    with subprocess.Popen(
        ["tail", "-c", f"+{after + 1}", "-F", str(file)], stdout=subprocess.PIPE, text=True
    ) as tail:
        assert tail.stdout is not None
        try:
            yield from iter(tail.stdout.readline, OVER)
        finally:
            tail.kill()


def kill_workers(directory: Path, global_ranks: Sequence[int]) -> None:
    """SIGKILL from outside, at whatever they are doing."""
    started = [e for e in events.read(directory) if e["kind"] == "started"]
    pids = {e["global_rank"]: e["pid"] for e in started}
    for rank in global_ranks:
        os.kill(pids[rank], signal.SIGKILL)


def node_pids(directory: Path, node: int, global_ranks: Sequence[int]) -> list[int]:
    """The agent of a node and its workers, as they are now."""
    started = [e for e in events.read(directory) if e["kind"] == "started"]
    pids = {e["global_rank"]: e["pid"] for e in started}
    agent = int((directory / f"launcher-{node}.pid").read_text())
    return [agent, *(pids[rank] for rank in global_ranks)]


Moments = Mapping[int, tuple[Sequence[int], str, Sequence[int]]]
"""{iteration whose log line is waited for: (who is killed then, an event of the recovery that is
waited for, who is killed at that)}; an empty event is none.
"""


def kill_at_moments(directory: Path, moments: Moments) -> None:
    """Kills workers from outside, and others while the first ones are recovered from."""
    left = dict(moments)
    for line in follow(directory / "log"):
        for iteration in [i for i in left if f" iteration {i:8d}/" in line]:
            first, kind, second = left.pop(iteration)
            (agent,) = (directory / events.FOLDER).glob("agent-*")
            told = follow(agent, after=agent.stat().st_size)
            kill_workers(directory, first)
            if kind:
                next(line for line in told if f'"kind":"{kind}"' in line)
                kill_workers(directory, second)
            told.close()
        if not left:
            return


def kill_agent(directory: Path, node: int) -> None:
    """SIGKILL to the agent of a node; its workers go with it."""
    os.kill(int((directory / f"launcher-{node}.pid").read_text()), signal.SIGKILL)


def assert_within_claim(run: Run) -> None:
    """The vault never took more memory than its ranks had claimed before the first step."""
    claimed = sum(e["nbytes"] for e in run.events("claimed"))
    (node,) = run.events("vault")
    assert 0 < node["allocated_bytes"] <= claimed, (node["allocated_bytes"], claimed)


def assert_same_bits(
    run: Run, reference: Run, iterations: int, *, lines_may_repeat: bool = False
) -> None:
    """Every record of `run` up to `iterations` exists and equals the reference's; so do its log
    lines.

    Args:
        lines_may_repeat: a line may stand there twice, as a worker that is killed between writing
            its line and saying so has it written again.
    """
    expected = {key: v for key, v in reference.records.items() if key[0] <= iterations}
    assert len(expected) == 4 * iterations, "the reference itself is incomplete"
    found = run.records
    for key in sorted(expected):
        assert key in found, f"nothing recorded for (iteration, rank) {key}\n{run.tail()}"
        different = [n for n in expected[key] if found[key].get(n) != expected[key][n]]
        assert not different, (
            f"(iteration, rank) {key}: {different[0]} and {len(different) - 1} more differ"
        )
    lines = list(dict.fromkeys(run.lines)) if lines_may_repeat else run.lines
    assert lines[:iterations] == reference.lines[:iterations], "log lines differ"
    _list_recoveries(run)


RECOVERED: list[matrix.Row] = []
"""Recoveries of the runs that the test under way has compared, bit for bit."""


def _list_recoveries(run: Run) -> None:
    """Whatever was to fail has failed and was recovered from."""
    told = events.read(run.directory)
    if run.code == 0:
        assert matrix.unfired(run.flag("--moetion-fault", ""), told) == []
        assert matrix.unrecovered(told) == []
    cut = run.flag("--moetion-cut", "stage")
    RECOVERED.extend(matrix.rows(run.directory.name, cut, run.num_stages, told))


def first_difference(run: Run, reference: Run) -> tuple[tuple[int, int], str] | None:
    """Where a run that is expected to be wrong first differs."""
    expected = reference.records
    for key, values in sorted(run.records.items()):
        for name in values:
            if values[name] != expected[key].get(name):
                return key, name
    return None


def kills(*places: tuple[int, int, str]) -> list[str]:
    """The fault flag for (global_rank, iteration, place) each."""
    spec = ";".join(f"kill:global_rank={r},iteration={i},at={p}" for r, i, p in places)
    return ["--moetion-fault", spec]
