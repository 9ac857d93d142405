"""What is read of a calm run, and that an alarm in it shows."""

from tests.soak.calm import Calm

LOG = """
 [2026-01-01] iteration       19/  100000 | elapsed time per iteration (ms): 500.0 | lm loss: 1
 [2026-01-01] iteration       20/  100000 | elapsed time per iteration (ms): 7250.0 | lm loss: 1
 validation loss at iteration 20 | lm loss value: 4.2E+00 |
 successfully saved checkpoint from iteration      20 to folder
"""
LIMIT = {"kind": "hang-limit", "seconds": 30.0}


def test_a_run_without_an_alarm_is_told_by_its_numbers() -> None:
    calm = Calm.of(LOG, [LIMIT, {"kind": "steady"}])
    assert calm.raised == {}
    assert calm.lacks == ""
    assert str(calm) == (
        "2 iterations, 1 evaluations, 1 saves; 0 alarms, 0 recoveries or lost nodes; longest"
        " iteration 7.2 s, shortest limit 30.0 s"
    )


def test_alarms_and_recoveries_are_counted_apart() -> None:
    raised = [{"kind": "hang"}, {"kind": "detected"}, {"kind": "node-lost"}]
    calm = Calm.of(LOG, [LIMIT, *raised])
    assert calm.raised == {"hang": 1, "detected": 1, "node-lost": 1}
    assert "; 1 alarms, 2 recoveries or lost nodes;" in str(calm)


def test_a_run_that_shows_nothing_says_what_lacks() -> None:
    assert Calm.of("", []).lacks == "iterations, evaluations, saves, learned limits"
