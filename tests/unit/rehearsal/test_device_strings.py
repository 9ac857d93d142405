"""``"cuda"`` as a device name."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import FunctionType
from typing import Any

import pytest
import torch
from torch.utils._device import _device_constructors

from megatron_moetion.rehearsal import device_strings

NAMES = ["cuda", "cuda:3", torch.device("cuda", 1), torch.device("cuda")]
ONE = torch.ones(1)
INDEX, BLOCK = torch.tensor([0, 1]), torch.ones(1, 1, 1)
MAKERS: dict[str, Callable[[Any], torch.Tensor]] = {
    "arange": lambda device: torch.arange(2, device=device),
    "as_tensor": lambda device: torch.as_tensor([1.0], device=device),
    "asarray": lambda device: torch.asarray([1.0], device=device),
    "bartlett_window": lambda device: torch.bartlett_window(2, device=device),
    "blackman_window": lambda device: torch.blackman_window(2, device=device),
    "empty": lambda device: torch.empty(2, device=device, pin_memory=True),
    "empty_like": lambda device: torch.empty_like(ONE, device=device),
    "empty_permuted": lambda device: torch.empty_permuted((2, 3), (1, 0), device=device),
    "empty_quantized": lambda device: torch.empty_quantized(
        (1,), torch.quantize_per_tensor(ONE, 1.0, 0, torch.quint8), device=device
    ),
    "empty_strided": lambda device: torch.empty_strided((2,), (1,), device=device),
    "eye": lambda device: torch.eye(2, device=device),
    "fft_fftfreq": lambda device: torch.fft.fftfreq(2, device=device),
    "fft_rfftfreq": lambda device: torch.fft.rfftfreq(2, device=device),
    "from_file": lambda device: torch.from_file("/dev/null", size=0, device=device),
    "full": lambda device: torch.full((2,), 1.0, device=device),
    "full_like": lambda device: torch.full_like(ONE, 1.0, device=device),
    "hamming_window": lambda device: torch.hamming_window(2, device=device),
    "hann_window": lambda device: torch.hann_window(2, device=device),
    "kaiser_window": lambda device: torch.kaiser_window(2, device=device),
    "linspace": lambda device: torch.linspace(0, 1, 2, device=device),
    "logspace": lambda device: torch.logspace(0, 1, 2, device=device),
    "nested_tensor": lambda device: torch.nested.nested_tensor([ONE], device=device),
    "normal": lambda device: torch.normal(0.0, 1.0, (2,), device=device),
    "ones": lambda device: torch.ones(2, device=device),
    "ones_like": lambda device: torch.ones_like(ONE, device=device),
    "rand": lambda device: torch.rand(2, device=device),
    "rand_like": lambda device: torch.rand_like(ONE, device=device),
    "randint": lambda device: torch.randint(9, (2,), device=device),
    "randint_like": lambda device: torch.randint_like(ONE, 9, device=device),
    "randn": lambda device: torch.randn(2, device=device),
    "randn_like": lambda device: torch.randn_like(ONE, device=device),
    "randperm": lambda device: torch.randperm(2, device=device),
    "range": lambda device: torch.range(0, 1, device=device),
    "scalar_tensor": lambda device: torch.scalar_tensor(1.0, device=device),
    "sparse_bsc_tensor": lambda device: torch.sparse_bsc_tensor(
        INDEX, INDEX[:1], BLOCK, (1, 1), device=device
    ),
    "sparse_bsr_tensor": lambda device: torch.sparse_bsr_tensor(
        INDEX, INDEX[:1], BLOCK, (1, 1), device=device
    ),
    "sparse_compressed_tensor": lambda device: torch.sparse_compressed_tensor(
        INDEX, INDEX[:1], ONE, (1, 1), layout=torch.sparse_csr, device=device
    ),
    "sparse_coo_tensor": lambda device: torch.sparse_coo_tensor(
        INDEX[None, :1], ONE, (1,), device=device
    ),
    "sparse_csc_tensor": lambda device: torch.sparse_csc_tensor(
        INDEX, INDEX[:1], ONE, (1, 1), device=device
    ),
    "sparse_csr_tensor": lambda device: torch.sparse_csr_tensor(
        INDEX, INDEX[:1], ONE, (1, 1), device=device
    ),
    "tensor": lambda device: torch.tensor([1.0], device=device),
    "tril_indices": lambda device: torch.tril_indices(2, 2, device=device),
    "triu_indices": lambda device: torch.triu_indices(2, 2, device=device),
    "zeros": lambda device: torch.zeros(2, device=device),
    "zeros_like": lambda device: torch.zeros_like(ONE, device=device),
}
METHODS: dict[str, Callable[[Any], torch.Tensor]] = {
    "new": lambda device: ONE.new([1.0], device=device),
    "new_empty": lambda device: ONE.new_empty(2, device=device),
    "new_empty_strided": lambda device: ONE.new_empty_strided((2,), (1,), device=device),
    "new_full": lambda device: ONE.new_full((2,), 1.0, device=device),
    "new_ones": lambda device: ONE.new_ones(2, device=device),
    "new_tensor": lambda device: ONE.new_tensor([1.0], device=device),
    "new_zeros": lambda device: ONE.new_zeros(2, device=device),
    "to": lambda device: ONE.to(device),
    "to by keyword": lambda device: ONE.to(device=device, dtype=torch.float64),
    "to with a type": lambda device: ONE.to(device, torch.float64, non_blocking=True),
    "Module.to": lambda device: torch.nn.Linear(2, 2).to(device).weight,
    "Module.to by keyword": lambda device: torch.nn.Linear(2, 2).to(device=device).weight,
    "Linear": lambda device: torch.nn.Linear(2, 2, device=device).weight,
}
OTHERWISE = {"Generator", "is_pinned", "pin_memory"}
"""The first is a class, the others make no tensor elsewhere."""


@pytest.mark.parametrize("device", NAMES)
def test_every_way_of_naming_the_device_ends_on_the_cpu(apart, device):
    def body():
        device_strings.install()
        for name, make in {**MAKERS, **METHODS}.items():
            assert make(device).device.type == "cpu", name
        assert not ONE.is_pinned(device)

    apart(body)


def test_so_it_does_on_every_thread(apart):
    def body():
        device_strings.install()
        with ThreadPoolExecutor(1) as other:
            assert other.submit(MAKERS["zeros"], "cuda").result().device.type == "cpu"

    apart(body)


def test_no_operator_of_torch_that_takes_a_device_is_forgotten():
    operators = {
        schema.name.removeprefix("aten::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("aten::")
        and {"device", "pin_memory"} & {argument.name for argument in schema.arguments}
    }
    makers = {maker.__name__ for maker in _device_constructors()}
    public = {name for name in operators | makers if not name.startswith("_")}
    assert public - OTHERWISE <= set(MAKERS) | set(METHODS)


def test_another_device_is_left_as_it_is(apart):
    def body():
        device_strings.install()
        assert torch.zeros(1, device="meta").device.type == "meta"
        assert ONE.to("meta").device.type == "meta"
        with torch.device("meta"):
            assert torch.zeros(1).device.type == "meta"
            assert torch.zeros(1, device="cuda").device.type == "cpu"
        assert torch.zeros(1).device.type == "cpu"

    apart(body)


def test_functions_that_torch_compiles_to_a_script_still_name_its_operators(apart):
    def body():
        device_strings.install()
        scripted = torch.jit.script(two_more)
        assert "aten::zeros" in str(scripted.graph)
        assert scripted(torch.ones(2)).tolist() == [1.0, 1.0]

    apart(body)


def two_more(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.float32) + torch.zeros([2], device=tensor.device)


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
        assert not isinstance(torch.add, FunctionType), "only what takes a device is wrapped"
        assert torch.einsum("ij,j->i", torch.ones(2, 2), torch.ones(2)).tolist() == [2.0, 2.0]

    apart(body)
