"""The same identity with the pretrain_gpt.py of the checkout that $MEGATRON_LM names."""

import os
from pathlib import Path

import pytest

from .harness import Runner, assert_same_bits, kills

ITERATIONS = 16
FAILURES = [(3, 4, "backward:1"), (0, 10, "optimizer")]
CHECKOUT = os.environ.get("MEGATRON_LM")


@pytest.mark.megatron_lm
@pytest.mark.skipif(CHECKOUT is None, reason="$MEGATRON_LM names no checkout of Megatron-LM")
def test_its_own_script_is_recovered_bit_for_bit(runner: Runner) -> None:
    script = Path(str(CHECKOUT)) / "pretrain_gpt.py"
    off = runner.off("megatron-lm-off", iterations=ITERATIONS, script=script)
    assert off.code == 0, off.tail()
    run = runner.run(
        "megatron-lm", iterations=ITERATIONS, script=script, flags=["--moetion", *kills(*FAILURES)]
    )
    assert run.code == 0, run.tail()
    assert_same_bits(run, off, ITERATIONS)
    assert [e["recovered"] for e in run.recoveries] == [[rank] for rank, *_ in FAILURES]
