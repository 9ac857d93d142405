"""The session of this process, and the handlers that lead from Megatron's functions into it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.training import training
from megatron.training.global_vars import get_args
from torch._C._distributed_c10d import OpType  # type: ignore[attr-defined]  # not in its stubs

from megatron_moetion import topology
from megatron_moetion.agent import leaving
from megatron_moetion.agent.spare import LEFT_ALONE
from megatron_moetion.config import Config
from megatron_moetion.cuts import CUTS, CutName
from megatron_moetion.deciding import decide_cut
from megatron_moetion.inbox.key import BatchKey, Direction, HeaderKey
from megatron_moetion.inbox.tap import Mode
from megatron_moetion.job import Job
from megatron_moetion.operators import table
from megatron_moetion.recovery.failure import (
    Interrupted,
    Rejected,
    Superseded,
    is_communication_error,
)
from megatron_moetion.recovery.plan import (
    NothingToRebuildFrom,
    Position,
    entered,
    has_result,
)
from megatron_moetion.session import Session
from megatron_moetion.snapshot.copier import register_pinned, unregister_pinned
from megatron_moetion.steering import Options, Steering
from megatron_moetion.vault.budget import MemoryDoesNotFit, mib

from ..activation import refuse
from .export import export
from .host import Call, MegatronHost
from .identity import identity
from .support import why_not_by_stage

JOB: Job | None = None
SESSION: Session | None = None
DIGEST_INTERVAL = 0
DIGEST_DIRECTORY = Path("moetion")
_TRANSFERS = (OpType.SEND.value, OpType.RECV.value, OpType.RECVANYSOURCE.value)
"""Kinds of work that can be waited for only once."""


def job() -> Job:
    """The job that `activate` opened."""
    assert JOB is not None
    return JOB


def init_process_group(host: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Notes how the world is made; a replacement starts alone, on torch's fake group."""
    this = job()
    if this.groups.rebuilding:
        return host(*args, **kwargs)
    this.backend = kwargs.get("backend") or args[0]
    this.group_timeout = kwargs.get("timeout") or this.group_timeout
    if this.fake:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        args, kwargs = (), {**kwargs, "backend": "fake", "store": FakeStore()}
    return this.groups.make(lambda: host(*args, **kwargs))


def new_group(host: Callable[..., Any], ranks: Any = None, **kwargs: Any) -> Any:
    """Records every group in creation order."""
    this = job()
    if this.groups.rebuilding:
        return host(ranks, **kwargs)
    fake = (
        {"backend": None, "pg_options": None, "use_local_synchronization": False}
        if this.fake
        else {}
    )
    group = this.groups.make(lambda: host(ranks, **{**kwargs, **fake}))
    this.groups.record(group, None if ranks is None else list(ranks), kwargs)
    return group


def collective(name: str) -> Callable[..., Any]:
    """The handler of one torch.distributed function."""

    def handler(host: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if SESSION is None:
            return host(*args, **kwargs)
        if name == "barrier":
            SESSION.interludes.count("save")
        return SESSION.collectives.call(name, host, *args, **kwargs)

    return handler


def work_wait(host: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """Work.wait: waits for peers over gloo can be called off; NCCL's end when they are aborted."""
    this = job()
    if SESSION is None or this.link is None or this.backend != "gloo":
        return host(self, *args, **kwargs)
    if self._get_op_type() in _TRANSFERS:
        return this.groups.waits.run(lambda: host(self, *args, **kwargs))
    if not self.is_completed():
        this.groups.waits.run(lambda: host(self, *args, **kwargs))
    # Makes this thread's stream wait, too.
    return host(self, *args, **kwargs)


class _Arrived:
    """A finished receive, where the host expects a handle to wait for."""

    def wait(self) -> None:
        return None


def communicate(host: Callable[..., Any], self: Any, **kwargs: Any) -> Any:
    """P2PCommunicator._communicate: everything that crosses a stage edge."""
    if SESSION is None or SESSION.cursor.mode is Mode.OFF:
        return host(self, **kwargs)
    boundaries = SESSION.boundaries
    boundaries.sent(Direction.FORWARD, kwargs["tensor_send_next"])
    boundaries.sent(Direction.BACKWARD, kwargs["tensor_send_prev"])
    if SESSION.cursor.mode is Mode.REPLAY:
        received = [
            boundaries.receive(direction).to(SESSION.host.device).requires_grad_(True)
            if wanted
            else None
            for direction, wanted in (
                (Direction.FORWARD, kwargs["recv_prev"]),
                (Direction.BACKWARD, kwargs["recv_next"]),
            )
        ]
        # The host asks for a handle of just those transfers that it ordered.
        ordered = {
            "send_next": kwargs["tensor_send_next"] is not None,
            "recv_prev": kwargs["recv_prev"],
            "send_prev": kwargs["tensor_send_prev"] is not None,
            "recv_next": kwargs["recv_next"],
        }
        handles = {name: _Arrived() for name, wanted in ordered.items() if wanted}
        return received[0], received[1], None if kwargs.get("wait_on_reqs", True) else handles
    return host(self, **kwargs)


def next_batch(host: Callable[..., Any], self: Any) -> Any:
    """RerunDataIterator.__next__."""
    if SESSION is None or self.replaying:
        return host(self)
    if SESSION.interludes.inside:
        return SESSION.interludes.draw(self, lambda: host(self))
    if SESSION.cursor.mode is Mode.LIVE:
        SESSION.reached("batch", SESSION.cursor.take("batch"))
    assert isinstance(SESSION.host, MegatronHost)
    for chunk, iterator in enumerate(SESSION.host.data_iterators):
        if iterator is self:
            return SESSION.batches.draw(chunk, lambda: host(self))
    return host(self)


def counted(place: str) -> Callable[..., Any]:
    """The handler of forward_step and backward_step: only a place to be seen at, and for faults."""

    def handler(host: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if SESSION is not None:
            live = SESSION.cursor.mode is Mode.LIVE
            SESSION.reached(place, SESSION.cursor.take(place) if live else None)
            if not live and place == "forward":
                SESSION.interludes.count("evaluate")
        return host(*args, **kwargs)

    return handler


def passed(place: str) -> Callable[..., Any]:
    """The handler of a function that is only a place to be seen at, and for faults."""

    def handler(host: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if SESSION is not None:
            SESSION.reached(place)
        return host(*args, **kwargs)

    return handler


def param_gather(host: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """_ParamAndGradBucketGroup.start_param_sync: also where the gathers of several buckets are one
    call, which fails only here.
    """
    if SESSION is None:
        return host(*args, **kwargs)
    SESSION.reached("param-gather")
    return SESSION.update(lambda: host(*args, **kwargs))


def routing(host: Callable[..., Any], self: Any, logits: torch.Tensor, **kwargs: Any) -> Any:
    """TopKRouter.routing: how many tokens go to each expert."""
    probs, routed = host(self, logits, **kwargs)
    if SESSION is not None and SESSION.cursor.mode is Mode.LIVE:
        assert isinstance(SESSION.host, MegatronHost)
        SESSION.host.note_load(self, logits, routed)
    return probs, routed


def validate_result(
    host: Callable[..., Any],
    self: Any,
    result: Any,
    rejection_func: Callable[[Any], Any],
    message: str,
    comparison_func: Any = None,
    tolerance: float = 0.0,
    fatal: bool = True,
) -> Any:
    """RerunStateMachine.validate_result: right behind a rebuild, what the host would abort for (or,
    in another mode, run again to tell a broken device) says something of what was rebuilt.
    """
    if SESSION is not None and SESSION.in_doubt and fatal and rejection_func(result):
        raise Rejected(f"{message} ({result}), right behind a rebuild from memory")
    return host(self, result, rejection_func, message, comparison_func, tolerance, fatal)


def optimizer_step(host: Callable[..., Any], self: Any) -> Any:
    """The step of the outermost optimizer."""
    if SESSION is None or self is not getattr(SESSION.host, "optimizer", None):
        return host(self)
    return SESSION.updating.step(lambda: host(self))


def step_with_ready_grads(host: Callable[..., Any], self: Any) -> Any:
    """Gradients are final: the commit point, once for the outermost optimizer."""
    if SESSION is None:
        return host(self)
    if self is getattr(SESSION.host, "optimizer", None):
        SESSION.updating.commit()
    chained = getattr(getattr(SESSION.host, "optimizer", None), "chained_optimizers", [self])
    if self is chained[-1]:
        SESSION.reached("optimizer")
    return host(self)


def setup_model_and_optimizer(host: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """After set-up, a replacement learns where the job is and takes over its counters, like from a
    checkpoint.
    """
    built = host(*args, **kwargs)
    this = job()
    if not this.replacement:
        return built
    this.send("ready", epoch=0)
    epoch = 0
    while this.facts is None:
        epoch = this.notices.failure(
            Interrupted("the job never asked this replacement to join"), epoch
        )
        try:
            this.receive_facts(epoch)
        except Superseded:
            continue
    try:
        position = _entered(this)
    except NothingToRebuildFrom as error:
        _hopeless(this, str(error))
        raise
    state = _own_state(this, position.iteration)
    options = get_args()
    for name, value in state["counters"].items():
        setattr(options, name, value)
    options.iteration = position.iteration - 1
    options.num_floating_point_operations_so_far = state["loop"]["flops"] or 0
    return built


def _entered(this: Job) -> Position:
    assert this.facts is not None
    return entered(this.facts, this.global_rank, this.config.cut == "shard")


def build_data_iterators(host: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Where the batches that a predecessor drew went with its node, they are drawn again: the
    training data begins with the oldest iteration that may be replayed.
    """
    this, options = job(), get_args()
    first = _first_drawn(this)
    if first is None:
        return host(*args, **kwargs)
    before = options.iteration, options.consumed_train_samples
    consumed = _own_state(this, first)["counters"]["consumed_train_samples"]
    # Without any samples the host would count them by iterations.
    options.consumed_train_samples, options.iteration = consumed, before[0] if consumed else 0
    try:
        return host(*args, **kwargs)
    finally:
        options.iteration, options.consumed_train_samples = before


def _first_drawn(this: Job) -> int | None:
    """The first iteration whose batches are drawn by a replacement that has no predecessor's log
    of them.
    """
    if this.facts is None or this.config.cut == "shard" or this.global_rank not in this.facts.lost:
        return None
    return min(this.facts.starts[this.global_rank])


def _hopeless(this: Job, reason: str) -> None:
    assert this.facts is not None
    this.hopeless(reason, this.facts.epoch)


def _own_state(this: Job, iteration: int) -> Any:
    from megatron_moetion.snapshot import bundle

    entry = this.vault.fetch(this.global_rank, str(HeaderKey(iteration)))
    if entry is None:
        _hopeless(this, f"the log of global rank {this.global_rank} lacks {HeaderKey(iteration)}")
        raise RuntimeError(f"{HeaderKey(iteration)} is gone")
    return bundle.unpack(dict(entry.meta), entry.data, "cpu")


def train_step(host: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """One iteration; the first call opens the session."""
    iteration = kwargs["iteration"] + 1
    first = SESSION is None
    state = _own_state(job(), iteration) if first and job().replacement else None
    if first:
        _open_session(args, iteration, state)
    assert SESSION is not None
    assert isinstance(SESSION.host, MegatronHost)
    host_view = SESSION.host
    host_view.note_timers()
    host_view.call = Call(host, args, kwargs)
    if state is None:
        if first:
            SESSION.protect(iteration - 1)
        return SESSION.train_step(iteration, lambda: host(*args, **kwargs))
    host_view.load_loop_state(state)
    facts, first_drawn = job().facts, _first_drawn(job())
    assert facts is not None
    if first_drawn is not None:
        SESSION.batches.begin_anew(first_drawn, get_num_microbatches())
    elif has_result(_entered(job()), facts.committed, job().config.cut == "shard"):
        _skip_batches(host_view, iteration)
    joined = SESSION.join(iteration)
    job().fake = False
    directory = job().config.export
    if directory is not None:
        export(host_view, iteration, state, directory)
    if joined is not None:
        host_view.set_hooked(False)
        return joined[0]
    # The host's loop gathers parameters by hooks only after its first iteration; its peers are past
    # theirs.
    host_view.set_hooked(state["hooked"])
    if state["hooked"]:
        host_view.use_param_sync_func()
    result = SESSION.train_step(iteration, lambda: host(*args, **kwargs))
    host_view.set_hooked(False)
    return result


def _skip_batches(host_view: MegatronHost, iteration: int) -> None:
    """The committed iteration is replayed from the log: the data iterator moves past it."""
    this = job()
    for chunk, iterator in enumerate(host_view.data_iterators):
        microbatch = 0
        while iterator and this.vault.fetch(
            this.global_rank, str(BatchKey(iteration, chunk, microbatch))
        ):
            next(iterator.iterable)
            microbatch += 1


def _open_session(args: tuple[Any, ...], iteration: int, state: Any) -> None:
    """Makes the session of this process.

    Args:
        args: of the host's training step.
        iteration: the first one here.
        state: what a predecessor logged at its start, if this is a replacement.
    """
    global SESSION
    this = job()
    _, data_iterator, model, optimizer, scheduler, config, *_ = args
    iterators = data_iterator if isinstance(data_iterator, list) else [data_iterator]

    def host_for(cut: str) -> MegatronHost:
        program = (model, optimizer, scheduler, iterators, config)
        return MegatronHost(*program, gradients=cut == "shard")

    if this.config.cut == "auto":
        _take_cut(this, host_for)
    host_view = host_for(this.config.cut)
    pipelines = this.groups.described("PIPELINE_MODEL_PARALLEL_GROUP")
    where = topology.from_pipeline_groups(this.global_rank, pipelines, wraps=len(model) > 1)
    buffer_bytes = sum(tensor.nbytes for tensor in host_view.buffers().values())
    steering = Steering(
        host_view.operators, buffer_bytes, Options.of(this.config), host_view.routing(),
        this.num_copies > 0, host_view.device,
    )  # fmt: skip
    if state is not None:
        steering.load_state(state["steering"])
        if this.anew and not this.claimed:
            steering.start_at(iteration)
    SESSION = Session(this, where, host_view, steering)
    if this.global_rank in (0, where.stage(where.num_stages - 1)[0]) and not this.claimed:
        owner = f"stage {where.pp_rank}, global rank {this.global_rank}"
        print(f"moetion: {owner} owns\n{table(host_view.operators)}")
        if device_bytes := SESSION.device_bytes():
            print(f"moetion: {owner} takes {mib(device_bytes)} of device memory for copies at most")
    if not this.claimed:
        try:
            SESSION.claim_memory()
        except MemoryDoesNotFit as error:
            refuse(str(error))
    SESSION.updating.tell_schedule()
    if state is not None and not this.claimed:
        # Whoever takes this worker's place must not begin with what was spilled.
        assert this.facts is not None
        SESSION.log_again(iteration, state, this.facts.epoch)


def _take_cut(this: Job, host_for: Callable[[str], MegatronHost]) -> None:
    """Settles what the user left open, in a job that begins."""
    ruled_out: dict[CutName, str] = {}
    by_stage = why_not_by_stage(get_args())
    if by_stage is not None:
        ruled_out["stage"] = by_stage
    if this.config.window_policy == "tumbling":
        ruled_out["shard"] = "tumbling windows leave gradients out"
    if len(ruled_out) == len(CUTS):
        refuse(f"--moetion-cut auto: {'; '.join(f'{c}: {why}' for c, why in ruled_out.items())}")
    choice = decide_cut(
        this.config, {cut: host_for(cut) for cut in CUTS}, ruled_out,
        this.num_copies, this.replication_rate(), this.spills,
    )  # fmt: skip
    this.take_cut(choice.cut)
    this.events.emit("cut", cut=choice.cut, reason=choice.reason)
    if this.global_rank == 0:
        print(f"moetion: cut {choice.cut}: {choice.reason}", flush=True)


def training_log(host: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Running sums are logged with each iteration; a replacement starts from them and repeats no
    line.
    """
    if SESSION is None:
        return host(*args, **kwargs)
    assert isinstance(SESSION.host, MegatronHost)
    SESSION.reached("log")
    loop, call = SESSION.host.loop, list(args)
    losses, iteration = call[1], call[3]
    if loop["losses"] is not losses:
        losses.update(loop["losses"])
        call[5], kwargs["is_first_iteration"] = loop["report_memory"], not loop["logged"]
    with _muted(SESSION.position.logged >= iteration):
        report_memory = host(*call, **kwargs)
    loop.update(losses=losses, report_memory=report_memory, logged=True)
    SESSION.logged(iteration)
    return report_memory


@contextmanager
def _muted(wanted: bool) -> Iterator[None]:
    names = (
        "get_tensorboard_writer",
        "get_wandb_writer",
        "print_rank_last",
        "report_memory",
        "report_theoretical_memory",
    )
    before = {name: getattr(training, name) for name in names}
    for name in names if wanted else ():
        setattr(training, name, lambda *args, **kwargs: None)
    try:
        yield
    finally:
        for name in names if wanted else ():
            setattr(training, name, before[name])


def checkpoint_and_decide_exit(host: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Notes the operation count, which only the loop knows."""
    if SESSION is not None and isinstance(SESSION.host, MegatronHost):
        SESSION.host.loop["flops"] = args[4]
    return host(*args, **kwargs)


def finished(host: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`pretrain`: what comes after it is the user's own business."""
    result = host(*args, **kwargs)
    if SESSION is not None:
        job().events.emit("memory", **asdict(job().vault.usage()))
    if not job().groups.waits.all_ended():
        os.environ[LEFT_ALONE] = "1"
    job().send("finished")
    return result


def open_job(config: Config, args: Any) -> None:
    """Called by `activate`."""
    from megatron_moetion import job as jobs

    global JOB
    if os.environ.get("MOETION_AGENT"):
        sys.excepthook = _end_now
    pinned = torch.cuda.is_available() and torch.version.cuda and not _rehearsing()
    on_map, on_unmap = (register_pinned, unregister_pinned) if pinned else (None, None)
    device = torch.device("cuda", torch.cuda.current_device()) if pinned else torch.device("cpu")
    known = (on_map, on_unmap, identity(args), device)
    JOB = jobs.open_job(config, args.rank, args.world_size, *known)


def _end_now(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    # The interpreter's own shutdown waits for process groups whose peers wait for this process to
    # end.
    # Not sys.stderr: torch puts a buffer there while it asks older hooks, and prints it afterwards.
    rank = os.environ.get("RANK", "?")
    lines = leaving.traceback_of(error)
    os.write(2, "".join(f"[rank{rank}]: {line}\n" for line in lines).encode())
    if JOB is not None and JOB.link is not None:
        echo, rejected = is_communication_error(error), isinstance(error, Rejected)
        leaving.tell(JOB.link, error, echo, rejected)
    sys.stdout.flush()
    os._exit(1)


def _rehearsing() -> bool:
    from megatron_moetion import rehearsal

    return rehearsal.wanted()


def digest_step(host: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Records hashes after every N-th iteration; all that an unprotected run gets."""
    from megatron_moetion import digest

    from .operators_host import canonical_buffers, find_operators

    result = host(*args, **kwargs)
    iteration, options = kwargs["iteration"] + 1, get_args()
    if iteration % DIGEST_INTERVAL == 0:
        _, _, model, optimizer, *_ = args
        hashes = digest.state_hashes(find_operators(model, optimizer), canonical_buffers(model))
        digest.record(DIGEST_DIRECTORY, options.rank, iteration, result[0], hashes)
    return result
