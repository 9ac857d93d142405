"""Whole jobs of stub workers under moetion-run: deaths, second deaths, nodes, exit codes."""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path

import pytest

from megatron_moetion.agent.gate import MAX_WAITING
from tests.ports import free_port
from tests.strangers import agents_port, attack
from tests.stub_jobs import (
    LIMIT_SECONDS,
    assert_trained_to_the_end,
    finish,
    gone,
    launch,
    launch_plain,
    protected,
)
from tests.stub_nodes import Nodes, ended

CHECKPOINT = "restart from a Megatron checkpoint with --load, or afresh"
pytestmark = pytest.mark.multirank


def test_a_killed_worker_is_replaced_and_the_survivors_live_on(tmp_path: Path) -> None:
    outcome = finish([launch(["--nproc-per-node", "3"], *protected(tmp_path, "1:5"))], tmp_path)
    assert_trained_to_the_end(outcome, 3)
    pids = {event["who"]: event["pid"] for event in outcome.of("welcome", replacement=False)}
    ends = {event["who"]: event["pid"] for event in outcome.of("finished")}
    assert {who for who in pids if pids[who] != ends[who]} == {"rank-1"}
    *_, replaced = outcome.of("started")
    assert (replaced["global_rank"], replaced["pid"]) == (1, ends["rank-1"])
    assert replaced["start"] == "warm"
    assert outcome.of("restored") != []
    assert len(outcome.of("notice.resume", epoch=1)) == 3
    (dying,), (exited,) = outcome.of("dying"), outcome.of("exited", code=137)
    detected_ms = (exited["monotonic_ns"] - dying["monotonic_ns"]) / 1e6
    print(f"killed to detected: {detected_ms:.1f} ms")
    assert detected_ms < 1000
    assert "moetion-run: ranks [1] recovered" in outcome.errors


def test_deaths_during_a_round_restart_it(tmp_path: Path) -> None:
    deaths = ("1:3", "2:freeze@1", "0:abort@2:exit", "1:6:raise", "1:facts@4")
    argv = ["--nproc-per-node", "4"]
    outcome = finish([launch(argv, *protected(tmp_path, *deaths))], tmp_path)
    assert_trained_to_the_end(outcome, 4)
    assert [event["place"] for event in outcome.of("dying")] == [
        "3",
        "freeze@1",
        "abort@2",
        "6",
        "facts@4",
    ]
    assert [event["epoch"] for event in outcome.of("detected")] == [1, 2, 3, 4, 5]
    assert [event["epoch"] for event in outcome.of("resumed")] == [3, 5]
    assert outcome.of("resumed")[0]["recovered"] == [0, 1, 2]


def test_several_agents_recover_and_fetch_from_each_other(tmp_path: Path) -> None:
    argv = ["--nnodes", "2", "--nproc-per-node", "1", "--master-port", str(free_port())]
    nodes = [
        launch(
            [*argv, "--node-rank", str(node)],
            *protected(tmp_path, "1:4", "0:7"),
            MOETION_SECRET="ab" * 16,
        )
        for node in (1, 0)
    ]
    outcome = finish(nodes, tmp_path)
    assert_trained_to_the_end(outcome, 2)
    assert [event["recovered"] for event in outcome.of("resumed")] == [[1], [0]]


def test_strangers_disturb_neither_training_nor_copying(tmp_path: Path) -> None:
    over = tmp_path / "over"
    script = ["--moetion-replicas", "1", "--die", "1:1500", "--until", str(over)]
    job = Nodes(tmp_path, *script, pace="0")
    try:
        nodes = job.members()
        master_port = int(job.argv[-1])
        ports = [agents_port(master_port, node, LIMIT_SECONDS) for node in (0, 1)]
        kept = [stranger for port in ports for stranger in attack(port)]
        tasks = [len(os.listdir(f"/proc/{node.pid}/task")) for node in nodes]
        files = [len(os.listdir(f"/proc/{node.pid}/fd")) for node in nodes]
        (resumed,) = job.until("resumed", 1)
        over.touch()
        outcome = finish(nodes, job.directory)
        for stranger in kept:
            stranger.close()
    finally:
        job.close()
    assert outcome.codes == [0, 0], outcome.errors
    assert resumed["recovered"] == [1]
    first, second = (event["iteration"] for event in outcome.of("finished"))
    assert first == second >= 1500
    assert max(tasks) < 40, tasks
    assert max(files) < 64 + 100, files
    for counted in outcome.of("counted"):
        # The last ones may still have been waiting, silent, when the job was over.
        assert counted["strangers"] >= 1005 - MAX_WAITING
        assert counted["durable"] != {}
        assert min(counted["durable"].values()) >= first - 3
        assert counted["strangers without the secret"] >= 5


def test_copies_in_one_failure_domain_are_refused_by_every_agent(tmp_path: Path) -> None:
    argv = ["--nnodes", "2", "--nproc-per-node", "1", "--master-port", str(free_port())]
    script = ["--moetion", "--moetion-dir", str(tmp_path), "--moetion-replicas", "1"]
    nodes = [
        launch([*argv, "--node-rank", str(node)], *script, MOETION_SECRET="ab" * 16)
        for node in (0, 1)
    ]
    outputs = [node.communicate(timeout=LIMIT_SECONDS) for node in nodes]
    assert [node.returncode for node in nodes] == [2, 2]
    for _, errors in outputs:
        assert errors.count("moetion-run: error: --moetion-replicas 1 needs 2 failure domains") == 1


def test_a_rank_that_keeps_dying_ends_the_job_in_one_line(tmp_path: Path) -> None:
    argv = ["--nproc-per-node", "2", "--spares", "0"]
    outcome = finish([launch(argv, *protected(tmp_path, *["1:4"] * 4))], tmp_path)
    assert outcome.codes == [137]
    line = "rank 1 failed 4 times at iteration 3 (--moetion-max-retries 3)"
    told = f"{line}; tried: 3 localized recoveries; {CHECKPOINT}"
    assert f"moetion-run: ending the job: {told}\n" in outcome.errors


def test_an_exception_that_comes_again_on_all_ranks_ends_the_job_with_its_traceback(
    tmp_path: Path,
) -> None:
    argv = ["--nproc-per-node", "3"]
    script = [*protected(tmp_path, "all:4:raise"), "--moetion-max-retries", "1"]
    outcome = finish([launch(argv, *script)], tmp_path)
    assert outcome.codes == [1]
    *_, before, last = [line for line in outcome.errors.splitlines() if "moetion-run:" in line]
    (raised,) = re.findall(r"moetion-run: what rank (\d) raised first:", before)
    says = r"moetion-run: ending the job: rank (\d) failed 2 times at iteration 3 (\(.*\))(.*)"
    rank, flag, how = re.fullmatch(says, last).groups()
    assert flag == "(--moetion-max-retries 1)"
    first = "" if rank == raised else f", rank {raised} first"
    tried = r"; tried: \d localized recover(y|ies); "
    assert re.fullmatch(
        re.escape(f"{first}: RuntimeError: injected at 4") + tried + CHECKPOINT, how
    )
    # The traceback stands right before that line, and nothing of anybody else's.
    shown = outcome.errors.partition(before)[2].partition(last)[0].splitlines()[1:]
    trace = [line for line in shown if line.startswith(f"[rank{raised}]: ")]
    assert trace[0] == f"[rank{raised}]: Traceback (most recent call last):"
    assert trace[-1] == f"[rank{raised}]: RuntimeError: injected at 4"
    assert any("in maybe_die" in line for line in trace)


def test_a_worker_that_is_stopped_in_training_is_found_by_the_limit_that_was_learned(
    tmp_path: Path,
) -> None:
    nodes = [
        ["--nnodes", "2", "--nproc-per-node", "2", "--master-port", port, "--node-rank", str(node)]
        for port in [str(free_port())]
        for node in (1, 0)
    ]
    script = [*protected(tmp_path, "3:20:stop", "0:40:stop", iterations=50)]
    script += ["--moetion-timeout", "40"]
    started = [launch(argv, *script, MOETION_SECRET="ab" * 16) for argv in nodes]
    outcome = finish(started, tmp_path)
    assert_trained_to_the_end(outcome, 4, 50)
    hangs, stops = outcome.of("hang"), outcome.of("dying", how="stop")
    assert [[c["global_rank"] for c in hang["culprits"]] for hang in hangs] == [[3], [0]]
    assert [event["recovered"] for event in outcome.of("resumed")] == [[3], [0]]
    for hang, stop in zip(hangs, stops, strict=True):
        seconds = (hang["monotonic_ns"] - stop["monotonic_ns"]) / 1e9
        print(f"stopped to named: {seconds:.2f} s, limit {hang['limit']:.2f} s")
        # A 20th of the timeout; steps here take milliseconds.
        assert hang["limit"] == 2.0
        assert 1.9 < seconds < 3.0
    assert outcome.errors.count("(stopped by a signal)") == 2


def test_a_worker_that_hangs_in_a_recovery_is_killed_and_a_new_round_begins(
    tmp_path: Path,
) -> None:
    script = protected(tmp_path, "1:5", "2:freeze@1:stop")
    argv = ["--nproc-per-node", "3"]
    outcome = finish([launch(argv, *script, "--moetion-timeout", "6")], tmp_path)
    assert_trained_to_the_end(outcome, 3)
    assert [event["recovered"] for event in outcome.of("resumed")] == [[1, 2]]
    (expelled,) = outcome.of("expelled")
    assert (expelled["global_ranks"], expelled["phase"]) == ([2], "PLANNING")
    assert "did not answer within 6 s in phase PLANNING" in outcome.errors
    assert "ranks [2] are killed, and a new round begins" in outcome.errors
    assert "global rank 2 in iteration" in outcome.errors


def test_a_worker_that_hangs_in_every_recovery_ends_the_job_with_the_line_of_the_phase(
    tmp_path: Path,
) -> None:
    deaths = ["1:5", *[f"2:freeze@{epoch}:stop" for epoch in (1, 2)], "2:facts@2:stop"]
    script = [*protected(tmp_path, *deaths), "--moetion-max-retries", "1"]
    argv = ["--nproc-per-node", "3"]
    outcome = finish([launch(argv, *script, "--moetion-timeout", "6")], tmp_path)
    assert outcome.codes == [137]
    last = outcome.errors.splitlines()[-1]
    assert "moetion-run: ending the job: ranks [" in last
    assert "did not answer within 6 s in phase RESTORING" in last


@pytest.mark.parametrize("flags", [["--moetion"], []])
def test_a_worker_that_fails_before_it_is_protected_ends_the_job_with_its_code(
    tmp_path: Path, flags: list[str]
) -> None:
    argv = ["--nproc-per-node", "2", "--no-python"]
    script = ["bash", "-c", "exit 2", *flags, "--moetion-dir", str(tmp_path)]
    outcome = finish([launch_plain([*argv, *script])], tmp_path)
    assert outcome.codes == [2]
    assert outcome.errors.count("moetion-run:") == 1


def test_a_plain_command_runs_and_its_children_are_not_left_behind(tmp_path: Path) -> None:
    argv = ["--nproc-per-node", "2", "--no-python"]
    command = "sleep 600 & echo $! > $DIR/$RANK; echo $RANK of $WORLD_SIZE"
    process = launch_plain([*argv, "bash", "-c", command], DIR=str(tmp_path))
    output, _ = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 0
    assert sorted(output.splitlines()) == ["0 of 2", "1 of 2"]
    for rank in range(2):
        assert gone(int((tmp_path / str(rank)).read_text()))


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)]
)
def test_ending_the_launcher_ends_the_workers(number: int, code: int) -> None:
    hang = "echo $$; sleep 600"
    process = launch_plain(["--nproc-per-node", "2", "--no-python", "bash", "-c", hang])
    assert process.stdout is not None
    pids = [int(process.stdout.readline()) for _ in range(2)]
    process.send_signal(number)
    assert process.wait(timeout=10) == code
    assert all(gone(pid) for pid in pids)


def test_the_end_of_one_agent_ends_the_others_with_one_line() -> None:
    argv = ["--nnodes", "2", "--nproc-per-node", "1", "--no-python"]
    argv += ["--master-port", str(free_port())]
    hang = ["bash", "-c", "echo $$; sleep 600"]
    leader, other = (
        launch_plain([*argv, "--node-rank", str(node), *hang], MOETION_SECRET="ab" * 16)
        for node in range(2)
    )
    for process in (leader, other):
        assert process.stdout is not None
        process.stdout.readline()
    other.kill()
    _, errors = leader.communicate(timeout=LIMIT_SECONDS)
    other.communicate(timeout=LIMIT_SECONDS)
    assert leader.returncode == 1
    assert "moetion-run: ending the job: the agent of node 1 is gone" in errors


def test_several_workers_killed_at_once_each_get_a_warm_spare_also_where_none_can_fork(
    tmp_path: Path,
) -> None:
    # A thread that runs when the imports are done is lost in a fork.
    thread = "threading.Thread(target=threading.Event().wait, daemon=True).start()"
    (tmp_path / "threaded.py").write_text(f"import threading\n{thread}\n")
    env = {"MOETION_PREIMPORT": "torch,threaded"}
    env["PYTHONPATH"] = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    job = Nodes(tmp_path, "--until", str(tmp_path / "over"), afresh=True, **env)
    try:
        leader = job.alone(3, "--spares", "2")
        for number, ranks in ((1, (1, 2)), (2, (0, 2))):
            # The first one of all has become a worker.
            spares = [e["pid"] for e in job.until("spare", 1 + 2 * number)[-2:]]
            for rank in ranks:
                os.kill(job.until("started", 1, global_rank=rank)[-1]["pid"], signal.SIGKILL)
            job.until("resumed", number)
            started = job.until("started", 3 + 2 * number)[-2:]
            assert [e["start"] for e in started] == ["warm", "warm"]
            assert {e["pid"] for e in started} == set(spares)
            assert {e["global_rank"] for e in started} == set(ranks)
        (tmp_path / "over").touch()
        code, lines = ended(leader)
        assert code == 0, lines
        assert (
            sum("2 threads run after the imports, so no worker is forked" in x for x in lines) == 1
        )
        job.assert_nothing_is_left()
    finally:
        job.close()
