"""A rebuilt moment as an ordinary Megatron checkpoint, written by Megatron itself."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NoReturn

import torch
from megatron.training import ft_integration, training
from megatron.training.global_vars import get_args
from megatron.training.utils import print_rank_0

from .host import MegatronHost


def export(host_view: MegatronHost, iteration: int, state: Any, directory: Path) -> NoReturn:
    """Saves the state right before `iteration` as Megatron would have, then ends this process.

    Every rank has been rebuilt and its groups are real.

    Args:
        state: of the iteration's start, as logged.
        directory: what `--save` would have been.
    """
    args = get_args()
    host_view.load_start_state(state)
    args.save, args.async_save, args.non_persistent_save_interval = str(directory), False, None
    operations = state["loop"]["flops"] or 0
    training.save_checkpoint_and_time(
        iteration - 1,
        host_view.model,
        host_view.optimizer,
        host_view.scheduler,
        operations,
        {},
        train_data_iterator=host_view.data_iterators[0],
    )
    torch.distributed.barrier()
    print_rank_0(f"moetion: iteration {iteration - 1} exported to {directory}")
    ft_integration.shutdown()
    sys.exit(0)
