"""After a recovery everything reads as if nothing had happened, also when the rank that writes
died.
"""

import re

from .harness import Runner, assert_same_bits, kills

ITERATIONS = 22
# Rank 3 prints losses, rank 0 the rest; 9 and 10 lie inside a log interval and around an
# evaluation.
FAILURES = [(3, 5, "backward:1"), (3, 9, "end"), (0, 10, "forward:1"), (3, 17, "norm")]
FLAGS = ["--log-interval", "4", "--eval-interval", "5", "--eval-iters", "2"]
VALIDATION = re.compile(r"validation loss at (.*? lm loss PPL: \S+)")


def test_log_lines_sums_and_validation_are_those_of_a_run_without_failure(runner: Runner) -> None:
    off = runner.off("reporting-off", iterations=ITERATIONS, flags=FLAGS)
    assert off.code == 0, off.tail()
    run = runner.run(
        "reporting", iterations=ITERATIONS, flags=["--moetion", *FLAGS, *kills(*FAILURES)]
    )
    assert run.code == 0, run.tail()
    assert_same_bits(run, off, ITERATIONS)
    assert len(off.lines) == 1 + ITERATIONS // 4
    assert run.lines == off.lines
    losses = VALIDATION.findall(off.log)
    assert len(losses) >= ITERATIONS // 5
    assert VALIDATION.findall(run.log) == losses
    assert [e["recovered"] for e in run.recoveries] == [[rank] for rank, *_ in FAILURES]
