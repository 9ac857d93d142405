"""Places are given to one agent at a time, in order, and never to one that does not fit."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from megatron_moetion.agent.membership import ANY_PLACE, Member
from megatron_moetion.agent.seats import Applicant, Parked, Seated, Seats, Turned

NODES = (Member(0, "a", 1, 2, 0, "rack-0"), Member(1, "b", 2, 2, 2, "rack-1"))


def applicant(agent: str, wanted: int = ANY_PLACE, num_workers: int = 2) -> Applicant:
    return Applicant(agent, Member(wanted, f"host-{agent}", 7, num_workers))


def test_standbys_take_their_turns_and_one_that_has_left_is_passed_over() -> None:
    seats = Seats(NODES)
    assert [seats.apply(applicant(agent)) for agent in "xyz"] == [Parked(0), Parked(1), Parked(2)]
    seats.leave("x")
    assert seats.vacate(1) == 1
    given_away = Member(1, "host-y", 7, 2, 2, "rack-1", tenure=1)
    # The ranks and the label are the place's, only the address is the agent's.
    assert seats.fill(1) == Seated("y", given_away)
    assert seats.members == [NODES[0], given_away]
    assert seats.fill(1) is None
    assert seats.vacate(1) == 2
    assert seats.fill(1) == Seated("z", Member(1, "host-z", 7, 2, 2, "rack-1", tenure=2))
    assert seats.waiting == 0


def test_who_comes_while_a_place_is_vacant_gets_it_at_once() -> None:
    for wanted in (1, ANY_PLACE):
        seats = Seats(NODES)
        seats.vacate(1)
        answer = seats.apply(applicant("x", wanted))
        assert isinstance(answer, Seated)
        assert answer.member.node_rank == 1


def test_what_does_not_fit_is_turned_away_with_what_to_do() -> None:
    seats = Seats(NODES)
    answer = seats.apply(applicant("x", wanted=1))
    assert isinstance(answer, Turned)
    assert "node rank 1 is taken" in answer.reason
    assert "--standby" in answer.reason
    answer = seats.apply(applicant("x", num_workers=3))
    assert answer == Turned("no node of the job has 3 workers: --nproc-per-node")
    seats.vacate(1)
    answer = seats.apply(applicant("x", wanted=1, num_workers=3))
    assert isinstance(answer, Turned)
    assert "node 1 of the job has 2 workers" in answer.reason


def test_a_standby_with_other_workers_waits_for_the_node_that_it_fits() -> None:
    seats = Seats((NODES[0], Member(1, "b", 2, 5, 2)))
    seats.apply(applicant("five", num_workers=5))
    seats.apply(applicant("two"))
    seats.vacate(0)
    answer = seats.fill(0)
    assert answer is not None
    assert answer.agent == "two"
    assert seats.waiting == 1


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("vacate"), st.integers(0, 2)),
        st.tuples(st.just("apply"), st.integers(-1, 2)),
        st.tuples(st.just("leave"), st.integers(0, 20)),
    ),
    max_size=40,
)


@given(STEPS)
def test_a_place_has_one_agent_and_an_agent_one_place(steps: list[tuple[str, int]]) -> None:
    """Each tenure is given once, only of a vacant place, and to an agent that has none."""
    seats = Seats([Member(n, "a", n, 1, n) for n in range(3)])
    vacant: set[int] = set()
    seated: list[Seated] = []
    parked: list[str] = []
    for number, (step, argument) in enumerate(steps):
        answer = None
        if step == "vacate" and argument not in vacant:
            vacant.add(argument)
            seats.vacate(argument)
            answer = seats.fill(argument)
        elif step == "apply":
            answer = seats.apply(applicant(f"{number}", argument, num_workers=1))
            if isinstance(answer, Parked):
                assert answer.ahead == len(parked)
                assert not vacant, "it waits though a place is vacant"
                parked.append(f"{number}")
        elif step == "leave":
            seats.leave(f"{argument}")
            parked = [agent for agent in parked if agent != f"{argument}"]
        if isinstance(answer, Seated):
            place = answer.member.node_rank
            assert place in vacant
            vacant.remove(place)
            if step == "vacate":
                assert answer.agent == parked.pop(0), "not the one who has waited longest"
            seated.append(answer)
        assert seats.waiting == len(parked)
    tenures = [(one.member.node_rank, one.member.tenure) for one in seated]
    assert len(set(tenures)) == len(tenures)
    assert len({one.agent for one in seated}) == len(seated)
