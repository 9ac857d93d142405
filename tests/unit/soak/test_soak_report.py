"""The table at the end of a soak."""

from megatron_moetion.agent.escalation import Tier
from tests.soak.inject import Outcome
from tests.soak.plan import Failure
from tests.soak.report import lost_by_epoch, table


def outcome(kind: str, epochs: tuple[int, int], ms: float) -> Outcome:
    return Outcome(Failure(kind, (0,), None, 3, 0.0), 9, epochs, ms, str(Tier.SPILL), True)


def test_each_kind_has_a_line_with_what_it_cost() -> None:
    outcomes = [
        outcome("one", (1, 1), 100),
        outcome("two", (2, 3), 50),
        outcome("one", (4, 4), 300),
    ]
    told = [
        {"kind": "planned", "epoch": 1, "committed": 7},
        {"kind": "went-back", "epoch": 1, "iteration": 6},
        {"kind": "planned", "epoch": 3, "committed": 20},
        {"kind": "went-back", "epoch": 3, "iteration": 18},
        {"kind": "planned", "epoch": 4, "committed": 0},
        {"kind": "gathered", "epoch": 4, "committed": 30},
        {"kind": "went-back", "epoch": 4, "iteration": 30},
    ]
    lines = [line.split() for line in table(outcomes, ["two"], lost_by_epoch(told))]
    assert lines[1:] == [
        ["one", "2", "2", "spill", "1", "200", "/", "300", "ms"],
        ["two", "2", "1", "spill", "2", "50", "/", "50", "ms"],
    ]
