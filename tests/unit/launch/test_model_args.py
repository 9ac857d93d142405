"""The demo's command lines."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).parents[3] / "launch" / "demo" / "model_args.py"
_spec = importlib.util.spec_from_file_location("demo_model_args", PATH)
demo = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(demo)


def value_of(words, flag):
    """The last value of ``flag``, which is the one that counts."""
    return words[len(words) - words[::-1].index(flag)]


@pytest.mark.parametrize("variant", sorted(demo.VARIANTS))
def test_every_variant_is_the_demo_with_changes(variant):
    words = demo.model_args(variant, data_prefix="corpus/text")
    assert value_of(words, "--num-experts") == "8"
    assert value_of(words, "--pipeline-model-parallel-size") == "2"
    assert value_of(words, "--global-batch-size") == "8"
    assert value_of(words, "--data-path") == "corpus/text"


def test_a_variant_overrides_by_coming_later():
    words = demo.model_args("dropout")
    assert value_of(words, "--hidden-dropout") == "0.1"
    assert "--mock-data" in words


def test_tensor_parallelism_brings_sequence_parallelism():
    assert "--sequence-parallel" not in demo.model_args()
    assert "--sequence-parallel" in demo.model_args(tp_size=2)


def test_tied_embeddings_drop_the_flag_that_unties():
    assert "--untie-embeddings-and-output-weights" not in demo.model_args("tied")


def test_unknown_variants_and_sizes_are_refused():
    with pytest.raises(ValueError, match="take one of"):
        demo.model_args("dense")
    with pytest.raises(ValueError, match="ep_size 3 does not divide dp_size 2"):
        demo.model_args(ep_size=3)


def test_the_command_line_prints_the_same_words():
    printed = subprocess.run(
        [sys.executable, PATH, "--variant", "sigmoid", "--train-iters", "7", "--no-cpu"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert printed.split() == demo.model_args("sigmoid", train_iters=7, cpu=False)
