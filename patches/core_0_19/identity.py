"""Which of the host's arguments a run must share with the one whose spill it goes on from."""

from __future__ import annotations

import re
from argparse import Namespace
from importlib.metadata import version

FREE = re.compile(
    r"(_.*|rank|local_rank|moetion(?!_cut).*|load|save|(no_)?(load|save)_.*|non_persistent_.*|ckpt_.*"
    r"|pretrained_checkpoint|finetune|async_.*|dist_ckpt_.*|use_(persistent|dist)_ckpt.*|override_.*"
    r"|auto_detect_ckpt_format|verify_integrity|data_cache_path|num_workers|exit_.*|log_.*"
    r"|logging_level|.*log_interval|tensorboard_.*|wandb_.*|one_logger.*|enable_one_logger"
    r"|app_tag_.*|timing_.*|profile.*|.*profiler.*|record_.*|nvtx_ranges|memory_snapshot_path"
    r"|straggler_.*|flight_recorder_.*|inprocess_.*|distributed_timeout_.*|ft_.*|fault_injector_.*"
    r"|error_injection_.*|barrier_with_L1_time)"
)
"""What says where things are, what is printed and saved, and when a run ends; no bit depends on it.
The cut says what frames hold.
All others must be equal, known to matter or not.
"""
_PLAIN = (bool, int, float, str, type(None))


def identity(args: Namespace) -> dict[str, str]:
    """Arguments and versions by name, in a form that is the same in every process of a job."""
    values = {
        name: str(value)
        for name, value in vars(args).items()
        if not FREE.fullmatch(name) and _is_plain(value)
    }
    packages = {f"version of {name}": version(name) for name in ("torch", "megatron-core")}
    return {**values, **packages}


def _is_plain(value: object) -> bool:
    """Whether its text says all of it; an object's may hold an address."""
    if isinstance(value, (list, tuple)):
        return all(_is_plain(each) for each in value)
    return isinstance(value, _PLAIN) or type(value).__module__ == "torch"
