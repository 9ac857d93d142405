"""The demo's Megatron command line and the variants that the tests train.

``python launch/demo/model_args.py --variant demo --data-prefix PREFIX --train-iters 20`` prints one
for use in a shell; every parameter of `model_args` is an option.
"""

import argparse
import inspect
import shlex

MODEL = (
    "--num-layers 4 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4 "
    "--seq-length 32 --max-position-embeddings 32 --position-embedding-type rope "
    "--normalization RMSNorm --swiglu --disable-bias-linear "
    "--untie-embeddings-and-output-weights --init-method-std 0.02 "
    "--attention-dropout 0.0 --hidden-dropout 0.0"
)
EXPERTS = (
    "--num-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size 64 "
    "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01 "
    "--moe-token-dispatcher-type alltoall"
)
# Every iteration has another learning rate, so a skipped or repeated update shows in the loss.
OPTIMIZER = (
    "--use-distributed-optimizer --bf16 --optimizer adam --weight-decay 0.1 --clip-grad 1.0 "
    "--lr 3e-3 --min-lr 3e-5 --lr-decay-style linear --lr-decay-iters 50 --lr-warmup-iters 4 "
    "--seed 1234"
)
RUN = (
    "--micro-batch-size 1 --log-interval 1 --eval-interval 1000 --eval-iters 1 "
    "--distributed-timeout-minutes 10"
)
# 66 divides 264, so 1, 2 and 4 tensor-parallel ranks pad the 257 tokens alike.
DATA = (
    "--tokenizer-type NullTokenizer --vocab-size 257 --null-tokenizer-eod-id 256 "
    "--make-vocab-size-divisible-by 66 --split 90,10,0 --num-workers 0 "
    "--no-create-attention-mask-in-dataloader"
)
CPU = (
    "--transformer-impl local --attention-backend unfused --no-gradient-accumulation-fusion "
    "--no-persist-layer-norm --no-masked-softmax-fusion --no-bias-gelu-fusion "
    "--no-bias-swiglu-fusion --no-bias-dropout-fusion --no-rope-fusion --disable-jit-fuser "
    "--distributed-backend gloo"
)

VARIANTS: dict[str, str] = {
    "demo": "",
    "overlap": "--overlap-grad-reduce --overlap-param-gather",
    "sigmoid": (
        "--moe-router-enable-expert-bias --moe-router-score-function sigmoid "
        "--moe-router-load-balancing-type none --moe-aux-loss-coeff 0.0"
    ),
    "dropout": "--attention-dropout 0.1 --hidden-dropout 0.1",
    "shared-experts": "--moe-shared-expert-intermediate-size 64",
    "tied": "",
}
"""What each variant adds; a flag given twice takes the later value."""


def model_args(
    variant: str = "demo",
    *,
    data_prefix: str = "",
    train_iters: int = 20,
    pp_size: int = 2,
    ep_size: int = 2,
    tp_size: int = 1,
    num_microbatches: int = 4,
    dp_size: int = 2,
    layers_per_virtual_stage: int = 0,
    cpu: bool = True,
) -> list[str]:
    """The command line of one variant, without the script.

    Args:
        variant: a key of ``VARIANTS``.
        data_prefix: prefix of the indexed data set; empty takes the host's mock data.
        train_iters: iterations to train; the learning rate does not depend on it.
        pp_size, ep_size, tp_size, dp_size: sizes of the parallel groups; ``dp_size`` counts the
            ranks that share one pipeline and tensor rank, ``ep_size`` divides it. The number of
            ranks to start is ``pp_size * tp_size * dp_size``; with ``tp_size`` above 1 the host
            wants CUDA_DEVICE_MAX_CONNECTIONS=1 in the environment.
        num_microbatches: microbatches per iteration of one data-parallel rank.
        layers_per_virtual_stage: above 0, interleaved stages of that many layers.
        cpu: add what a rehearsal needs; without it the host's defaults for a GPU stand.

    Raises:
        ValueError: unknown variant, or sizes that do not divide.
    """
    if variant not in VARIANTS:
        raise ValueError(f"no variant {variant!r}: take one of {', '.join(VARIANTS)}")
    if dp_size % ep_size:
        raise ValueError(f"ep_size {ep_size} does not divide dp_size {dp_size}: change one of them")
    words = shlex.split(" ".join((MODEL, EXPERTS, OPTIMIZER, RUN, DATA)))
    words += ["--pipeline-model-parallel-size", str(pp_size)]
    words += ["--expert-model-parallel-size", str(ep_size)]
    words += ["--tensor-model-parallel-size", str(tp_size)]
    if tp_size > 1:
        # The host allows experts with tensor parallelism only together with it.
        words += ["--sequence-parallel"]
    if layers_per_virtual_stage:
        words += ["--num-layers-per-virtual-pipeline-stage", str(layers_per_virtual_stage)]
    words += ["--global-batch-size", str(num_microbatches * dp_size)]
    words += ["--train-iters", str(train_iters)]
    words += ["--data-path", data_prefix] if data_prefix else ["--mock-data"]
    words += shlex.split(VARIANTS[variant])
    if variant == "tied":
        words.remove("--untie-embeddings-and-output-weights")
    return words + (shlex.split(CPU) if cpu else [])


def main() -> None:
    """Print the command line of one variant."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, parameter in inspect.signature(model_args).parameters.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(parameter.default, bool):
            parser.add_argument(
                flag, default=parameter.default, action=argparse.BooleanOptionalAction
            )
        else:
            parser.add_argument(flag, default=parameter.default, type=type(parameter.default))
    try:
        print(shlex.join(model_args(**vars(parser.parse_args()))))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
