"""Whole jobs of stub workers under moetion-run: deaths, second deaths, nodes, exit codes."""

from __future__ import annotations

import os
import signal
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
    protected,
)

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
    master_port, iterations = free_port(), 3000
    argv = ["--nnodes", "2", "--nproc-per-node", "1", "--master-port", str(master_port)]
    argv += ["--spares", "0"]
    script = protected(tmp_path, "1:1500", iterations=iterations)
    nodes = [
        launch(
            [*argv, "--node-rank", str(node), "--failure-domain", f"rack-{node}"],
            *(*script, "--moetion-replicas", "1"),
            MOETION_SECRET="ab" * 16,
        )
        for node in (0, 1)
    ]
    ports = [agents_port(master_port, node, LIMIT_SECONDS) for node in (0, 1)]
    kept = [stranger for port in ports for stranger in attack(port)]
    tasks = [len(os.listdir(f"/proc/{node.pid}/task")) for node in nodes]
    files = [len(os.listdir(f"/proc/{node.pid}/fd")) for node in nodes]
    assert all(node.poll() is None for node in nodes), "the job was over before it was attacked"
    outcome = finish(nodes, tmp_path)
    for stranger in kept:
        stranger.close()
    assert_trained_to_the_end(outcome, 2, iterations)
    assert [event["recovered"] for event in outcome.of("resumed")] == [[1]]
    assert max(tasks) < 40, tasks
    assert max(files) < 64 + 100, files
    for counted in outcome.of("counted"):
        # The last ones may still have been waiting, silent, when the job was over.
        assert counted["strangers"] >= 1005 - MAX_WAITING
        assert counted["durable"] != {}
        assert min(counted["durable"].values()) >= iterations - 3
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
    assert "moetion-run: ending the job: rank 1 failed 4 times at iteration 3\n" in outcome.errors


@pytest.mark.parametrize("flags", [["--moetion"], []])
def test_a_worker_that_fails_before_it_is_protected_ends_the_job_with_its_code(
    tmp_path: Path, flags: list[str]
) -> None:
    argv = ["--nproc-per-node", "2", "--no-python"]
    script = ["bash", "-c", "exit 2", *flags, "--moetion-dir", str(tmp_path)]
    outcome = finish([launch(argv, *script, stub=False)], tmp_path)
    assert outcome.codes == [2]
    assert outcome.errors.count("moetion-run:") == 1


def test_a_plain_command_runs_and_its_children_are_not_left_behind(tmp_path: Path) -> None:
    argv = ["--nproc-per-node", "2", "--no-python"]
    command = "sleep 600 & echo $! > $DIR/$RANK; echo $RANK of $WORLD_SIZE"
    process = launch(argv, "bash", "-c", command, stub=False, DIR=str(tmp_path))
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
    process = launch(["--nproc-per-node", "2", "--no-python"], "bash", "-c", hang, stub=False)
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
        launch([*argv, "--node-rank", str(node)], *hang, stub=False, MOETION_SECRET="ab" * 16)
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
