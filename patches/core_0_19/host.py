"""Megatron 0.19 as `megatron_moetion.host.Host`: reads, writes and runs; decides nothing."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping, Sequence
from math import ceil, inf
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import (
    get_num_microbatches,
    update_num_microbatches,
)
from megatron.core.rerun_state_machine import RerunState, get_rerun_state_machine
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.moe.moe_logging import MetricEntry, get_moe_metrics_tracker
from megatron.training import training
from megatron.training.global_vars import get_args, get_timers

from megatron_moetion.host import Routing, State
from megatron_moetion.operators import Operator, ParamState

from .operators_host import canonical_buffers, expert_places, find_operators, inner_optimizers

_COUNTERS = (
    "iteration",
    "curr_iteration",
    "consumed_train_samples",
    "skipped_train_samples",
    "consumed_valid_samples",
    # What it was when training began; a checkpoint holds all arguments.
    "num_floating_point_operations_so_far",
    "do_train",
    "do_valid",
    "do_test",
)
_RERUN = (
    "current_iteration",
    "first_iteration_complete",
    "rerun_requested",
    "checkpoint_requested",
    "restart_again_requested",
    "continue_requested",
    "large_value_counts",
    "max_values",
)
_SMALL = 1 << 20
"""Bytes that random states, metrics and scalars of an iteration stay below."""
_PADDING = 1 << 10
"""Bytes lost between the tensors of a batch at most, as each begins at a multiple of 64."""
_NORM_GROUPS = "_has_grad_norm_group_cache"
_SCALARS = (bool, int, float, str, tuple, torch.Tensor, type(None))


class Call:
    """The host's `train_step` with the arguments of this run, to be run once more for any
    iteration.
    """

    def __init__(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        self.function, self.args, self.kwargs = function, args, dict(kwargs)

    def run(self, iteration: int) -> Any:
        """Runs iteration `iteration` (from 1; the host counts from 0 here)."""
        return self.function(*self.args, **{**self.kwargs, "iteration": iteration - 1})


class MegatronHost:
    """One rank's training program.

    Args:
        model: model chunks, wrapped in DDP.
        data_iterators: the training data iterator of each chunk; None where a rank reads no data.
        config: the transformer config that the schedules use.
        gradients: frames hold gradients, see `operators.ParamState.gradient`.
    """

    def __init__(
        self,
        model: Sequence[Any],
        optimizer: Any,
        scheduler: Any,
        data_iterators: Sequence[Any],
        config: Any,
        gradients: bool = False,
    ) -> None:
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.data_iterators, self._config = list(data_iterators), config
        self.operators: Sequence[Operator] = find_operators(model, optimizer, gradients)
        self.device = next(iter(model[0].parameters())).device
        self.call: Call | None = None
        self.loop: State = {"logged": False, "report_memory": True, "flops": None, "losses": {}}
        self._overlap: list[tuple[Any, bool, bool]] = []
        self._hooked = False
        self._running: frozenset[str] = frozenset()
        self._frozen: list[ParamState] = []
        self._sync_funcs: tuple[Any, Any] = (None, None)
        self._routers, self._places = expert_places(model)
        self._load: torch.Tensor | None = None

    def buffers(self) -> Mapping[str, torch.Tensor]:
        return canonical_buffers(self.model)

    def inbox(self) -> Mapping[str, tuple[int, int]]:
        args = get_args()
        tokens = args.seq_length * args.micro_batch_size
        passes = get_num_microbatches() * len(self.model)
        activation = tokens * args.hidden_size * self._config.pipeline_dtype.itemsize
        if args.sequence_parallel:
            activation //= args.tensor_model_parallel_size
        # Tokens, labels and positions of 8 bytes, a loss mask of 4, and perhaps a mask of pairs.
        batch = tokens * (3 * 8 + 4)
        if args.create_attention_mask_in_dataloader:
            batch += tokens * args.seq_length
        tied = not args.untie_embeddings_and_output_weights
        rows = args.padded_vocab_size // args.tensor_model_parallel_size
        return {
            "boundary": (2 * passes, activation),
            "batch": (passes, batch + _PADDING),
            "collective": (1, _SMALL + tied * rows * args.hidden_size * 4),
            "header": (1, _SMALL),
            "result": (1, _SMALL),
            "interlude": (1, _SMALL),
        }

    def iteration_flops(self) -> float:
        args = get_args()
        total: float = training.num_floating_point_operations(args, args.global_batch_size)
        return total / int(args.world_size)

    def start_state(self) -> State:
        args, rerun = get_args(), get_rerun_state_machine()
        return {
            "rng": _rng(),
            "scheduler": self.scheduler.num_steps,
            "groups": [
                _scalars(g)
                for o in inner_optimizers(self.optimizer)
                for g in o.optimizer.param_groups
            ],
            "scalers": [
                o.grad_scaler.state_dict() if getattr(o, "grad_scaler", None) else None
                for o in inner_optimizers(self.optimizer)
            ],
            # Filled by a collective of the whole world in the first step, never asked again.
            "norm_groups": [dict(getattr(o, _NORM_GROUPS, None) or {}) for o in self._optimizers()],
            "rerun": {name: _plain(getattr(rerun, name)) for name in _RERUN},
            "counters": {name: getattr(args, name, None) for name in _COUNTERS},
            "metrics": {
                name: entry.values for name, entry in get_moe_metrics_tracker()._metrics.items()
            },
            "hooked": self.hooked,
            "loop": self.loop,
        }

    def load_start_state(self, state: State) -> None:
        args, rerun = get_args(), get_rerun_state_machine()
        self.scheduler.num_steps = state["scheduler"]
        groups = [g for o in inner_optimizers(self.optimizer) for g in o.optimizer.param_groups]
        for group, values in zip(groups, state["groups"], strict=True):
            group.update(values)
        for inner, scaler in zip(inner_optimizers(self.optimizer), state["scalers"], strict=True):
            if scaler is not None:
                inner.grad_scaler.load_state_dict(scaler)
        for each, cache in zip(self._optimizers(), state["norm_groups"], strict=True):
            setattr(each, _NORM_GROUPS, dict(cache))
        for name, value in state["rerun"].items():
            setattr(rerun, name, value)
        rerun.state = RerunState.NOT_RUNNING_YET
        for name, value in state["counters"].items():
            setattr(args, name, value)
        if state["counters"]["consumed_train_samples"] is not None:
            update_num_microbatches(
                state["counters"]["consumed_train_samples"], consistency_check=False
            )
        _load_metrics(state["metrics"])
        for iterator in self.data_iterators:
            if iterator is not None:
                iterator.advance()
        _load_rng(state["rng"])

    def _optimizers(self) -> list[Any]:
        return [self.optimizer, *inner_optimizers(self.optimizer)]

    def load_loop_state(self, state: State) -> None:
        self.loop = state["loop"]

    def live_state(self) -> State:
        timers = get_timers()._timers
        clocks = {
            n: (t._elapsed, t._active_time, t._started, t._start_time) for n, t in timers.items()
        }
        # The metrics are live tensors that a replay adds to.
        state = {k: v for k, v in self.start_state().items() if k != "loop"}
        return {**copy.deepcopy(state), "timers": clocks}

    def load_live_state(self, state: State) -> None:
        self.take_over(state)
        for name, timer in get_timers()._timers.items():
            clock = state["timers"].get(name)
            if clock is None:
                timer.reset()
            else:
                timer._elapsed, timer._active_time, timer._started, timer._start_time = clock

    def interlude_state(self) -> State:
        return {
            **self.live_state(),
            "modes": [module.training for module in self._modules()],
            "buffers": {name: tensor.clone() for name, tensor in self.buffers().items()},
            "rerun_mode": get_rerun_state_machine().get_mode(),
            "config_timers": self._config.timers,
        }

    def load_interlude_state(self, state: State) -> None:
        self.load_live_state(state)
        for module, mode in zip(self._modules(), state["modes"], strict=True):
            module.training = mode
        with torch.no_grad():
            for name, tensor in self.buffers().items():
                tensor.copy_(state["buffers"][name])
        get_rerun_state_machine().set_mode(state["rerun_mode"])
        self._config.timers = state["config_timers"]

    def take_over(self, state: State) -> None:
        self.load_start_state(state)
        self.set_hooked(state["hooked"])

    def _modules(self) -> list[torch.nn.Module]:
        return [module for chunk in self.model for module in chunk.modules()]

    def run_step(self, iteration: int) -> Any:
        assert self.call is not None
        self._stop_timers()
        return self.call.run(iteration)

    def note_timers(self) -> None:
        """Remembers which timers run outside the training step."""
        self._running = frozenset(n for n, t in get_timers()._timers.items() if t._started)

    def _stop_timers(self) -> None:
        for name, timer in get_timers()._timers.items():
            if timer._started and name not in self._running:
                timer._started = False

    def reset_after_abort(self) -> None:
        self._stop_timers()
        for chunk in self.model:
            for param in chunk.parameters():
                param.grad = None
        for group in self._bucket_groups():
            group.per_param_grad_ready_counts = {}
            group.is_last_microbatch = True
            group.grad_reduce_handle = None
            group.grad_reduce_finished = False
            group.param_gather_handle = None
            group.param_gather_dispatched = False

    def _bucket_groups(self) -> list[Any]:
        return [g for c in self.model for g in c.bucket_groups + c.expert_parallel_bucket_groups]

    @property
    def hooked(self) -> bool:
        """Whether parameters are gathered by forward hooks at present."""
        return len(self.model[0].remove_forward_pre_hook_handles) > 0

    def set_hooked(self, hooked: bool) -> None:
        """Gathers parameters by forward hooks, or not; communicates nothing."""
        for chunk in self.model:
            # Of several chunks some may have been switched when a peer was lost.
            if hooked == (len(chunk.remove_forward_pre_hook_handles) > 0):
                continue
            chunk.enable_forward_pre_hook() if hooked else chunk.disable_forward_pre_hook(
                param_sync=False
            )

    def use_param_sync_func(self) -> None:
        """What the host's loop does after its first iteration; a replacement enters later."""
        args = get_args()
        if args.overlap_param_gather and args.align_param_gather:
            functions = [chunk.start_param_sync for chunk in self.model]
            self._config.param_sync_func = functions[0] if len(functions) == 1 else functions

    def routing(self) -> Routing | None:
        if not self._places:
            return None
        args = get_args()
        group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
        capacity = inf
        if args.moe_expert_capacity_factor is not None:
            tokens = args.seq_length * args.micro_batch_size * args.moe_router_topk
            each = ceil(args.moe_expert_capacity_factor * tokens / args.num_experts)
            capacity = each * get_num_microbatches() * group.size()
        return Routing(self._places, (len(self._routers), args.num_experts), group, capacity)

    def count_loads(self) -> None:
        shape = (len(self._routers), get_args().num_experts)
        self._load = torch.zeros(shape, dtype=torch.float32, device=self.device)

    def take_load(self) -> torch.Tensor | None:
        load, self._load = self._load, None
        return load

    def note_load(self, router: Any, logits: torch.Tensor, routed: torch.Tensor) -> None:
        """Counts what one pass through a router sends to each expert; waits for nothing.

        Args:
            logits: shape [..., num_experts].
            routed: bool, shape [tokens, num_experts]; with a capacity what is dropped is missing
                here, so it is counted from the logits.
        """
        if self._load is None or id(router) not in self._routers:
            return
        soft = get_args().moetion_popularity == "soft-count"
        with torch.no_grad():
            if soft or router.config.moe_expert_capacity_factor is not None:
                scores = logits.detach().float().flatten(0, -2)
                sigmoid = router.score_function == "sigmoid"
                gates = scores.sigmoid() if sigmoid else scores.softmax(-1)
                if not soft:
                    biased = gates if router.expert_bias is None else gates + router.expert_bias
                    chosen = biased.topk(router.topk, dim=-1).indices
                    gates = torch.zeros_like(gates).scatter_(-1, chosen, 1.0)
            else:
                gates = routed
            self._load[self._routers[id(router)]] += gates.sum(0)

    def begin_replay(self) -> None:
        self.reset_after_abort()
        if self._overlap:
            return
        self._hooked = self.hooked
        self.set_hooked(False)
        configs = {
            id(c): c
            for c in [
                *(m.ddp_config for m in self.model),
                *(g.ddp_config for g in self._bucket_groups()),
            ]
        }
        self._overlap = [
            (c, c.overlap_grad_reduce, c.overlap_param_gather) for c in configs.values()
        ]
        for config, *_ in self._overlap:
            config.overlap_grad_reduce = config.overlap_param_gather = False
        self._sync_funcs = (self._config.grad_sync_func, self._config.param_sync_func)
        self._config.grad_sync_func = self._config.param_sync_func = None

    def end_replay(self) -> None:
        self.freeze(frozenset())
        for config, grad_reduce, param_gather in self._overlap:
            config.overlap_grad_reduce, config.overlap_param_gather = grad_reduce, param_gather
        self._overlap = []
        self._config.grad_sync_func, self._config.param_sync_func = self._sync_funcs
        self.set_hooked(self._hooked)
        for group in self._bucket_groups():
            # A replacement does not know in which order gradients become ready: all learn it anew.
            group.is_first_batch = True
            group.golden_per_param_grad_ready_counts = {}
            group.per_param_grad_ready_counts = {}
            group.param_gather_dispatched = False

    def freeze(self, names: frozenset[str]) -> None:
        self._frozen = []
        for operator in self.operators:
            for state in operator.params:
                state.param.requires_grad_(operator.name not in names)
            if operator.name in names:
                self._frozen.extend(operator.params)

    def drop_frozen_gradients(self) -> None:
        for state in self._frozen:
            state.main.grad = None

    def update(self, state: State) -> None:
        inner = [o.optimizer for o in inner_optimizers(self.optimizer)]
        groups = [group for optimizer in inner for group in optimizer.param_groups]
        for group, values in zip(groups, state["groups"], strict=True):
            group.update(values)
        for optimizer in inner:
            optimizer.step()

    def publish_main(self, states: Sequence[ParamState]) -> None:
        with torch.no_grad():
            for state in states:
                if state.light.data_ptr() != state.main.data_ptr():
                    state.light.copy_(state.main.detach().view(-1))

    def sync_params(self) -> None:
        if not self.model[0].ddp_config.use_distributed_optimizer:
            return
        with torch.no_grad():
            for group in self._bucket_groups():
                group.start_param_sync(force_sync=True)
                group._post_param_sync()


def _scalars(group: Mapping[str, Any]) -> State:
    return {k: v for k, v in group.items() if k != "params" and isinstance(v, _SCALARS)}


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, dict) else value


def _rng() -> State:
    numpy_state = np.random.get_state(legacy=True)
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "tracker": dict(get_cuda_rng_tracker().get_states()),
        "numpy": tuple(numpy_state),
        "python": (version, np.array(internal, dtype=np.uint64), gauss),
    }


def _load_rng(state: State) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(int(x) for x in internal), gauss))
    np.random.set_state(state["numpy"])
    get_cuda_rng_tracker().set_states(state["tracker"])
    torch.cuda.set_rng_state(state["cuda"])
    torch.set_rng_state(state["torch"])


def _load_metrics(values: Mapping[str, torch.Tensor]) -> None:
    metrics = get_moe_metrics_tracker()._metrics
    for entry in metrics.values():
        entry.values.zero_()
    for name, value in values.items():
        if name not in metrics:
            metrics[name] = MetricEntry(values=torch.zeros_like(value))
        metrics[name].values.copy_(value)
