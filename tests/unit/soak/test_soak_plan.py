"""The plan of a soak: the seed decides it, and it asks for nothing impossible."""

from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.soak.plan import EARLY, KINDS, LATE, SPREAD, Machines, failures, kinds_for

CUTS = ("stage", "shard")
MACHINES = st.builds(Machines, st.integers(1, 4), st.sampled_from((2, 4, 8))).filter(
    lambda machines: machines.world_size % 4 == 0
)


def test_the_same_seed_gives_the_same_failures_and_another_one_others() -> None:
    machines = Machines(4, 2)
    first, again, other = (list(islice(failures(s, "stage", machines), 50)) for s in (7, 7, 8))
    assert first == again
    assert first != other


@given(seed=st.integers(0, 10**6), cut=st.sampled_from(CUTS), machines=MACHINES)
def test_every_failure_can_be_injected(seed: int, cut: str, machines: Machines) -> None:
    for failure in islice(failures(seed, cut, machines), 40):
        assert set(failure.ranks) | set(failure.second) <= set(range(machines.world_size))
        assert failure.ranks == tuple(sorted(set(failure.ranks)))
        assert failure.ranks
        assert failure.kind in kinds_for(machines)
        fewest, most = KINDS[failure.kind].between
        assert fewest <= failure.after <= most
        assert 0 <= failure.delay <= SPREAD
        assert failure.node is None or 0 < failure.node < machines.agents
        assert bool(failure.event) == bool(failure.second)
        if failure.second_node is not None:
            assert 0 < failure.second_node < machines.agents
            assert failure.second == machines.of_node(failure.second_node)
            assert set(failure.second) - set(failure.ranks)
        elif failure.event in EARLY:
            assert not set(failure.ranks) & set(failure.second)
        else:
            assert failure.event in ("", *LATE)


@pytest.mark.parametrize("cut", CUTS)
def test_every_kind_comes(cut: str) -> None:
    machines = Machines(4, 2)
    drawn = {failure.kind for failure in islice(failures(1, cut, machines), 300)}
    assert drawn == set(kinds_for(machines))


def test_what_is_not_to_be_survived_is_not_injected() -> None:
    nodes = {name for name, kind in KINDS.items() if kind.min_agents > 1}
    assert nodes <= kinds_for(Machines(2, 2)).keys()
    assert nodes.isdisjoint(kinds_for(Machines(1, 4)))
