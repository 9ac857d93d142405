"""By what schedule all ranks capture: measured while training, agreed on at the edges of windows.

`Steering.decide` runs right before the commit point of the last iteration of a window. What ranks
tell each other there is logged like whatever crosses stages, so a replacement comes to the same
schedule. Everything that is decided follows from that and from what each rank knows anyway; the
rules themselves are in `window` and `popularity`.

Source: paper section 3.5; design section 5.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import batched, product
from typing import Any, Protocol

import torch
import torch.distributed as dist

from megatron_moetion.config import Config
from megatron_moetion.host import Routing
from megatron_moetion.operators import Kind, Operator
from megatron_moetion.popularity import MEASURES, Load, Measure, needs_reorder
from megatron_moetion.schedule import (
    Schedule,
    Timeline,
    Unit,
    WindowPolicy,
    alike,
    generate,
    order,
)
from megatron_moetion.window import FINENESS, ROW, Choice, Fit, Pace, Rates, choose, fit

AUTO_WINDOWS = range(1, 17)
"""What may be taken where the user leaves the window open."""


@dataclass(frozen=True)
class Options:
    """What the user left open.

    Attributes:
        policies: that may be taken; the first one to begin with.
        windows: that may be taken, ascending, and none but `window` when there is one only.
        window: to begin with.
        split: as `schedule.generate` takes it; None leaves it open, with whole operators to begin
            with.
        measure: of the popularity of experts; None keeps the order.
    """

    policies: tuple[WindowPolicy, ...]
    windows: range
    window: int
    split: int | None
    measure: Measure | None

    @classmethod
    def of(cls, config: Config) -> Options:
        """What the flags leave open."""
        fixed, policy = config.window, config.window_policy
        if config.cut == "shard":
            # It needs the gradients of each iteration.
            policy = WindowPolicy.ROLLING.value
        return cls(
            policies=tuple(WindowPolicy) if policy == "auto" else (WindowPolicy(policy),),
            windows=AUTO_WINDOWS if fixed == "auto" else range(fixed, fixed + 1),
            window=config.window_size,
            split=None if config.split == "auto" else config.split,
            measure=MEASURES.get(config.popularity),
        )

    @property
    def open(self) -> bool:
        """Whether the window may change while training."""
        return len(self.windows) * len(self.policies) > 1

    @property
    def ceilings(self) -> tuple[int, ...]:
        """The longest windows that memory may be asked for, where they may change at all."""
        steps = [w for w in self.windows if w & (w - 1) == 0 and w >= self.window]
        return tuple(steps or [self.window]) if self.open else ()

    def up_to(self, ceiling: int) -> list[int]:
        """The windows that host memory has room for."""
        return [window for window in self.windows if window <= ceiling]

    def schedules(self, units: Sequence[Unit], ceiling: int) -> list[Schedule]:
        """All that may be taken with windows up to `ceiling`, for pricing."""
        return [
            generate(units, window, policy, split, reorders=self.reorders)
            for policy, window in product(self.policies, self.up_to(ceiling))
            for split in ((0, FINENESS * window) if self.split is None else (self.split,))
        ]

    @property
    def reorders(self) -> bool:
        return self.measure is not None

    def first(self, units: Sequence[Unit]) -> Schedule:
        """What a job begins with."""
        policy = self.policies[0]
        return generate(units, self.window, policy, self.split or 0, reorders=self.reorders)


class Agreement(Protocol):
    """Collectives whose results are logged, so that they may be met again in replay."""

    def all_reduce(self, tensor: torch.Tensor, op: Any = ..., group: Any = None) -> None:
        """In place."""

    def gather(self, row: torch.Tensor) -> torch.Tensor:
        """The rows of all ranks of the job, shape [world_size, len(row)]."""


class Steering:
    """Measures, agrees, and keeps the timeline of schedules.

    Args:
        operators: of this rank.
        buffer_bytes: all model buffers, part of every frame.
        options: the same on all ranks.
        routing: None where this stage has no experts that could be put in another order.
        copies: frames are copied to other nodes.
        device: of the tensors that ranks exchange.
    """

    def __init__(
        self,
        operators: Sequence[Operator],
        buffer_bytes: int,
        options: Options,
        routing: Routing | None,
        copies: bool,
        device: torch.device,
    ) -> None:
        self.options, self.pace = options, Pace()
        self.units = order([Unit(o.name, o.kind, o.numel) for o in operators])
        self.timeline = Timeline([options.first(self.units)], copies)
        self.ceiling = 0
        self.buffer_bytes = buffer_bytes
        self._operators = {o.name: o for o in operators}
        self._routing, self._device = routing, device
        self._copies = copies
        self._experts = _alike([unit for unit in self.units if unit.kind is Kind.EXPERT])
        self._popularity: dict[str, float] = {}
        self._loads: dict[int, torch.Tensor] = {}
        self._chosen_at: Rates | None = None
        self._choice: Choice | None = None
        self._packed: tuple[object, torch.Tensor] | None = None
        self._undo: tuple[int, dict[str, float], Rates | None, Choice | None] | None = None

    @property
    def counts_loads(self) -> bool:
        """Whether what routers send where is of any use."""
        return self.options.reorders and self._routing is not None and len(self._experts) > 1

    def loaded(self, iteration: int, load: torch.Tensor | None) -> None:
        """What the routers of this rank sent to each expert in one iteration.

        Args:
            load: float32, shape `Routing.shape`, on the training device; belongs to the steering
                from now on.
        """
        if load is None:
            return
        self._loads[iteration] = load
        oldest = iteration - self.timeline.at(iteration).window
        self._loads = {i: held for i, held in self._loads.items() if i > oldest}

    def decide(self, iteration: int, agree: Agreement) -> str | None:
        """Changes the schedule from `iteration + 1` on, if it is time to; collective over the job.

        Decided again after an abort, the later decision counts.

        Returns:
            A line for the user when the window has changed, or does not keep up.
        """
        schedule = self.timeline.at(iteration)
        if not schedule.closes_at(iteration):
            return None
        self._begin_again(iteration)
        news = self._decide_window(iteration, agree) if self.options.open else None
        if self.counts_loads:
            self._decide_order(iteration, agree)
        return news

    def _begin_again(self, iteration: int) -> None:
        """Forgets what was decided in this iteration before: not every rank came that far."""
        if self._undo is None or self._undo[0] != iteration:
            self._undo = (iteration, self._popularity, self._chosen_at, self._choice)
        _, self._popularity, self._chosen_at, self._choice = self._undo
        self.timeline.keep(iteration)

    def _decide_window(self, iteration: int, agree: Agreement) -> str | None:
        rates = self.pace.rates()
        # One that cannot change says so by a ceiling of 0.
        wanted = rates is not None and (self._chosen_at is None or self._chosen_at.drifted(rates))
        # A second change would need frames of three kinds at the same time.
        changing = not self.timeline.steady
        asked = torch.tensor(
            [float(wanted), float(changing), -float(self.ceiling)], device=self._device
        )
        agree.all_reduce(asked, dist.ReduceOp.MAX)
        anybody_wants, anybody_changes, least = asked.tolist()
        self.ceiling = int(-least)
        if not anybody_wants or anybody_changes or not self.ceiling:
            return None
        self._chosen_at = rates
        fits = self._exchange(self._fits(rates), agree)
        if not fits:
            return None
        before, now = self._choice, choose(fits, self.options.split)
        self._choice = now
        units = order(self.units, self._popularity)
        made = generate(
            units, now.window, now.policy, now.split, iteration + 1, self.options.reorders
        )
        if not alike(made, self.timeline.at(iteration)):
            self.timeline.change(made)
        return now.news(before)

    def _fits(self, rates: Rates | None) -> list[Fit]:
        if rates is None:
            return []
        units = order(self.units, self._popularity)
        return [
            fit(
                units, self._operators, rates, policy, self.buffer_bytes,
                self.options.up_to(self.ceiling), self.options.split,
            )
            for policy in self.options.policies
        ]  # fmt: skip

    def _exchange(self, mine: Sequence[Fit], agree: Agreement) -> list[Fit]:
        """The fits of all ranks; one that has measured nothing yet has none."""
        numbers = [value for found in mine for value in found.to_row()]
        row = torch.zeros(ROW * len(self.options.policies), dtype=torch.float64)
        row[: len(numbers)] = torch.tensor(numbers, dtype=torch.float64)
        rows = agree.gather(row.to(self._device)).flatten().tolist()
        # A window of 0 stands for no fit.
        return [Fit.from_row(each) for each in batched(rows, ROW) if each[1]]

    def _decide_order(self, iteration: int, agree: Agreement) -> None:
        assert self.options.measure is not None
        assert self._routing is not None
        schedule = self.timeline.at(iteration)
        if schedule.window == 1:
            # One frame holds everything, in whatever order.
            return
        span = range(iteration - schedule.window + 1, iteration + 1)
        nothing = torch.zeros(self._routing.shape, device=self._device)
        loads = torch.stack([self._loads.get(i, nothing) for i in span])
        agree.all_reduce(loads, dist.ReduceOp.SUM, self._routing.group)
        loads = loads.cpu()
        if not loads.any():
            # Whoever counted them is lost with its node: the order stays.
            return
        popularity = self.options.measure(self._history(loads))
        if needs_reorder(self._popularity, popularity):
            self._popularity = popularity
        if self.timeline.newest.first > iteration or not self._popularity:
            return
        experts = sorted(self._experts, key=lambda name: (self._popularity[name], name))
        whole = {part.operator for parts in schedule.slots for part in parts if part.count == 1}
        made = schedule.reordered([n for n in experts if n in whole], iteration + 1)
        if made.slots != schedule.slots:
            self.timeline.change(made)

    def _history(self, loads: torch.Tensor) -> list[dict[str, Load]]:
        assert self._routing is not None
        places, capacity = self._routing.places, self._routing.capacity
        return [
            {n: Load(int(load[p]), float(load[p]), capacity) for n, p in places.items()}
            for load in loads
        ]

    def log_bytes(self, world_size: int) -> int:
        """What agreeing once logs at most."""
        rows = world_size * ROW * len(self.options.policies) * 8 * self.options.open
        shape = self._routing.shape if self._routing and self.counts_loads else (0, 0)
        return rows + 4 * self.options.windows[-1] * shape[0] * shape[1]

    def start_at(self, iteration: int) -> None:
        """A new job goes on from what an older one has spilled, which may have had other flags.

        Args:
            iteration: the first one of this job.
        """
        first = replace(self.options.first(self.units), first=iteration)
        if not alike(first, self.timeline.at(iteration)):
            self.timeline.change(first)

    def to_state(self) -> torch.Tensor:
        """What a replacement needs to decide like its peers; uint8, for the log."""
        # Every iteration is logged with it, and it seldom changes.
        version = (
            tuple(self.timeline.schedules), tuple(self._popularity.items()),
            self._chosen_at, self._choice,
        )  # fmt: skip
        if self._packed is None or self._packed[0] != version:
            fields = {
                "schedules": self.timeline.to_json(),
                "popularity": self._popularity,
                "chosen_at": self._chosen_at and asdict(self._chosen_at),
                "choice": self._choice and asdict(self._choice),
            }
            packed = zlib.compress(json.dumps(fields).encode())
            self._packed = (version, torch.frombuffer(bytearray(packed), dtype=torch.uint8))
        return self._packed[1]

    def load_state(self, state: torch.Tensor) -> None:
        """Takes over what a predecessor logged."""
        fields = json.loads(zlib.decompress(state.cpu().numpy().tobytes()))
        schedules = [Schedule.from_json(each) for each in fields["schedules"]]
        self.timeline = Timeline(schedules, self._copies)
        self._popularity = fields["popularity"]
        chosen_at, choice = fields["chosen_at"], fields["choice"]
        self._chosen_at = chosen_at and Rates(**chosen_at)
        self._choice = choice and Choice(**{**choice, "policy": WindowPolicy(choice["policy"])})


def _alike(experts: Sequence[Unit]) -> list[str]:
    """Names of experts that can stand in for each other in a frame: none when sizes differ."""
    return [unit.name for unit in experts] if len({unit.numel for unit in experts}) == 1 else []
