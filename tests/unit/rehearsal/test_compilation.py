"""Eager execution."""

import torch

from megatron_moetion.rehearsal import compilation


def test_compiling_gives_back_the_function(apart):
    def body():
        compilation.install()

        def function():
            return 1

        assert torch.compile(function) is function
        assert torch.compile(fullgraph=True)(function) is function

    apart(body)
