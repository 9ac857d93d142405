"""Negative controls: the identity tests can tell right from wrong, and so can the replay itself."""

import pytest

from .harness import SABOTAGED, Run, Runner, first_difference, kills
from .test_variants import ITERATIONS as LONGER
from .test_variants import VARIANTS as MODELS

ITERATIONS = 9
VARIANTS = {"lost_buffer": "sigmoid"}


def _sabotaged(runner: Runner, name: str, sabotage: str, variant: str = "demo") -> Run:
    return runner.run(
        name,
        iterations=ITERATIONS,
        variant=variant,
        script=SABOTAGED,
        env={"MOETION_TEST_SABOTAGE": sabotage},
        flags=["--moetion", "--moetion-window", "3", *kills((3, 7, "backward:1"))],
    )


@pytest.mark.parametrize(
    "sabotage", ["skip_iteration", "stale_frame", "local_norm", "lost_step", "lost_buffer"]
)
def test_a_wrong_replay_is_seen_by_the_digests(runner: Runner, off: Run, sabotage: str) -> None:
    variant = VARIANTS.get(sabotage, "demo")
    if variant != "demo":
        assert MODELS["router-bias"] == {"variant": variant}
        # It is that of another test, too.
        off = runner.off("router-bias-off", iterations=LONGER, variant=variant)
        assert off.code == 0, off.tail()
    run = _sabotaged(runner, f"control-{sabotage}", f"{sabotage},no_check", variant)
    assert run.events("fault"), "the fault never fired"
    assert run.code == 0, run.tail()
    different = first_difference(run, off)
    assert different is not None, f"{sabotage} went unnoticed"


def test_a_replay_that_diverges_is_refused_by_itself(runner: Runner) -> None:
    run = _sabotaged(runner, "control-refused", "local_norm")
    assert run.code != 0, "a diverging replay went on training"
    assert "gave other bits than training" in run.log


def test_when_nothing_can_be_rebuilt_the_job_ends_with_one_line(runner: Runner) -> None:
    run = _sabotaged(runner, "control-lost-frames", "lost_frames")
    assert run.code != 0
    said = [line for line in run.log.splitlines() if "cannot be rebuilt" in line]
    ended = [line for line in said if line.startswith("moetion-run: ending the job")]
    assert len(ended) == 1, run.tail()
    assert "restart from a Megatron checkpoint" in ended[0]
