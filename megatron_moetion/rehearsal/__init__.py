"""Rehearsal: the real training loop on CPU with gloo.

The host asks CUDA for devices, streams, generators and memory figures. Here each of those
questions gets an answer from the CPU, in this process only, so that the loop, its collectives and
its pipeline schedule run as they are. Each module stands in for one family of calls:

=================  ==============================================================================
``devices``        how many devices there are, which is current, their properties and memory
``streams``        streams, events, profiler ranges: the CPU runs in program order
``rng``            the device's generator is the CPU's
``device_strings`` ``"cuda"`` as a device name, and tensor methods that move to a device
``collectives``    gloo where NCCL was asked for
``host_staging``   what gloo cannot read on a GPU, where ranks share one
``compilation``    eager execution where kernels would be compiled
=================  ==============================================================================

What is measured in a rehearsal is never called GPU performance.
"""

import os
from collections.abc import Callable, Sequence

from megatron_moetion.rehearsal import (
    collectives,
    compilation,
    device_strings,
    devices,
    host_staging,
    rng,
    streams,
)

PLATFORM_VARIABLE = "MOETION_PLATFORM"

CPU: tuple[Callable[[], None], ...] = (
    devices.install,
    streams.install,
    rng.install,
    device_strings.install,
    collectives.install,
    compilation.install,
)
"""Everything a process without a GPU needs."""

SHARED_GPU: tuple[Callable[[], None], ...] = (
    devices.share_one,
    collectives.install,
    host_staging.install,
)
"""Several ranks on one real GPU, which NCCL refuses: gloo, and every rank on device 0."""

_installed: set[Callable[[], None]] = set()


def wanted() -> bool:
    """Whether this process is to rehearse.

    ``MOETION_PLATFORM`` decides when set (``cpu``, ``cuda`` or ``shared-gpu``); otherwise a machine
    without a visible GPU rehearses. The GPUs are counted without initialising CUDA.

    Raises:
        ValueError: ``MOETION_PLATFORM`` holds something else.
    """
    platform = _platform()
    if platform:
        return platform == "cpu"
    # Once installed, the count below would answer for the stand-in.
    return devices.install in _installed or devices.visible_gpus() == 0


def shares_gpu() -> bool:
    """Whether all local ranks are to share one real GPU (``MOETION_PLATFORM=shared-gpu``).

    Raises:
        ValueError: ``MOETION_PLATFORM`` holds something unknown.
    """
    return _platform() == "shared-gpu"


def _platform() -> str:
    platform = os.environ.get(PLATFORM_VARIABLE, "")
    if platform not in ("", "cpu", "cuda", "shared-gpu"):
        raise ValueError(
            f"{PLATFORM_VARIABLE}={platform!r}: set it to cpu, cuda or shared-gpu, or unset it"
        )
    return platform


def install(stand_ins: Sequence[Callable[[], None]] = CPU) -> None:
    """Put the stand-ins in place; those that already are stay as they are.

    To be called before the host is imported: it binds some of these functions by name.

    Args:
        stand_ins: ``CPU``, ``SHARED_GPU`` or a selection of their members.

    Prints one line on global rank 0 that says what is stood in for.
    """
    missing = [stand_in for stand_in in stand_ins if stand_in not in _installed]
    for stand_in in missing:
        stand_in()
        _installed.add(stand_in)
    if missing and os.environ.get("RANK", "0") == "0":
        names = ", ".join(stand_in.__module__.rpartition(".")[2] for stand_in in missing)
        if stand_ins is SHARED_GPU:
            what, whom = "all ranks share GPU 0 and talk over gloo", "training on one GPU per rank"
        else:
            what, whom = "rehearsal, not a GPU run", "a GPU"
        print(
            f"moetion: {what} (stood in for: {names}); "
            f"no time or memory figure of this run says anything about {whom}",
            flush=True,
        )
