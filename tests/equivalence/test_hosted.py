"""Plain torchrun starts the workers of a node anew after each failure; they go on from memory."""

from .harness import TORCHRUN, Run, Runner, assert_same_bits, assert_within_claim, kills

FAILURES = ((3, 7, "backward:1"), (0, 18, "optimizer"))
RESTARTS = ["--max-restarts", str(len(FAILURES))]


def test_workers_that_torchrun_starts_anew_go_on_bit_for_bit(runner: Runner, off: Run) -> None:
    run = runner.run(
        "hosted",
        iterations=25,
        launcher=TORCHRUN,
        launcher_flags=RESTARTS,
        flags=["--moetion", *kills(*FAILURES)],
    )
    assert run.code == 0, run.tail()
    # Torchrun kills the healthy ones too, wherever they are.
    assert_same_bits(run, off, 25, lines_may_repeat=True)
    assert_within_claim(run)
    assert [e["recovered"] for e in run.recoveries] == [[0, 1, 2, 3]] * len(FAILURES)
    started = [e["start"] for e in run.events("started")]
    assert started == ["hosted"] * 4 * (1 + len(FAILURES))


def test_on_several_nodes_those_of_the_others_wait(runner: Runner, off: Run) -> None:
    run = runner.run(
        "hosted-nodes",
        iterations=25,
        nodes=2,
        launcher=TORCHRUN,
        launcher_flags=RESTARTS,
        flags=["--moetion", *kills(*FAILURES)],
    )
    assert run.code == 0, run.tail()
    assert_same_bits(run, off, 25, lines_may_repeat=True)
    assert [e["recovered"] for e in run.recoveries] == [[2, 3], [0, 1]]
    started = [e["global_rank"] for e in run.events("started")]
    assert sorted(started) == [0, 0, 1, 1, 2, 2, 3, 3]
