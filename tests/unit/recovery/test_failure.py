"""Only what can be the echo of a lost peer counts as one."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from megatron_moetion.faults import InjectedFault
from megatron_moetion.recovery.failure import (
    Interrupted,
    MissingFromInbox,
    ReplayDiverged,
    Superseded,
    is_communication_error,
)


@pytest.mark.parametrize(
    "error",
    [
        Interrupted("given up"),
        dist.DistBackendError("NCCL communicator was aborted"),
        dist.DistNetworkError("Connection reset"),
        dist.DistStoreError("wait timeout"),
        RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed"),
        RuntimeError("Connection closed by peer [127.0.0.1]:4711"),
        ConnectionResetError(104, "Connection reset by peer"),
    ],
)
def test_a_lost_connection_is_an_echo(error: Exception) -> None:
    assert is_communication_error(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
        RuntimeError("CUDA out of memory"),
        InjectedFault("injected by --moetion-fault: Fault(kind='raise', place='norm')"),
        MissingFromInbox("Connection closed by peer"),
        ReplayDiverged("other bits"),
        Superseded("epoch 2 began"),
        ValueError("Connection closed by peer"),
        KeyError("gloo/transport"),
        AssertionError("Broken pipe"),
        BrokenPipeError(32, "Broken pipe"),
    ],
)
def test_anything_else_stays_an_error_of_this_worker(error: Exception) -> None:
    assert not is_communication_error(error)
