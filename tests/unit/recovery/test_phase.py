"""Every (phase, step) pair is either in the table or refused."""

import pytest

from megatron_moetion.recovery.phase import (
    FINAL,
    TRANSITIONS,
    IllegalStep,
    Phase,
    PhaseMachine,
    Step,
    diagram,
)

ROUND = [
    (Step.FAILED, Phase.PLANNING),
    (Step.REPORTED, Phase.SETTLING),
    (Step.SETTLED, Phase.REGROUPING),
    (Step.QUIESCED, Phase.GATHERING),
    (Step.GATHERED, Phase.RESTORING),
    (Step.JOINED, Phase.TRAINING),
]


def path_to(phase: Phase) -> list[Step]:
    """Steps that lead from TRAINING to a phase, by breadth-first search over the table."""
    seen: dict[Phase, list[Step]] = {Phase.TRAINING: []}
    frontier = [Phase.TRAINING]
    while frontier:
        current = frontier.pop(0)
        for (before, step), after in TRANSITIONS.items():
            if before is current and after not in seen:
                seen[after] = [*seen[current], step]
                frontier.append(after)
    return seen[phase]


def machine_in(phase: Phase) -> PhaseMachine:
    machine = PhaseMachine()
    for step in path_to(phase):
        machine.take(step)
    assert machine.phase is phase
    return machine


@pytest.mark.parametrize("step", Step)
@pytest.mark.parametrize("phase", Phase)
def test_each_pair_moves_as_the_table_says_or_is_refused(phase: Phase, step: Step) -> None:
    machine = machine_in(phase)
    if (phase, step) in TRANSITIONS:
        assert machine.take(step) is TRANSITIONS[phase, step]
        assert machine.phase is TRANSITIONS[phase, step]
    else:
        with pytest.raises(IllegalStep, match=f"{step.name} cannot happen in phase {phase.name}"):
            machine.take(step)
        assert machine.phase is phase


def test_a_round_returns_to_training() -> None:
    machine = PhaseMachine()
    assert [(step, machine.take(step)) for step, _ in ROUND] == ROUND


@pytest.mark.parametrize("phase", [phase for phase in Phase if phase not in FINAL])
def test_a_failure_in_any_phase_goes_back_to_planning(phase: Phase) -> None:
    assert machine_in(phase).take(Step.FAILED) is Phase.PLANNING


@pytest.mark.parametrize("phase", [phase for phase in Phase if phase in FINAL])
def test_nothing_leaves_a_final_phase(phase: Phase) -> None:
    assert not [step for before, step in TRANSITIONS if before is phase]


def test_the_diagram_has_one_line_per_transition() -> None:
    assert len(diagram().splitlines()) == len(TRANSITIONS)
