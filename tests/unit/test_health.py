"""A device that works is found to work; one that does not is named, whatever it does instead."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest
import torch

from megatron_moetion import health

TIMEOUT = timedelta(seconds=600)
CPU = torch.device("cpu")


def test_a_device_that_works_is_taken() -> None:
    assert health.probe(CPU, TIMEOUT) is None


def test_a_device_that_raises_is_named() -> None:
    reason = health.probe(torch.device("ipu"), TIMEOUT)
    assert reason is not None
    assert reason.startswith("device ipu is broken: PyTorch is not linked")
    assert "\n" not in reason


def test_a_device_that_computes_wrongly_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    to = torch.Tensor.to

    def flips(self: torch.Tensor, device: torch.device) -> torch.Tensor:
        there = to(self, device).clone()
        there[7] ^= 1
        return there

    monkeypatch.setattr(torch.Tensor, "to", flips)
    assert health.probe(CPU, TIMEOUT) == "device cpu is broken: 1 of 65536 results are wrong"


def test_a_device_that_does_not_answer_is_named_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    never = threading.Event()

    def hangs(self: torch.Tensor, device: torch.device) -> torch.Tensor:
        never.wait()
        return self

    monkeypatch.setattr(torch.Tensor, "to", hangs)
    reason = health.probe(CPU, timedelta(seconds=2))
    assert reason == "device cpu did not answer within 0.1 s"
    never.set()
