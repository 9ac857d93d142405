"""Device and memory queries."""

import torch

from megatron_moetion.rehearsal import devices


def test_every_local_rank_has_a_device_and_it_is_the_cpu(monkeypatch, apart):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")

    def body():
        devices.install()
        assert torch.cuda.is_available()
        assert torch.cuda.device_count() == 4
        torch.cuda.set_device(3)
        assert torch.zeros(1, device=torch.cuda.current_device()).device.type == "cpu"
        with torch.cuda.device(2):
            torch.cuda.synchronize()

    apart(body)


def test_properties_and_memory_have_answers(apart):
    def body():
        devices.install()
        assert torch.cuda.get_device_capability() == (8, 0)
        assert torch.cuda.get_device_properties(0).total_memory > 0
        assert torch.cuda.memory_stats()["allocated_bytes.all.current"] == 0
        assert torch.cuda.max_memory_allocated() == 0
        torch.cuda.check_error(torch.cuda.cudart().cudaProfilerStart())

    apart(body)
