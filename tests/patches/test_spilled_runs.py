"""What a spill has to know of the host: which arguments must fit, which checkpoint is there."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
import torch

from megatron_moetion.patch_location import load_patches

checkpoint = load_patches("checkpoint")
identity = load_patches("core_0_19.identity")

MUST_FIT = (
    "num_layers hidden_size num_experts moe_router_topk moe_aux_loss_coeff seed lr min_lr"
    " lr_decay_iters train_iters global_batch_size micro_batch_size clip_grad weight_decay bf16"
    " pipeline_model_parallel_size expert_model_parallel_size tensor_model_parallel_size"
    " world_size data_path split tokenizer_type overlap_grad_reduce use_distributed_optimizer"
    " deterministic_mode params_dtype rerun_mode loss_scale optimizer adam_beta1 eod_mask_loss"
)
MAY_DIFFER = (
    "rank local_rank load save save_interval no_load_optim no_save_rng log_interval"
    " tensorboard_dir tensorboard_log_interval wandb_project exit_interval exit_duration_in_mins"
    " moetion_dir moetion_fault moetion_export timing_log_level num_workers profile_step_end"
)


@pytest.mark.parametrize("name", MUST_FIT.split())
def test_what_bits_depend_on_must_fit(name: str) -> None:
    one, other = (identity.identity(Namespace(**{name: value})) for value in (1, 2))
    assert one != other


@pytest.mark.parametrize("name", MAY_DIFFER.split())
def test_what_is_only_said_or_saved_may_differ(name: str) -> None:
    one, other = (identity.identity(Namespace(**{name: value})) for value in (1, 2))
    assert one == other


def test_values_that_read_differently_in_each_process_are_left_out() -> None:
    args = Namespace(dtype=torch.bfloat16, weights=[1, "a"], thing=object(), things=[object()])
    found = identity.identity(args)
    assert (found["dtype"], found["weights"]) == ("torch.bfloat16", "[1, 'a']")
    assert not {"thing", "things"} & found.keys()
    assert found["version of torch"] == torch.__version__.partition("+")[0]


@pytest.mark.parametrize(
    ("flags", "tracker", "expected"),
    [
        (["--load", "{}"], "30", 30),
        (["--load={}", "--lr", "1"], "30\n", 30),
        (["--load", "{}"], None, None),
        (["--load", "{}"], "release", None),
        (["--load", "{}", "--finetune"], "30", None),
        (["--load", "{}", "--ckpt-step", "10"], "30", 10),
        (["--load", "{}", "--ckpt-step", "0"], "30", 30),
        (["--save", "{}"], "30", None),
        ([], "30", None),
    ],
)
def test_the_checkpoint_is_the_one_that_load_goes_on_from(
    tmp_path: Path, flags: list[str], tracker: str | None, expected: int | None
) -> None:
    if tracker is not None:
        (tmp_path / "latest_checkpointed_iteration.txt").write_text(tracker)
    assert checkpoint.newest([flag.format(tmp_path) for flag in flags]) == expected
