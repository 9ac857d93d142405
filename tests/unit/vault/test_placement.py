"""Copies of a frame never share a failure domain, and no node holds much more than another."""

from __future__ import annotations

from collections import Counter

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moetion.vault.placement import Placement, PlacementError, most_copies, place

FAST = settings(max_examples=80, deadline=None)
DOMAINS = st.lists(st.sampled_from("abcd"), min_size=2, max_size=7)


def load(placement: Placement) -> list[int]:
    nodes = range(len(placement.holders))
    return [len(placement.held_by(node)) for node in nodes]


def smallest_peak(domains: list[str], num_copies: int) -> int:
    """The least that the fullest node can hold, by maximum flow."""
    for peak in range(1, len(domains) * num_copies + 1):
        flow = nx.DiGraph()
        for owner, own in enumerate(domains):
            flow.add_edge("source", ("owner", owner), capacity=num_copies)
            flow.add_edge(("holder", owner), "sink", capacity=peak)
            for holder, domain in enumerate(domains):
                if domain != own:
                    flow.add_edge(("owner", owner), (owner, domain), capacity=1)
                    flow.add_edge((owner, domain), ("holder", holder), capacity=1)
        if nx.maximum_flow_value(flow, "source", "sink") == len(domains) * num_copies:
            return peak
    raise AssertionError("no placement at all")


@FAST
@given(DOMAINS, st.integers(0, 3))
def test_each_copy_is_in_a_domain_of_its_own(domains: list[str], wanted: int) -> None:
    num_copies = min(wanted, most_copies(domains))
    placement = place(domains, num_copies)
    assert placement.num_copies == num_copies
    for owner, holders in enumerate(placement.holders):
        used = [domains[node] for node in (owner, *holders)]
        assert len(set(used)) == num_copies + 1
        for copy, node in enumerate((owner, *holders)):
            assert placement.copy_number(owner, node) == copy
            assert (owner in placement.held_by(node)) == (copy > 0)


@FAST
@given(DOMAINS, st.integers(1, 3))
def test_the_fullest_node_holds_at_most_one_more_than_it_has_to(
    domains: list[str], wanted: int
) -> None:
    num_copies = min(wanted, most_copies(domains))
    if num_copies:
        assert max(load(place(domains, num_copies))) <= smallest_peak(domains, num_copies) + 1


@FAST
@given(st.integers(2, 5), st.integers(1, 4), st.data())
def test_domains_of_equal_size_are_loaded_equally(
    num_domains: int, size: int, data: st.DataObject
) -> None:
    domains = data.draw(st.permutations([str(d) for d in range(num_domains)] * size))
    num_copies = data.draw(st.integers(1, num_domains - 1))
    placement = place(domains, num_copies)
    assert Counter(load(placement)) == {num_copies: num_domains * size}


@FAST
@given(DOMAINS)
def test_only_which_labels_are_equal_counts(domains: list[str]) -> None:
    renamed = [{"a": "z", "b": "y", "c": "x", "d": "w"}[domain] for domain in domains]
    most = most_copies(domains)
    assert place(domains, most) == place(list(domains), most) == place(renamed, most)


def test_two_copies_in_one_domain_are_refused_unless_they_may_be() -> None:
    domains = ["host-a", "host-a", "host-b"]
    with pytest.raises(PlacementError, match=r"needs 3 failure domains .* are in 2 \(host-a, h"):
        place(domains, 2)
    assert place(domains, 2, share_domains=True).holders == ((1, 2), (2, 0), (0, 1))
    # As long as there are enough domains, they are kept apart all the same.
    assert place(domains, 1, share_domains=True) == place(domains, 1)
    with pytest.raises(PlacementError, match="needs 4 nodes and this job has 3: give at most 2"):
        place(domains, 3, share_domains=True)
    with pytest.raises(PlacementError, match="drop it or add nodes"):
        place(["a"], 1)
    assert place(["a"], 0) == Placement(((),))
