"""A bit flips in a stored frame: it is found when it is read, named, and never used."""

from .harness import Run, Runner, assert_same_bits

WINDOW = 4


def corrupt(global_rank: int, iteration: int) -> str:
    return f"corrupt:global_rank={global_rank},iteration={iteration},at=capture"


def kill(global_rank: int, iteration: int) -> str:
    return f"kill:global_rank={global_rank},iteration={iteration},at=backward:1"


def flags(*faults: str) -> list[str]:
    # Bases are counted here, and a new order of experts would make one more.
    steady = ["--moetion-window", str(WINDOW), "--moetion-popularity", "none"]
    return ["--moetion", *steady, "--moetion-fault", ";".join(faults)]


def test_the_next_older_base_is_taken_whoever_owns_the_damaged_frame(
    runner: Runner, off: Run
) -> None:
    # The newest frame of the rank that dies, then of its healthy peer, then of both.
    faults = [corrupt(3, 9), kill(3, 10), corrupt(2, 21), kill(3, 22)]
    faults += [corrupt(0, 33), corrupt(1, 33), kill(0, 34)]
    run = runner.run("damaged", iterations=45, flags=flags(*faults))
    assert run.code == 0, run.tail()
    assert_same_bits(run, off, 45)
    assert [e["recovered"] for e in run.recoveries] == [[3], [3], [0]]
    quarantined = {(e["global_rank"], e["key"]) for e in run.events("quarantined")}
    assert quarantined == {
        (3, "frame/9/state"),
        (2, "frame/21/state"),
        (0, "frame/33/state"),
        (1, "frame/33/state"),
    }
    replayed = [e["replayed"] for e in run.events("resumed") if e["who"] in ("rank3", "rank0")]
    assert sorted(replayed) == [0, 0, 0, WINDOW, WINDOW, WINDOW], "not one older base each time"
    assert "vault entry frame/9/state (rank 3, iteration 9) is damaged" in run.log


def test_without_any_complete_base_the_job_ends_with_one_line(runner: Runner) -> None:
    # Every base that is kept needs the frame in the middle of the newest window.
    run = runner.run("damaged-all", iterations=20, flags=flags(corrupt(3, 7), kill(3, 10)))
    assert run.code != 0
    ended = [line for line in run.log.splitlines() if line.startswith("moetion-run: ending")]
    assert len(ended) == 1, run.tail()
    assert "cannot be rebuilt" in ended[0]
    assert "restart from a Megatron checkpoint" in ended[0]
