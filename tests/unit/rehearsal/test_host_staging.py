"""Staging, seen with CPU tensors in place of a GPU's: what is moved is the same."""

import os
import subprocess
import sys

SCRIPT = """
import sys, torch, torch.distributed as dist
from megatron_moetion.rehearsal import host_staging
rank = int(sys.argv[1])
host_staging.install("cpu")
store = dist.FileStore(sys.argv[2], 2)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
peer = 1 - rank
sent = torch.full((2, 3), float(rank), dtype=torch.bfloat16)
# As a pipeline receives: an uninitialised leaf that requires gradients.
got = torch.empty(2, 3, dtype=torch.bfloat16, requires_grad=True)
works = dist.batch_isend_irecv([dist.P2POp(dist.isend, sent, peer),
                                dist.P2POp(dist.irecv, got, peer)])
assert isinstance(works[1], host_staging.StagedWork), works
for work in works:
    work.wait()
assert got.eq(peer).all() and got.requires_grad and got.is_leaf

tensor = torch.full((3,), float(rank))
dist.send(tensor, peer) if rank == 0 else dist.recv(tensor, peer)
assert tensor.eq(0).all()

shards = [torch.full((2,), rank + 10.0 * i) for i in range(2)]
wholes = [torch.zeros(4) for _ in range(2)]
with dist._coalescing_manager(async_ops=True) as cm:
    for whole, shard in zip(wholes, shards):
        dist.all_gather_into_tensor(whole, shard)
assert all(whole.eq(0).all() for whole in wholes), "delivered before the wait"
cm.wait()
assert [w.tolist() for w in wholes] == [[0, 0, 1, 1], [10, 10, 11, 11]], wholes

parts = [torch.full((2,), float(rank + 1)), torch.full((3,), 2.0)]
with dist._coalescing_manager():
    for part in parts:
        dist.all_reduce(part)
assert [p.tolist() for p in parts] == [[3, 3], [4, 4, 4]], parts
dist.barrier()
# An interpreter that ends while a thread of gloo still lets go of tensors aborts.
dist.destroy_process_group()
print("agreed", flush=True)
"""


def test_what_gloo_cannot_read_on_a_gpu_arrives_through_host_memory(tmp_path: object) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT]
    store = f"{tmp_path}/store"
    ranks = [
        subprocess.Popen([*command, str(rank), store], env=env, stdout=-1, stderr=-2, text=True)
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(outputs)
    assert all("agreed" in output for output in outputs)


def test_torchs_fake_group_is_left_alone() -> None:
    script = """
import torch, torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from megatron_moetion.rehearsal import host_staging
host_staging.install("cpu")
dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
whole = torch.arange(4.0)
with dist._coalescing_manager():
    dist.all_gather_into_tensor(whole, torch.zeros(2))
assert not isinstance(dist.irecv(torch.zeros(1), 1), host_staging.StagedWork)
print(whole.tolist())
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
