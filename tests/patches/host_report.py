"""Run in a process that sourced moetion.sh: exercises the patch layer on the real host.

Importing the host takes many seconds, so one process answers many questions and prints one JSON
object as its last line; `test_activation` reads it.
"""

import contextlib
import io
import json
import sys
from typing import Any

HOST_FLAGS = """
    --clip-grad 0 --num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 16
    --max-position-embeddings 16 --micro-batch-size 1 --train-iters 1 --lr 1e-3
    --tokenizer-type NullTokenizer --vocab-size 64 --transformer-impl local
    --attention-backend unfused --no-gradient-accumulation-fusion --no-persist-layer-norm
    --no-masked-softmax-fusion --no-rope-fusion --disable-jit-fuser --distributed-backend gloo
"""

REFUSED = {
    "unknown value": ["--moetion", "--moetion-window-policy", "sliding"],
    "unknown flag": ["--moetion-widow", "3"],
    "replicas": ["--moetion", "--moetion-replicas", "1"],
    "fault": ["--moetion", "--moetion-fault", "kill:global_rank=0,iteration=1,at=lunch"],
    "fsdp": ["--moetion", "--use-megatron-fsdp"],
    "fsdp digest": ["--moetion-digest-interval", "1", "--use-megatron-fsdp"],
    "fp8 parameters": ["--moetion", "--fp8-param-gather"],
    "cuda graphs": ["--moetion", "--cuda-graph-impl", "local"],
    "in-process restart": ["--moetion", "--inprocess-restart"],
    "muon": ["--moetion", "--optimizer", "muon"],
}


def parse(*flags: str) -> tuple[int, str]:
    """The host's own entry point with these flags; returns exit code (0: went on) and stderr."""
    from megatron.training import arguments, global_vars

    global_vars.unset_global_variables()
    sys.argv = ["pretrain.py", *HOST_FLAGS.split(), *flags]
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            arguments.parse_and_validate_args()
    except SystemExit as end:
        return int(end.code or 0), errors.getvalue()
    return 0, errors.getvalue()


def main() -> None:
    """Prints the report."""
    report: dict[str, Any] = {"early": sorted({"torch", "megatron_moetion"} & set(sys.modules))}
    import megatron.training.training
    from megatron.training import arguments
    from megatron_moetion_patches import activation

    from megatron_moetion.interception import apply, locate, verify_all

    folder = activation.host_folder(activation.host_version())
    assert folder is not None
    flag_rows = activation.part(folder, "flags").ROWS
    rows = activation.part(folder, "rows").ROWS
    activate = activation.part(folder, "activate")

    def held() -> dict[str, int]:
        return {row.target: id(locate(row.target)) for row in rows}

    def intercepted(target: str) -> bool:
        function = locate(target)
        return getattr(function, "__code__", None) is not None and (
            function.__code__.co_name == "intercepted"
        )

    before = held()
    report["targets"] = [row.target for row in rows]
    report["flag_rows_on"] = [intercepted(row.target) for row in flag_rows]
    report["problems"] = [str(problem) for problem in verify_all(rows, activation.SWEEP)]
    report["off"] = parse()
    report["off_same"] = held() == before and not any(intercepted(row.target) for row in rows)

    report["refused"] = {name: parse(*flags) for name, flags in REFUSED.items()}
    report["refused_same"] = held() == before

    undo = apply(rows, activation.SWEEP)
    report["applied"] = all(held()[row.target] != before[row.target] for row in rows)
    undo()
    report["undone_same"] = held() == before

    called: list[Any] = []
    activate.activate = lambda args, config: called.append((args, config))
    report["on"] = parse("--moetion", "--moetion-window", "2")
    args, config = called.pop()
    # Final: the host's validation has already filled this in.
    report["on_args_final"] = args.data_parallel_size == 1 and config.window_size == 2
    report["on_selected"] = [row.target for row in activation.selected_rows(rows, config)]
    report["on_patched"] = [target for target in report["on_selected"] if intercepted(target)]
    import torch.distributed

    report["group_exists"] = torch.distributed.is_initialized()
    activation.undo()
    report["undone_all"] = held() == before and not any(intercepted(r.target) for r in flag_rows)

    import megatron.core

    megatron.core.__version__ = "0.20.0"
    for name, flags in {"on": ["--moetion"], "off": []}.items():
        sys.argv = ["pretrain.py", *flags]
        errors = io.StringIO()
        try:
            with contextlib.redirect_stderr(errors):
                activation._moment_one(arguments)
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        report[f"unknown_{name}"] = (code, errors.getvalue())
    report["unknown_same"] = not any(intercepted(row.target) for row in flag_rows)
    megatron.core.__version__ = "0.19.2"

    activation._moment_one(arguments)
    wrong = rows[0].__class__(
        "megatron.training.training:train_step", "around", None, "(nothing)", "", "", ""
    )
    activation.part(folder, "rows").ROWS = (*rows, wrong)
    report["drift"] = parse("--moetion")
    report["drift_same"] = held() == before
    print(json.dumps(report))


if __name__ == "__main__":
    main()
