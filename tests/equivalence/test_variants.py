"""Other models and schedules: what is easy to forget is what differs between them."""

import pytest

from .harness import Runner, assert_same_bits, kills

ITERATIONS = 16
FAILURES = [(2, 4, "backward:1"), (1, 10, "optimizer")]
VARIANTS = {
    # Router bias and token counters are buffers that training mutates.
    "sigmoid": {"variant": "sigmoid"},
    # Every random number counts.
    "dropout": {"variant": "dropout"},
    # The embedding's gradient crosses stages; shared experts run beside the routed ones.
    "tied": {"variant": "tied"},
    # Without the distributed optimizer the norm spans one pipeline only: the commit point is a
    # barrier of ours.
    "replicated": {"variant": "demo", "without": ["--use-distributed-optimizer"]},
    "tensor-parallel": {"model": {"tp_size": 2, "ep_size": 1, "dp_size": 1}},
    "interleaved": {"variant": "overlap", "layers": 4, "model": {"layers_per_virtual_stage": 1}},
    "four-stages": {
        "variant": "demo",
        "layers": 4,
        "model": {"pp_size": 4, "ep_size": 1, "dp_size": 1},
    },
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_recovered_bit_for_bit(runner: Runner, name: str) -> None:
    options = VARIANTS[name]
    off = runner.off(f"{name}-off", iterations=ITERATIONS, **options)
    assert off.code == 0, off.tail()
    run = runner.run(
        f"{name}-killed", iterations=ITERATIONS, flags=["--moetion", *kills(*FAILURES)], **options
    )
    assert run.code == 0, run.tail()
    assert_same_bits(run, off, ITERATIONS)
    assert [e["recovered"] for e in run.recoveries] == [[rank] for rank, *_ in FAILURES]
