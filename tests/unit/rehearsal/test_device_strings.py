"""``"cuda"`` as a device name."""

import pytest
import torch

from megatron_moetion.rehearsal import device_strings


@pytest.mark.parametrize("name", ["cuda", "cuda:3", torch.device("cuda", 1), torch.device("cuda")])
def test_every_way_of_naming_the_device_ends_on_the_cpu(apart, name):
    def body():
        device_strings.install()
        tensor = torch.ones(2, device=name)
        for moved in (tensor, tensor.to(name), tensor.to(device=name), tensor.new_zeros(2)):
            assert str(moved.device) == "cpu"
        assert torch.empty(2, device=name, pin_memory=True).numel() == 2

    apart(body)


def test_moving_is_staying(apart):
    def body():
        device_strings.install()
        tensor = torch.ones(2)
        assert tensor.cuda(non_blocking=True) is tensor
        assert tensor.pin_memory() is tensor
        assert tensor.is_cuda
        module = torch.nn.Linear(2, 2)
        assert module.cuda(0) is module

    apart(body)


def test_types_carry_their_cuda_names(apart):
    def body():
        device_strings.install()
        assert torch.ones(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
        assert torch.ones(1).type() == "torch.cuda.FloatTensor"
        assert torch.ones(1).type(torch.float16).dtype == torch.float16
        assert torch.ones(1).type("torch.cuda.HalfTensor").dtype == torch.float16

    apart(body)


def test_ordinary_calls_are_untouched(apart):
    def body():
        device_strings.install()
        assert torch.equal(torch.ones(2) + torch.ones(2), torch.full((2,), 2.0))
        assert torch.einsum("ij,j->i", torch.ones(2, 2), torch.ones(2)).tolist() == [2.0, 2.0]

    apart(body)
