"""Several workers at once, killed from outside at whatever they are doing; also all of them."""

from pathlib import Path

from .harness import Run, Runner, assert_same_bits, follow, kill_workers

MOMENTS = {8: (0, 1, 2, 3), 19: (2, 3), 30: (0, 3), 41: (1, 2, 3), 52: (1, 0)}
"""{iteration whose log line is waited for: who is killed then}: everybody, each stage, both."""
LAST = 63


def _kill_at_each_moment(directory: Path) -> None:
    moments = dict(MOMENTS)
    for line in follow(directory / "log"):
        for iteration in [i for i in moments if f" iteration {i:8d}/" in line]:
            kill_workers(directory, moments.pop(iteration))
        if not moments:
            return


def test_any_number_of_workers_is_replaced_as_long_as_their_agents_live(
    runner: Runner, off: Run
) -> None:
    run = runner.run("several", iterations=LAST, flags=["--moetion"], meddle=_kill_at_each_moment)
    assert run.code == 0, run.tail()
    assert [e["recovered"] for e in run.recoveries] == [sorted(who) for who in MOMENTS.values()]
    assert_same_bits(run, off, LAST)
