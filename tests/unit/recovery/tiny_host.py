"""A training program small enough to read: some operators, an update that mixes all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from megatron_moetion.host import State
from megatron_moetion.inbox.key import FrameKey, HeaderKey
from megatron_moetion.inbox.log import InboxLog
from megatron_moetion.operators import GradientAccess, Kind, Operator, ParamState, StateAccess
from megatron_moetion.schedule import FramePlan, Schedule
from megatron_moetion.snapshot.frame import copy_in, layout, sources, to_meta
from megatron_moetion.vault import Vault


class TinyHost:
    """`megatron_moetion.host.Host` on one rank.

    One step: every operator's gradient depends on the compute weights of all, on the random state
    and on a buffer; momentum and a step counter are kept like an optimizer does.
    """

    device = torch.device("cpu")

    def __init__(self, shards: Sequence[Sequence[int]], gradients: bool = False) -> None:
        """Args:
        shards: for every operator the elements of its parameters on this rank.
        gradients: frames hold gradients.
        """
        self._gradients = gradients
        torch.manual_seed(1)
        self.operators: Sequence[Operator] = [
            self._operator(f"o{i}", numels) for i, numels in enumerate(shards)
        ]
        self.bias = torch.zeros(3)
        self.frozen: frozenset[str] = frozenset()
        self.calls: Counter[str] = Counter()
        self.in_replay = False

    def _operator(self, name: str, numels: Sequence[int]) -> Operator:
        made = Operator(name, Kind.EXPERT, numel=sum(numels))
        for index, numel in enumerate(numels):
            main = torch.randn(numel)
            param = torch.nn.Parameter(main.bfloat16())
            access = StateAccess({}, main)
            gradient = GradientAccess(main, "grad") if self._gradients else None
            made.params.append(
                ParamState(f"{name}.w{index}", param, param.detach(), main, access, gradient)
            )
        return made

    def step(self) -> None:
        """One iteration; frozen operators take part with their weights only."""
        activation = sum(p.light.float().sum() for o in self.operators for p in o.params)
        noise = torch.randn(())
        self.bias += activation
        for operator in self.operators:
            if operator.name not in self.frozen:
                for state in operator.params:
                    state.main.grad = (torch.tanh(activation) + noise).expand_as(state.main).clone()
        self.update(self.start_state())

    def update(self, state: State) -> None:
        self.calls["update"] += 1
        for operator in self.operators:
            for each in operator.params:
                if operator.name not in self.frozen and each.main.grad is not None:
                    self._update(each, each.main.grad)

    def _update(self, state: ParamState, gradient: torch.Tensor) -> None:
        kept = state.states.tensors()
        moment = kept.get("exp_avg", torch.zeros_like(state.main))
        count = kept.get("step", torch.zeros(()))
        moment = 0.9 * moment + gradient * (1 + state.main)
        state.states.put("exp_avg", moment)
        state.states.put("step", count + 1)
        state.main.sub_(0.01 * moment / (count + 1))
        self.publish_main([state])

    def forget_everything(self) -> None:
        """What a new process starts with, made as wrong as can be."""
        for operator in self.operators:
            for state in operator.params:
                state.main.fill_(float("nan"))
                state.light.fill_(float("nan"))
                state.states.clear()
        self.bias.fill_(float("nan"))
        torch.manual_seed(99)

    def everything(self) -> dict[str, torch.Tensor]:
        """Copies of all state, to compare."""
        found = {"bias": self.bias.clone(), "rng": torch.get_rng_state()}
        for operator in self.operators:
            for state in operator.params:
                parts = {"main": state.main, "light": state.light, **state.states.tensors()}
                found |= {f"{state.name}.{k}": t.clone() for k, t in parts.items()}
        return found

    def buffers(self) -> Mapping[str, torch.Tensor]:
        return {"bias": self.bias}

    def start_state(self) -> State:
        return {"rng": torch.get_rng_state()}

    def load_start_state(self, state: State) -> None:
        torch.set_rng_state(state["rng"])

    def load_loop_state(self, state: State) -> None: ...

    def live_state(self) -> State:
        return self.start_state()

    def load_live_state(self, state: State) -> None:
        self.load_start_state(state)

    def run_step(self, iteration: int) -> Any:
        self.step()

    def reset_after_abort(self) -> None: ...

    def begin_replay(self) -> None:
        self.in_replay = True

    def end_replay(self) -> None:
        self.in_replay, self.frozen = False, frozenset()

    def freeze(self, names: frozenset[str]) -> None:
        self.frozen = names

    def drop_frozen_gradients(self) -> None: ...

    def publish_main(self, states: Sequence[ParamState]) -> None:
        for state in states:
            state.light.copy_(state.main)

    def sync_params(self) -> None:
        self.calls["sync_params"] += 1


class Run:
    """Trains, captures frames and logs headers as a session does, without anything else."""

    def __init__(self, host: TinyHost, schedule: Schedule, vault: Vault) -> None:
        self.host, self.schedules, self.vault = host, [schedule], vault
        self.log = InboxLog(vault, vault.global_rank)
        self.capture(0, schedule.dense)

    def schedule_of(self, iteration: int) -> Schedule:
        """The newest schedule that had begun by then."""
        return [s for s in self.schedules if s.first <= max(iteration, 1)][-1]

    @property
    def frames_kept(self) -> int:
        """While a schedule takes over from another, the frames of both may be needed."""
        return sum(schedule.frames_kept for schedule in self.schedules)

    def capture(self, iteration: int, plan: FramePlan | None = None) -> None:
        plan = plan or self.schedule_of(iteration).frame(iteration)
        entries = list(sources(plan, {o.name: o for o in self.host.operators}, self.host.buffers()))
        pieces, nbytes = layout(entries)
        key = str(FrameKey(iteration))
        copy_in(entries, pieces, self.vault.reserve(key, nbytes))
        self.vault.seal(key, to_meta(iteration, plan, pieces))

    def train(self, first: int, last: int) -> None:
        for iteration in range(first, last + 1):
            self.vault.drop(iteration - self.frames_kept)
            self.log.write_state(HeaderKey(iteration), self.host.start_state())
            self.host.step()
            self.capture(iteration)
