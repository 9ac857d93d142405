"""Pretrains a small mixture-of-experts GPT on the installed Megatron.

An ordinary Megatron script: it knows nothing of megatron_moetion and runs the same without it.
All sizes and parallelism come from the command line; `model_args.py` holds the demo's.
"""

import importlib.util
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.datasets import utils as datasets_utils
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

Batch = dict[str, Any]  # tensors; None where this stage needs none

BATCH_KEYS = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids")


def get_batch(data_iterator: Iterator[Batch] | None, vp_stage: int | None) -> Batch:
    """One microbatch on the device, or Nones on a stage that needs none.

    Tensor-parallel ranks each read the same samples, so nothing is broadcast.
    """
    if not is_first_or_last_pipeline_stage(vp_stage):
        return dict.fromkeys(BATCH_KEYS)
    assert data_iterator is not None
    sample = next(data_iterator)
    batch: Batch = {}
    for key in BATCH_KEYS:
        tensor = sample.get(key)
        batch[key] = None if tensor is None else tensor.cuda(non_blocking=True)
    return batch


def loss_func(
    loss_mask: torch.Tensor, output_tensor: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Summed token loss, number of tokens, and both of them for the log."""
    loss_mask = loss_mask.view(-1).float()
    loss = torch.sum(output_tensor.view(-1).float() * loss_mask)
    num_tokens = loss_mask.sum().detach().to(torch.int)
    if get_args().check_for_nan_in_loss_and_grad:
        get_rerun_state_machine().validate_result(
            result=loss,
            rejection_func=torch.isnan,
            message="NaN in the local forward loss",
            tolerance=0.0,
            fatal=True,
        )
    return loss, num_tokens, {"lm loss": torch.stack([loss.detach(), num_tokens.float()])}


def forward_step(data_iterator: Iterator[Batch] | None, model: GPTModel) -> tuple[Any, Any]:
    """Forward of one microbatch through this rank's model chunk."""
    batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    output_tensor = model(
        batch["tokens"],
        batch["position_ids"],
        batch["attention_mask"],
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )
    return output_tensor, partial(loss_func, batch["loss_mask"])


def dataset_provider(num_samples: list[int], vp_stage: int | None = None) -> tuple[Any, Any, Any]:
    """Train, validation and test sets of ``--data-path``, built where they are read."""
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
    )
    datasets: tuple[Any, Any, Any] = BlendedMegatronDatasetBuilder(
        GPTDataset, num_samples, partial(is_first_or_last_pipeline_stage, vp_stage), config
    ).build()
    return datasets


def embedding_ranks(pp_ranks: list[int]) -> list[int]:
    """Ranks that hold the word embedding: the last stage too when the output layer shares it."""
    if get_args().untie_embeddings_and_output_weights or len(pp_ranks) == 1:
        return [pp_ranks[0]]
    return [pp_ranks[0], pp_ranks[-1]]


def main() -> None:
    """Parse the command line and train."""
    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp"):
        # The wheel holds the compiled helper but no Makefile, and start-up would run `make`.
        datasets_utils.compile_helpers = lambda: None
    # Every rank builds its own data iterators.
    dataset_provider.is_distributed = True  # type: ignore[attr-defined]
    args = parse_and_validate_args()
    pretrain(
        pretrain_cfg_container_from_args(args, gpt_config_from_args(args)),
        dataset_provider,
        ModelType.encoder_or_decoder,
        forward_step,
        get_embedding_ranks=embedding_ranks,
    )


if __name__ == "__main__":
    main()
