"""Whether to rehearse, and the announcement."""

import pytest
import torch

from megatron_moetion import rehearsal
from megatron_moetion.rehearsal import devices


def test_the_variable_decides(monkeypatch):
    monkeypatch.setattr(devices, "visible_gpus", lambda: 8)
    monkeypatch.setenv(rehearsal.PLATFORM_VARIABLE, "cpu")
    assert rehearsal.wanted()
    monkeypatch.setattr(devices, "visible_gpus", lambda: 0)
    monkeypatch.setenv(rehearsal.PLATFORM_VARIABLE, "cuda")
    assert not rehearsal.wanted()


@pytest.mark.parametrize(("gpus", "wanted"), [(0, True), (2, False)])
def test_without_the_variable_a_machine_without_gpu_rehearses(monkeypatch, gpus, wanted):
    monkeypatch.delenv(rehearsal.PLATFORM_VARIABLE, raising=False)
    monkeypatch.setattr(devices, "visible_gpus", lambda: gpus)
    assert rehearsal.wanted() is wanted


def test_another_platform_is_refused(monkeypatch):
    monkeypatch.setenv(rehearsal.PLATFORM_VARIABLE, "tpu")
    with pytest.raises(ValueError, match="set it to cpu, cuda or shared-gpu"):
        rehearsal.wanted()


def test_rank_0_announces_it_once_and_it_stays_wanted(monkeypatch, apart, capfd):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.delenv(rehearsal.PLATFORM_VARIABLE, raising=False)
    monkeypatch.setattr(devices, "visible_gpus", lambda: torch.cuda.device_count())

    def body():
        rehearsal._installed.add(devices.install)
        rehearsal.install()
        rehearsal.install()
        assert rehearsal.wanted()

    apart(body)
    out = capfd.readouterr().out
    assert out.count("moetion: rehearsal, not a GPU run") == 1


def test_other_ranks_are_silent(monkeypatch, apart, capfd):
    monkeypatch.setenv("RANK", "1")
    apart(rehearsal.install)
    assert capfd.readouterr().out == ""


def test_sharing_a_gpu_leaves_streams_and_names_alone(monkeypatch, apart):
    def body():
        stream, is_cuda = torch.cuda.Stream, torch.Tensor.is_cuda
        rehearsal.install(rehearsal.SHARED_GPU)
        assert torch.cuda.Stream is stream
        assert torch.Tensor.is_cuda is is_cuda

    apart(body)
