"""Which failures a soak injects, and when: a pure function of the seed."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass

BETWEEN = (1, 6)
"""Iterations that are trained after a recovery before the next failure, fewest and most."""
BEFORE_A_STOP = (7, 9)
"""The same before a worker is stopped: the limit for hangs is learned then, and what a soak would
wait for until it is, is --moetion-timeout.
"""
SPREAD = 2.0
"""A failure comes up to so many iterations after the log line that it waits for."""
EARLY, LATE = ("detected", "planned", "settled"), ("quiesced", "gathered")
"""Events of a recovery that a second failure may follow: before and after all who died have been
replaced.
"""
BEHIND_EVENT_SECONDS = 0.5


@dataclass(frozen=True)
class Machines:
    """Where the ranks are.

    Attributes:
        agents, workers: of the job, of each agent.
        num_stages: ranks are dealt to them in order, evenly.
    """

    agents: int
    workers: int
    num_stages: int = 2

    @property
    def world_size(self) -> int:
        return self.agents * self.workers

    def of_stage(self, pp_rank: int) -> tuple[int, ...]:
        size = self.world_size // self.num_stages
        return tuple(range(pp_rank * size, (pp_rank + 1) * size))

    def of_node(self, node: int) -> tuple[int, ...]:
        return tuple(range(node * self.workers, (node + 1) * self.workers))


@dataclass(frozen=True)
class Failure:
    """One failure and, perhaps, a second one while it is recovered from.

    Attributes:
        kind: of `KINDS`.
        ranks: whose workers are killed, or get another signal.
        node: whose agent is killed or stopped, too; None leaves all alone.
        after: iterations that are trained before it.
        delay: until it comes, in iterations, after the last of these log lines.
        event: of the recovery that the second failure waits for; empty if there is none.
        second: whose workers are killed then.
        second_node: whose agent is killed then, too; its workers go with it.
        second_seconds: after the event.
    """

    kind: str
    ranks: tuple[int, ...]
    node: int | None
    after: int
    delay: float
    event: str = ""
    second: tuple[int, ...] = ()
    second_node: int | None = None
    second_seconds: float = 0.0

    def __str__(self) -> str:
        who = f"ranks {list(self.ranks)}" if self.node is None else f"node {self.node}"
        first = f"{self.kind}: {who}, {self.after} + {self.delay:.2f} iterations after the last one"
        if not self.event:
            return first
        behind = f"{self.second_seconds:.2f} s behind '{self.event}'"
        then = f"ranks {list(self.second)}"
        if self.second_node is not None:
            then = f"node {self.second_node}"
        return f"{first}, then {then} {behind}"


Draw = Callable[[random.Random, Machines], dict[str, object]]


def _several(draw: random.Random, machines: Machines) -> dict[str, object]:
    number = draw.randint(2, machines.world_size - 1)
    return {"ranks": tuple(sorted(draw.sample(range(machines.world_size), number)))}


def _stage(draw: random.Random, machines: Machines) -> dict[str, object]:
    return {"ranks": machines.of_stage(draw.randrange(machines.num_stages))}


def _one(draw: random.Random, machines: Machines) -> dict[str, object]:
    return {"ranks": (draw.randrange(machines.world_size),)}


def _second(draw: random.Random, machines: Machines) -> dict[str, object]:
    first, event = draw.randrange(machines.world_size), draw.choice(EARLY + LATE)
    # Who has not been replaced yet cannot be killed again.
    others = [r for r in range(machines.world_size) if event in LATE or r != first]
    told = {"ranks": (first,), "event": event, "second": (draw.choice(others),)}
    return {**told, "second_seconds": draw.uniform(0, BEHIND_EVENT_SECONDS)}


def _node(draw: random.Random, machines: Machines) -> dict[str, object]:
    # Node 0 hosts the job's store.
    node = draw.randrange(1, machines.agents)
    return {"ranks": machines.of_node(node), "node": node}


def _node_and_second(draw: random.Random, machines: Machines) -> dict[str, object]:
    first = _node(draw, machines)
    # Those of the node that takes its place, too.
    told = {**first, "event": draw.choice(LATE), "second": (draw.randrange(machines.world_size),)}
    return {**told, "second_seconds": draw.uniform(0, BEHIND_EVENT_SECONDS)}


def _second_is_node(draw: random.Random, machines: Machines) -> dict[str, object]:
    node, event = draw.randrange(1, machines.agents), draw.choice(EARLY + LATE)
    ranks = machines.of_node(node)
    # Somebody of the node has to be there for its agent to be found.
    others = [r for r in range(machines.world_size) if r not in ranks or len(ranks) > 1]
    told = {"ranks": (draw.choice(others),), "event": event}
    then = {"second": ranks, "second_node": node}
    return {**told, **then, "second_seconds": draw.uniform(0, BEHIND_EVENT_SECONDS)}


@dataclass(frozen=True)
class Kind:
    """A kind of failure.

    Attributes:
        draw: what is particular to it.
        weight: how often it comes, among the others.
        min_agents: that it needs.
        number: of the signal; `leaving_pretrain.py` says what SIGUSR1 and SIGUSR2 do.
        between: see `BETWEEN`.
    """

    draw: Draw
    weight: int
    min_agents: int = 1
    number: signal.Signals = signal.SIGKILL
    between: tuple[int, int] = BETWEEN


KINDS = {
    "one worker": Kind(_one, 6),
    "several workers": Kind(_several, 3),
    "a stage": Kind(_stage, 2),
    "all workers": Kind(lambda _, machines: {"ranks": tuple(range(machines.world_size))}, 1),
    "a second one in a recovery": Kind(_second, 5),
    "a node": Kind(_node, 3, min_agents=2),
    "a node, then a worker": Kind(_node_and_second, 3, min_agents=2),
    "a worker, then a node": Kind(_second_is_node, 3, min_agents=2),
    "a stopped worker": Kind(_one, 2, number=signal.SIGSTOP, between=BEFORE_A_STOP),
    "a stopped node": Kind(_node, 2, min_agents=2, number=signal.SIGSTOP),
    "an exit with code 0": Kind(_one, 1, number=signal.SIGUSR1),
    "an exception": Kind(_one, 1, number=signal.SIGUSR2),
}
"""To have another kind injected, add it here; `inject.py` says what can be done to a job."""


def kinds_for(machines: Machines) -> dict[str, Kind]:
    """The kinds that a run can be given."""
    return {name: kind for name, kind in KINDS.items() if machines.agents >= kind.min_agents}


def failures(seed: int, cut: str, machines: Machines) -> Iterator[Failure]:
    """The failures of a soak in their order, without end."""
    draw, kinds = random.Random(f"{seed} {cut} {machines}"), kinds_for(machines)
    while True:
        names, weights = list(kinds), [kind.weight for kind in kinds.values()]
        (name,) = draw.choices(names, weights)
        particular = {"node": None, **kinds[name].draw(draw, machines)}
        when = {"after": draw.randint(*kinds[name].between), "delay": draw.uniform(0, SPREAD)}
        yield Failure(kind=name, **when, **particular)  # type: ignore[arg-type]
