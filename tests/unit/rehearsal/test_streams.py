"""Streams, events, profiler ranges."""

import torch

from megatron_moetion.rehearsal import streams


def test_what_was_recorded_has_happened(apart):
    def body():
        streams.install()
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            first.record()
            side.wait_stream(torch.cuda.current_stream())
            last.record(side)
        torch.cuda.current_stream().wait_event(last)
        assert last.query()
        assert first.elapsed_time(last) >= 0.0

    apart(body)


def test_ranges_and_graph_checks_pass(apart):
    def body():
        streams.install()
        torch.cuda.nvtx.range_push("step")
        torch.cuda.nvtx.range_pop()
        with torch.cuda.nvtx.range("step"):
            assert not torch.cuda.is_current_stream_capturing()
        parameter = torch.nn.Parameter(torch.ones(2))
        parameter.grad = torch.ones(2)
        torch.optim.AdamW([parameter]).step()

    apart(body)
