"""What ranks decide together at the edge of a window."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_moetion.config import Config
from megatron_moetion.host import Routing
from megatron_moetion.operators import Kind, Operator, ParamState, StateAccess
from megatron_moetion.schedule import WindowPolicy
from megatron_moetion.steering import Options, Steering
from megatron_moetion.window import ENOUGH

CPU = torch.device("cpu")
EXPERTS = [f"e{i}" for i in range(4)]


class Together:
    """Collectives between the threads of one test."""

    def __init__(self, num_ranks: int) -> None:
        self._barrier = threading.Barrier(num_ranks, timeout=60)
        self._given: list[torch.Tensor] = []
        self._lock = threading.Lock()

    def _exchange(self, tensor: torch.Tensor) -> torch.Tensor:
        with self._lock:
            self._given.append(tensor.clone())
        self._barrier.wait()
        found = torch.stack(self._given)
        if self._barrier.wait() == 0:
            self._given = []
        self._barrier.wait()
        return found

    def all_reduce(
        self, tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None
    ) -> None:
        found = self._exchange(tensor)
        tensor.copy_(found.amax(0) if op == dist.ReduceOp.MAX else found.sum(0))

    def gather(self, row: torch.Tensor) -> torch.Tensor:
        return self._exchange(row)


def operator(name: str, kind: Kind, numel: int) -> Operator:
    main = torch.empty(numel, device="meta")
    light = torch.empty(numel, dtype=torch.bfloat16, device="meta")
    param = torch.nn.Parameter(light)
    state = ParamState(name, param, light, main, StateAccess({}, main))
    return Operator(name, kind, [state], numel)


def steering(routing: bool = True, **flags: Any) -> Steering:
    operators = [operator(name, Kind.EXPERT, 1000) for name in EXPERTS]
    operators.append(operator("rest", Kind.LAYER, 1000))
    places = {name: (0, i) for i, name in enumerate(EXPERTS)}
    where = Routing(places, (1, len(EXPERTS)), None, float("inf")) if routing else None
    made = Steering(operators, 0, Options.of(Config(**flags)), where, False, CPU)
    made.ceiling = 16
    return made


def measure(made: Steering, seconds: float, bytes_per_second: float) -> None:
    for _ in range(100):
        made.pace.iterated(seconds)
        made.pace.copied(1_000_000, 1_000_000 / bytes_per_second)


def at_once(ranks: list[Steering], iteration: int) -> list[str | None]:
    """All ranks decide at the edge of a window."""
    together, news = Together(len(ranks)), dict[int, str | None]()

    def decide(number: int, made: Steering) -> Callable[[], None]:
        def run() -> None:
            news[number] = made.decide(iteration, together)

        return run

    threads = [threading.Thread(target=decide(i, made)) for i, made in enumerate(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(news) == len(ranks)
    return [news[i] for i in range(len(ranks))]


def test_all_take_the_window_that_the_slowest_needs_and_none_before_enough_is_measured() -> None:
    ranks = [steering(popularity="none") for _ in range(3)]
    for made in ranks:
        for _ in range(ENOUGH - 1):
            made.pace.iterated(1.0)
        made.pace.copied(100, 1.0)
    assert at_once(ranks, 4) == [None] * 3
    assert {made.timeline.newest.window for made in ranks} == {4}
    # A dense frame has 5 x 12 KB and some padding, a rolling one of W = 2 at most 44.
    for made, rate in zip(ranks, (1e6, 50_000, 1e6), strict=True):
        measure(made, 1.0, rate)
    news = at_once(ranks, 8)
    assert {made.timeline.newest.window for made in ranks} == {2}
    assert {made.timeline.newest.first for made in ranks} == {9}
    assert all(line is not None and line.startswith("rolling windows of 2") for line in news)


def test_it_is_decided_again_after_a_drift_and_only_when_old_frames_are_gone() -> None:
    made = steering(popularity="none")
    measure(made, 1.0, 1e6)
    at_once([made], 4)
    assert made.timeline.newest.window == 1
    measure(made, 0.05, 1e6)
    at_once([made], 5)
    assert made.timeline.newest.window == 1, "frames of the window before are still needed"
    made.timeline.forget(20)
    at_once([made], 20)
    assert made.timeline.newest.window == 2
    assert at_once([made], 22) == [None]


def test_one_rank_without_room_for_a_change_speaks_for_all() -> None:
    ranks = [steering(popularity="none") for _ in range(2)]
    ranks[1].ceiling = 0
    for made in ranks:
        measure(made, 1.0, 1e6)
    assert at_once(ranks, 4) == [None, None]
    assert {made.timeline.newest.window for made in ranks} == {4}


def test_the_least_popular_come_first_by_what_all_ranks_have_seen() -> None:
    ranks = [steering(window=4, window_policy="rolling") for _ in range(2)]
    loads = [torch.tensor([[9.0, 0.0, 5.0, 1.0]]), torch.tensor([[9.0, 8.0, 0.0, 1.0]])]
    for edge in (4, 8, 12, 16):
        for made, load in zip(ranks, loads, strict=True):
            made.loaded(edge, load)
        at_once(ranks, edge)
    for made in ranks:
        found = [part.operator for parts in made.timeline.newest.slots for part in parts]
        assert [name for name in found if name in EXPERTS] == ["e3", "e2", "e1", "e0"]


def test_where_nobody_knows_any_more_what_was_counted_the_order_stays() -> None:
    made = steering(window=4, window_policy="rolling")
    made.loaded(4, torch.tensor([[9.0, 8.0, 7.0, 1.0]]))
    at_once([made], 4)
    before = made.timeline.newest
    assert before.first == 5
    anew = steering(window=4, window_policy="rolling")
    anew.load_state(made.to_state())
    at_once([anew], 8)
    assert anew.timeline.newest == before


def test_deciding_again_after_an_abort_forgets_the_first_time() -> None:
    twice, once = steering(window=4), steering(window=4)
    twice.loaded(4, torch.tensor([[1.0, 9.0, 9.0, 9.0]]))
    at_once([twice], 4)
    for made in (twice, once):
        made.loaded(4, torch.tensor([[9.0, 9.0, 9.0, 1.0]]))
    at_once([twice, once], 4)
    assert twice.timeline.schedules == once.timeline.schedules
    assert torch.equal(twice.to_state(), once.to_state())


def test_a_replacement_decides_like_its_predecessor() -> None:
    before = steering(window=4)
    before.loaded(4, torch.tensor([[9.0, 8.0, 7.0, 1.0]]))
    at_once([before], 4)
    after = steering(window=4)
    after.load_state(before.to_state())
    assert after.timeline.schedules == before.timeline.schedules
    for made in (before, after):
        made.loaded(8, torch.tensor([[9.0, 1.0, 7.0, 1.0]]))
    at_once([before, after], 8)
    assert after.timeline.schedules == before.timeline.schedules


@pytest.mark.parametrize(
    ("flags", "is_open"),
    [
        ({}, True),
        ({"window": 3}, True),
        ({"window": 3, "window_policy": "rolling"}, False),
        ({"window_policy": "tumbling"}, True),
    ],
)
def test_what_the_user_leaves_open(flags: dict[str, Any], is_open: bool) -> None:
    options = Options.of(Config(**flags))
    assert options.open is is_open
    assert bool(options.ceilings) is is_open
    assert options.policies[0] is WindowPolicy(flags.get("window_policy", "rolling"))
