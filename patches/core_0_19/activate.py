"""Starts the product once every row is applied."""

import sys
from argparse import Namespace

from megatron_moetion import faults, rehearsal
from megatron_moetion.agent import hosted
from megatron_moetion.config import Config

from .. import activation


def activate(args: Namespace, config: Config) -> None:
    """Runs once per process with the host's final arguments, before any process group exists."""
    from . import training

    training.DIGEST_INTERVAL, training.DIGEST_DIRECTORY = config.digest_interval, config.dir
    if not config.moetion:
        return
    if not args.deterministic_mode and not rehearsal.wanted():
        activation.refuse(
            "a replay is bit-identical only with deterministic kernels; add --deterministic-mode "
            "and what it asks for"
        )
    parts = 0 if config.split == "auto" else config.split
    most = (args.num_layers or 0) * ((args.num_experts or 0) + 2) + 3 + parts
    if config.window_size > most:
        activation.refuse(
            f"--moetion-window {config.window_size} is larger than the {most} operators and parts "
            f"that this model can have; use at most {most}"
        )
    outside = [f for f in faults.parse(config.fault) if f.global_rank >= args.world_size]
    if outside:
        activation.refuse(
            f"--moetion-fault names global_rank {outside[0].global_rank}, but the job has ranks "
            f"0 to {args.world_size - 1}"
        )
    try:
        joined = hosted.join(sys.argv[1:])
    except hosted.NoAgent as error:
        activation.refuse(str(error))
    if config.spill_interval and not joined:
        activation.refuse(
            "--moetion-spill-interval needs an agent on each node: start the job with moetion-run, "
            "or drop the flag"
        )
    training.open_job(config, args)
    if config.replicas not in ("auto", 0) and training.job().link is None:
        activation.refuse(
            f"--moetion-replicas {config.replicas}: copies are made by agents; start the job with "
            "moetion-run"
        )
    if training.job().replacement:
        # State comes from the vault, not from a checkpoint.
        args.load = args.pretrained_checkpoint = None
