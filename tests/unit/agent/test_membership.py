"""How the agents of a job find each other."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from megatron_moetion.agent.membership import (
    ANY_PLACE,
    Arrival,
    Meeting,
    Member,
    MembershipError,
    Rendezvous,
    arrive,
    meet,
)
from tests.ports import free_port

TIMEOUT = timedelta(seconds=20)


def rendezvous(port: int, node_rank: int = 0, timeout: timedelta = TIMEOUT) -> Rendezvous:
    return Rendezvous(2, node_rank, "127.0.0.1", port, timeout, f"host{node_rank}")


def test_all_nodes_find_the_same_members() -> None:
    port = free_port()
    with ThreadPoolExecutor(2) as nodes:
        meetings = list(nodes.map(lambda rank: meet(rendezvous(port, rank), 2 + rank), (0, 1)))
    assert meetings[0].run_id == meetings[1].run_id
    assert meetings[0].members.nodes == meetings[1].members.nodes
    assert meetings[1].members.own.global_ranks == (2, 3, 4)
    for meeting in meetings:
        meeting.listener.close()


def test_the_store_stays_until_the_last_node_has_read_who_is_there() -> None:
    port = free_port()
    with ThreadPoolExecutor(1) as hosting:
        first = hosting.submit(meet, rendezvous(port), 1)
        store = TCPStore("127.0.0.1", port, is_master=False, timeout=TIMEOUT)
        store.set("moetion/agent/1", json.dumps(asdict(Member(1, "127.0.0.1", 1, 1))))
        store.wait(["moetion/agent/read/0"])
        assert not first.done()
        store.set("moetion/agent/read/1", "")
        first.result().listener.close()


def test_a_node_that_does_not_appear_is_named() -> None:
    with pytest.raises(MembershipError, match=r"node 1 of 2 did not appear within 0\.2 s"):
        meet(rendezvous(free_port(), timeout=timedelta(seconds=0.2)), 1)


def meet_all(port: int) -> list[Meeting]:
    with ThreadPoolExecutor(2) as nodes:
        meetings = list(nodes.map(lambda rank: meet(rendezvous(port, rank), 2 + rank), (0, 1)))
    assert all(isinstance(meeting, Meeting) for meeting in meetings)
    return [meeting for meeting in meetings if isinstance(meeting, Meeting)]


def test_who_comes_when_the_job_is_going_on_learns_where_the_leader_is() -> None:
    port = free_port()
    meetings = meet_all(port)
    # One for the place of a lost node, one for any.
    arrivals = [meet(rendezvous(port, 1), 3), arrive(rendezvous(port, ANY_PLACE), 3)]
    for arrival, wanted in zip(arrivals, (1, ANY_PLACE), strict=True):
        assert isinstance(arrival, Arrival)
        assert arrival.run_id == meetings[0].run_id
        assert arrival.leader == replace(meetings[0].members.nodes[0], first_global_rank=0)
        own = Member(wanted, "127.0.0.1", arrival.listener.getsockname()[1], 3)
        assert arrival.own == own
    for meeting in (*meetings, *arrivals):
        meeting.listener.close()


def test_a_standby_waits_for_the_job_to_begin_and_not_for_ever() -> None:
    port = free_port()
    with ThreadPoolExecutor(1) as standing_by:
        early = standing_by.submit(arrive, rendezvous(port, ANY_PLACE), 3)
        meetings = meet_all(port)
        assert early.result().run_id == meetings[0].run_id
    for meeting in (*meetings, early.result()):
        meeting.listener.close()
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with pytest.raises(MembershipError, match=r"the job did not begin within 0\.2 s"):
        arrive(rendezvous(store.port, ANY_PLACE, timedelta(seconds=0.2)), 3)


def test_a_node_rank_that_is_given_twice_at_the_start_is_refused() -> None:
    port = free_port()
    with ThreadPoolExecutor(1) as hosting:
        first = hosting.submit(meet, rendezvous(port), 1)
        store = TCPStore("127.0.0.1", port, is_master=False, timeout=TIMEOUT)
        store.add("moetion/taken/1", 1)
        with pytest.raises(MembershipError, match="node rank 1 is taken"):
            meet(rendezvous(port, 1), 1)
        store.set("moetion/agent/1", json.dumps(asdict(Member(1, "127.0.0.1", 1, 1))))
        store.set("moetion/agent/read/1", "")
        first.result().listener.close()
