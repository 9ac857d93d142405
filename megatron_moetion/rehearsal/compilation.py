"""Stands in for the compiler: what would become GPU kernels runs eagerly."""

from collections.abc import Callable
from typing import Any

import torch


def _eager(model: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
    """``torch.compile`` as function and as decorator, without compiling."""
    if model is None:
        return lambda function: function
    return model


def install() -> None:
    """Replace ``torch.compile``; the host decorates functions with it while it is imported."""
    torch.compile = _eager
