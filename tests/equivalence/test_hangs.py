"""Workers that hang, and others that leave in ways of their own; the one that did is named, killed
and replaced, and nobody else.
"""

import re
from pathlib import Path

import pytest

from megatron_moetion.agent.hangs import MUCH, SHORTEST_OF_TIMEOUT

from .harness import CUTS, Run, Runner, assert_same_bits
from .slow_pretrain import PAUSE, SLOW_ITERATION, SLOW_RANK

SLOW = Path(__file__).with_name("slow_pretrain.py")
STOPS = (
    (3, 8, "backward:1"),
    (0, 16, "forward:2"),
    (2, 24, "optimizer"),
    (1, 32, "grad-sync"),
    (0, 40, "end"),
    (3, 47, "capture"),
)
SPIN = (2, 57, "forward:1")
LEAVES = (
    ("exit0", 2, 59, "backward:0"),
    ("oom", 0, 61, "forward:1"),
    ("raise", 3, 63, "backward:2"),
)
LAST = 65
SAVED, EVALUATED = 54, 55
"""The limit is learned then, the recovery before is long over."""
HANGS = [*STOPS, SPIN]
FLAGS = ["--moetion-hang-factor", "4", "--moetion-timeout", "60"]


@pytest.fixture(scope="module", params=CUTS)
def hung(request: pytest.FixtureRequest, runner: Runner) -> Run:
    """All of it, with one rank that is slow now and then."""
    cut = request.param
    faults = [f"stop:global_rank={r},iteration={i},at={p}" for r, i, p in STOPS]
    faults.append("spin:global_rank={},iteration={},at={}".format(*SPIN))
    faults += [f"{kind}:global_rank={r},iteration={i},at={p}" for kind, r, i, p in LEAVES]
    flags = ["--moetion", "--moetion-cut", cut, *FLAGS, "--moetion-fault", ";".join(faults)]
    flags += ["--eval-interval", str(EVALUATED), "--eval-iters", "2"]
    # Next to the run's directory, as what is in it is read as events.
    name = f"hangs-{cut}"
    folder = runner.scratch / f"{name}.checkpoints"
    flags += ["--save", str(folder), "--save-interval", str(SAVED)]
    run = runner.run(name, iterations=LAST, script=SLOW, flags=flags)
    assert run.code == 0, run.tail()
    return run


def test_every_worker_that_hangs_or_leaves_is_replaced_bit_for_bit(hung: Run, off: Run) -> None:
    assert_same_bits(hung, off, LAST)
    ranks = [rank for rank, *_ in HANGS] + [rank for _, rank, *_ in LEAVES]
    assert [e["recovered"] for e in hung.recoveries] == [[rank] for rank in ranks]
    assert {e["code"] for e in hung.events("exited") if e["global_rank"] == 2} >= {137, 0}
    assert "you tried to allocate 1152921504606846976 bytes" in hung.log
    assert "[rank3]: megatron_moetion.faults.InjectedFault: injected by" in hung.log


def test_the_one_that_hangs_is_named_in_time_and_there_is_no_false_alarm(hung: Run) -> None:
    hangs, faults = hung.events("hang"), hung.events("fault")
    assert len(hangs) == len(HANGS)
    assert len(faults) == len(HANGS) + len(LEAVES)
    for hang, fault, (rank, iteration, place) in zip(hangs, faults, HANGS, strict=False):
        (culprit,) = hang["culprits"]
        assert (culprit["global_rank"], culprit["iteration"], culprit["place"]) == (
            rank,
            iteration,
            place,
        )
        assert hang["told"]
        seconds = (hang["monotonic_ns"] - fault["monotonic_ns"]) / 1e9
        print(f"{fault['fault']}: named after {seconds:.2f} s, limit {hang['limit']:.2f} s")
        # The others may go on for an iteration, and pings take a quarter of the limit.
        assert 0.9 * hang["limit"] < seconds < 2 * hang["limit"]
    said = re.findall(
        r"moetion-run: global rank (\d) stopped in iteration (\d+) at (\S+) \((.*?)\), ([\d.]+) s"
        r" without progress \(limit ([\d.]+) s",
        hung.log,
    )
    assert [(int(rank), int(iteration), place) for rank, iteration, place, *_ in said] == HANGS
    assert [how for *_, how, _, _ in said[:-1]] == ["stopped by a signal"] * len(STOPS)
    assert "holds the GIL" in said[-1][3]


def test_the_limit_is_told_when_it_is_learned_and_holds_until_it_is_told_again(hung: Run) -> None:
    told = hung.events("hang-limit")
    printed = re.findall(r"hangs are detected after: limit ([\d.]+) s", hung.log)
    assert len(printed) == len(told) > 0
    for hang in hung.events("hang"):
        known = [e for e in told if e["monotonic_ns"] < hang["monotonic_ns"]][-1]
        assert known["seconds"] / MUCH < hang["limit"] < known["seconds"] * MUCH


def test_slow_iterations_evaluation_and_saving_are_no_hang(hung: Run) -> None:
    pauses = {e["what"]: e for e in hung.events(PAUSE)}
    assert pauses.keys() == {"an iteration", "evaluation", "saving"}
    # That none of it raised an alarm is what the number of hangs has shown.
    for what in ("evaluation", "saving"):
        assert pauses[what]["seconds"] >= MUCH * pauses[what]["limit"]
    assert {e["who"] for e in pauses.values()} == {f"rank{SLOW_RANK}"}
    steps = [e["step"] for e in hung.events("hang")]
    assert pauses["an iteration"]["seconds"] > min(steps)
    # The limit was in force: after the recovery before, all ranks had said that they are steady.
    began, ended = hung.recoveries[len(STOPS) - 1], min(e["time"] for e in pauses.values())
    steady = [e for e in hung.events("steady") if began["time"] < e["time"] < ended]
    assert {e["who"] for e in steady} == {f"rank{rank}" for rank in range(4)}
    assert all(e["iteration"] < SLOW_ITERATION for e in steady)


@pytest.mark.parametrize("cut", CUTS)
def test_in_evaluation_and_saving_the_limit_is_learned_from_those_before(
    runner: Runner, off: Run, cut: str
) -> None:
    # Both have been seen twice, also by the one that takes the first one's place.
    stops = ((2, 12, "evaluate:1"), (2, 28, "save:1"))
    faults = ";".join(f"stop:global_rank={r},iteration={i},at={p}" for r, i, p in stops)
    # A disk that others use, too, may take seconds for a checkpoint.
    flags = ["--moetion", "--moetion-cut", cut, *FLAGS, "--moetion-timeout", "120"]
    flags += ["--moetion-fault", faults]
    flags += ["--eval-interval", "4", "--eval-iters", "2", "--save-interval", "7"]
    name = f"hangs-aside-{cut}"
    flags += ["--save", str(runner.scratch / f"{name}.checkpoints")]
    run = runner.run(name, iterations=30, flags=flags)
    assert run.code == 0, run.tail()
    assert_same_bits(run, off, 30)
    assert [e["recovered"] for e in run.recoveries] == [[2], [2]]
    for hang, (rank, iteration, place) in zip(run.events("hang"), stops, strict=True):
        (culprit,) = hang["culprits"]
        found = culprit["global_rank"], culprit["iteration"], culprit["place"]
        assert found == (rank, iteration, place)
        print(f"{place}: limit {hang['limit']:.2f} s, longest pause {hang['step']:.3f} s")
        # It was --moetion-timeout.
        assert hang["limit"] == max(4 * hang["step"], 120 / SHORTEST_OF_TIMEOUT) < 120
    assert run.log.count(" pauses seen here of ") == len(stops)


def test_an_exception_that_comes_again_ends_the_job_with_its_traceback(runner: Runner) -> None:
    faults = ";".join(["raise:global_rank=3,iteration=3,at=backward:1"] * 2)
    flags = ["--moetion", "--moetion-max-retries", "1", "--moetion-fault", faults]
    run = runner.run("repeats", iterations=8, flags=flags)
    assert run.code == 1
    assert [e["recovered"] for e in run.recoveries] == [[3]]
    shown = run.log.partition("moetion-run: what rank 3 raised first:\n")[2].splitlines()
    (last,) = [line for line in shown if line.startswith("moetion-run: ending the job:")]
    assert last.startswith(
        "moetion-run: ending the job: rank 3 failed 2 times at iteration 3"
        " (--moetion-max-retries 1): megatron_moetion.faults.InjectedFault: injected by"
    )
    trace = shown[: shown.index(last)]
    assert trace[0] == "[rank3]: Traceback (most recent call last):"
    assert any("in backward_step" in line or "in forward_backward" in line for line in trace)
    assert all(line.startswith("[rank3]: ") for line in trace)
