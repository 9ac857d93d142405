"""torchrun's command line is read as torchrun reads it, and refused in one line where it is not."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from megatron_moetion.agent.environment import UsageError, startup_folder, worker_base_env
from megatron_moetion.agent.launcher import (
    build_parser,
    check,
    local_world_size,
    option,
    rendezvous_of,
    secret_of,
)
from megatron_moetion.agent.membership import Rendezvous


@pytest.fixture(autouse=True)
def _no_torchrun_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PET_MASTER_PORT", "PET_NODE_RANK", "PET_NNODES", "MOETION_SECRET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MOETION_FAILURE_DOMAIN", "host-a")


def rendezvous(*argv: str) -> Rendezvous:
    args = build_parser().parse_args([*argv, "train.py", "--moetion-timeout", "30"])
    check(args)
    return rendezvous_of(args)


def test_one_node_chooses_a_free_port() -> None:
    limit = timedelta(seconds=30)
    assert rendezvous() == Rendezvous(1, 0, "127.0.0.1", 0, limit, "host-a")
    assert rendezvous("--standalone", "--nnodes", "1") == rendezvous()
    assert rendezvous("--master-port", "1234").master_port == 1234
    assert rendezvous("--failure-domain", "rack-7").domain == "rack-7"


def test_several_nodes_meet_at_the_master_or_the_rendezvous_endpoint() -> None:
    two = ("--nnodes", "2", "--node-rank", "1")
    assert rendezvous(*two, "--master-addr", "a").master_addr == "a"
    assert rendezvous(*two, "--master-addr", "a").master_port == 29500
    found = rendezvous(*two, "--rdzv-backend", "c10d", "--rdzv-endpoint", "b:77")
    assert (found.master_addr, found.master_port, found.node_rank) == ("b", 77, 1)
    assert rendezvous("--nnodes", "2:2", "--node-rank", "0").num_nodes == 2


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--nnodes", "1:4"], "the number of nodes is fixed"),
        (["--nnodes", "0"], "the number of nodes is fixed"),
        (["--nnodes", "2"], "needs --node-rank 0..1"),
        (["--nnodes", "2", "--node-rank", "2"], "must be below --nnodes 2"),
        (["--rdzv-endpoint", "host:x"], "'x' is not a number"),
        (["--tee", "3"], "--tee is not supported by moetion-run"),
        (["--no-python", "-m"], "contradict each other"),
        (["--spares", "-1"], "--spares -1: give a number of at least 0"),
    ],
)
def test_what_cannot_be_run_is_refused(argv: list[str], line: str) -> None:
    with pytest.raises(UsageError, match=line):
        rendezvous(*argv)


def test_one_node_makes_a_secret_and_several_need_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert secret_of(1) != secret_of(1)
    with pytest.raises(UsageError, match="set it to the same random hex string"):
        secret_of(2)
    monkeypatch.setenv("MOETION_SECRET", "nonsense")
    with pytest.raises(UsageError, match="is not hex"):
        secret_of(2)
    monkeypatch.setenv("MOETION_SECRET", "abcd")
    assert secret_of(2) == secret_of(1) == "abcd"


def test_the_number_of_workers_is_read_as_torchrun_reads_it() -> None:
    assert local_world_size("3") == 3
    for text in ("x", "0"):
        with pytest.raises(UsageError, match="--nproc-per-node"):
            local_world_size(text)


def test_options_of_the_script_are_found_in_both_spellings() -> None:
    args = ["--moetion-dir", "a", "--x", "--moetion-dir=b"]
    assert option(args, "--moetion-dir") == "b"
    assert option(args[:2], "--moetion-dir") == "a"
    assert option(args, "--moetion-timeout") is None


def test_the_script_keeps_its_own_arguments() -> None:
    args = build_parser().parse_args(["--spares", "0", "train.py", "--spares", "7", "--moetion"])
    assert args.spares == 0
    assert args.training_script_args == ["--spares", "7", "--moetion"]


def test_workers_inherit_what_sourcing_would_have_set(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    startup = str(startup_folder())
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{startup}")
    monkeypatch.setenv("MOETION_SPARE_FD", "3")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    env = worker_base_env(2)
    assert env["PYTHONPATH"] == f"{startup}:{tmp_path}"
    assert env["MOETION"] == "1"
    assert env["OMP_NUM_THREADS"] == "1"
    assert env["TORCHELASTIC_USE_AGENT_STORE"] == "True"
    assert "MOETION_SPARE_FD" not in env
    assert "OMP_NUM_THREADS" not in worker_base_env(1)
