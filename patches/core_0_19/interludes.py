"""Handlers of what the host does between training steps and can do again as a whole."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron.training import checkpointing
from megatron.training import training as host_training
from megatron.training.global_vars import get_args

from megatron_moetion.interlude import Interlude
from megatron_moetion.unfinished import Unfinished

from . import training as t


def evaluation(host: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """evaluate_and_print_results."""
    if t.SESSION is None:
        return host(*args, **kwargs)
    iterators = args[2] if isinstance(args[2], list) else [args[2]]

    def run(say: Callable[[str], None]) -> None:
        with _last_rank_says(say):
            host(*args, **kwargs)

    say = host_training.print_rank_last
    return t.SESSION.interludes.run(Interlude("evaluate", run, say, iterators, _skip))


def _skip(iterator: Any) -> None:
    # Past the host's own wrapper, which keeps what it gives.
    next(iterator.iterable)


@contextmanager
def _last_rank_says(say: Callable[[str], None]) -> Iterator[None]:
    before = host_training.print_rank_last
    host_training.print_rank_last = say
    try:
        yield
    finally:
        host_training.print_rank_last = before


def saving(host: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """save_checkpoint_and_time."""
    if t.SESSION is None:
        return host(*args, **kwargs)
    session = t.SESSION

    def run(say: Callable[[str], None]) -> None:
        session.interludes.count("save")
        host(*args, **kwargs)

    files = _files(args[0], kwargs.get("non_persistent_ckpt", False))
    interlude = Interlude("save", run, note=files.note, again=files.again)
    return session.interludes.run(interlude)


def _files(iteration: int, non_persistent: bool) -> Unfinished:
    """Where that checkpoint is written, and the file that names the newest one."""
    args = get_args()
    folder = args.save
    if non_persistent:
        within = os.path.join(args.save, checkpointing._NON_PERSISTENT_CKPT_SUBDIR)
        folder = args.non_persistent_global_ckpt_dir or within
    name = checkpointing.get_checkpoint_name(folder, iteration, return_base_dir=True)
    tracker = checkpointing.get_checkpoint_tracker_filename(folder)
    return Unfinished(Path(name), Path(tracker), str(iteration))


def parameter_sync(host: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """disable_forward_pre_hook: parameters are gathered before an evaluation, if they are not yet.

    Under the log of what follows a training step it would not be found: it stays inside a stage.
    """
    if t.SESSION is None or not kwargs.get("param_sync", True):
        return host(*args, **kwargs)
    return t.SESSION.interludes.run(Interlude("sync", lambda say: host(*args, **kwargs)))
