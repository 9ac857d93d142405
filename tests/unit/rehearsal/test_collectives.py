"""gloo where NCCL was asked for."""

import inspect
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_moetion.rehearsal import collectives


def test_groups_that_ask_for_nccl_get_gloo(apart):
    def body():
        collectives.install()
        dist.init_process_group(
            backend="nccl",
            store=dist.HashStore(),
            rank=0,
            world_size=1,
            device_id=torch.device("cuda:0"),
        )
        group = dist.new_group([0], backend="nccl", pg_options=object())
        assert dist.get_backend(group) == "gloo"
        tensor = torch.ones(2)
        dist.all_reduce(tensor, group=group)
        assert tensor.tolist() == [1.0, 1.0]
        dist.destroy_process_group()

    apart(body)


def test_all_groups_of_a_world_share_one_thread_and_the_next_world_has_another(apart):
    def threads():
        tasks = Path("/proc/self/task")
        names = [(task / "comm").read_text().strip() for task in tasks.iterdir()]
        return names.count("gloo_tcp_loop")

    def world():
        dist.init_process_group(backend="gloo", store=dist.HashStore(), rank=0, world_size=1)
        groups = [dist.new_group([0]) for _ in range(5)]
        for group in groups:
            dist.barrier(group)
        return groups

    def body():
        collectives.install()
        before = world()
        assert threads() == 1
        dist.destroy_process_group()
        # Somebody still holds groups of the world before.
        after = world()
        assert threads() == 2
        assert len({id(group) for group in before + after}) == 10
        dist.destroy_process_group()

    apart(body)


def test_signatures_stay_the_hosts(apart):
    def body():
        before = inspect.signature(dist.new_group)
        collectives.install()
        assert inspect.signature(dist.new_group) == before
        assert dist.new_group is dist.distributed_c10d.new_group

    apart(body)
