"""The phases of a job: one enum, one transition table, one mutator.

The leader's agent moves the phase; workers learn of it by notices.
"""

from __future__ import annotations

from enum import Enum


class Phase(Enum):
    """Where the job is; the value says what is being waited for."""

    TRAINING = "a failure or the end of the script"
    PLANNING = "every survivor's report"
    SETTLING = "survivors to stand at the committed iteration"
    REGROUPING = "survivors to leave their groups and replacements to boot"
    GATHERING = "the inventories of all vaults"
    RESTORING = "the failed stage to load and replay, the others to join"
    FALLING_BACK = "the end of all workers, as no tier is left"
    FINISHED = "nothing more"


class Step(Enum):
    """What moves the phase."""

    FAILED = "a worker died"
    REPORTED = "every survivor reported"
    SETTLED = "every survivor settled"
    QUIESCED = "every survivor quiesced and every replacement is ready"
    GATHERED = "all inventories are here"
    JOINED = "everybody joined the new epoch"
    ENDED = "every worker finished"
    HOPELESS = "nothing left to rebuild from"


TRANSITIONS: dict[tuple[Phase, Step], Phase] = {
    (Phase.TRAINING, Step.FAILED): Phase.PLANNING,
    (Phase.PLANNING, Step.REPORTED): Phase.SETTLING,
    (Phase.SETTLING, Step.SETTLED): Phase.REGROUPING,
    (Phase.REGROUPING, Step.QUIESCED): Phase.GATHERING,
    (Phase.GATHERING, Step.GATHERED): Phase.RESTORING,
    (Phase.RESTORING, Step.JOINED): Phase.TRAINING,
    # A second failure starts the round again, whatever it was waiting for.
    (Phase.PLANNING, Step.FAILED): Phase.PLANNING,
    (Phase.SETTLING, Step.FAILED): Phase.PLANNING,
    (Phase.REGROUPING, Step.FAILED): Phase.PLANNING,
    (Phase.GATHERING, Step.FAILED): Phase.PLANNING,
    (Phase.RESTORING, Step.FAILED): Phase.PLANNING,
    (Phase.TRAINING, Step.HOPELESS): Phase.FALLING_BACK,
    (Phase.PLANNING, Step.HOPELESS): Phase.FALLING_BACK,
    (Phase.SETTLING, Step.HOPELESS): Phase.FALLING_BACK,
    (Phase.REGROUPING, Step.HOPELESS): Phase.FALLING_BACK,
    (Phase.GATHERING, Step.HOPELESS): Phase.FALLING_BACK,
    (Phase.RESTORING, Step.HOPELESS): Phase.FALLING_BACK,
    (Phase.TRAINING, Step.ENDED): Phase.FINISHED,
}
FINAL = frozenset({Phase.FALLING_BACK, Phase.FINISHED})


class IllegalStep(RuntimeError):
    """The table has no such transition: a bug, never a state to carry on from."""


class PhaseMachine:
    """Holds the phase; `take` is the only thing that changes it."""

    def __init__(self) -> None:
        self._phase = Phase.TRAINING

    @property
    def phase(self) -> Phase:
        """The current phase."""
        return self._phase

    def take(self, step: Step) -> Phase:
        """Move, and return the new phase.

        Raises:
            IllegalStep: the table does not allow this step here.
        """
        try:
            self._phase = TRANSITIONS[self._phase, step]
        except KeyError:
            raise IllegalStep(f"{step.name} cannot happen in phase {self._phase.name}") from None
        return self._phase


def diagram() -> str:
    """The table as lines of text, for the README."""
    return "\n".join(
        f"{phase.name:<12} --{step.name.lower()}--> {after.name}"
        for (phase, step), after in TRANSITIONS.items()
    )
