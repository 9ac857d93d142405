"""A stage on torch's fake process group."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist
from one_stage import Stage
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_moetion.recovery.regroup import GroupRecorder
from megatron_moetion.vault.store import VaultStore


@pytest.fixture
def stage() -> Iterator[Stage]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    groups = GroupRecorder()
    for ranks in ([0, 1], [0, 2], [2, 3]):
        groups.record(dist.new_group(ranks), ranks, {})
    store = VaultStore()
    yield Stage(store, groups)
    dist.destroy_process_group()
    store.close()
