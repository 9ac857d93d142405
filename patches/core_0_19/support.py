"""What a protected run refuses, as a table: bit-identical after a recovery, or not started.

A predicate sees the host's arguments, raw as parsed or final, so it asks through `_get`. Several
entries are not impossible, only unproved; each says what to do instead.
"""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Unsupported:
    """One refused feature.

    Attributes:
        feature: what it is called.
        used: whether these arguments ask for it.
        why: why it is refused.
        instead: what to change.
        digest: refused for a run that only records digests, too.
    """

    feature: str
    used: Callable[[Namespace], bool]
    why: str
    instead: str
    digest: bool = False

    def __str__(self) -> str:
        return f"not supported: {self.feature}, because {self.why}; {self.instead}"


def unsupported(args: Namespace, *, digest_only: bool = False) -> list[Unsupported]:
    """Returns the rows of the table that apply to these arguments, in the table's order.

    Args:
        args: the host's arguments; names that are missing count as not asked for.
        digest_only: the run is not protected, it only records digests.
    """
    return [row for row in TABLE if row.used(args) and (row.digest or not digest_only)]


def why_not_by_stage(args: Namespace) -> str | None:
    """Why a run that leaves the cut open cannot have the stage cut, or None."""
    by_cut = [
        unsupported(Namespace(**{**vars(args), "moetion_cut": cut})) for cut in ("stage", "shard")
    ]
    rows = [row for row in by_cut[0] if row not in by_cut[1]]
    return f"{rows[0].feature}: {rows[0].why}" if rows else None


def _get(args: Namespace, name: str) -> Any:
    return getattr(args, name, None)


def _on(*names: str) -> Callable[[Namespace], bool]:
    """Asks whether any of these is set to something true."""
    return lambda args: any(bool(_get(args, name)) for name in names)


def _above(least: int, *names: str) -> Callable[[Namespace], bool]:
    return lambda args: any((_get(args, name) or 0) > least for name in names)


def _is(name: str, *values: str) -> Callable[[Namespace], bool]:
    return lambda args: _get(args, name) in values


def _is_not(name: str, *values: Any) -> Callable[[Namespace], bool]:
    return lambda args: _get(args, name) not in (None, *values)


def _drop(*flags: str) -> str:
    return f"drop {' and '.join(flags)}"


def _by_stage(args: Namespace) -> bool:
    return bool(getattr(args, "moetion_cut", "stage") == "stage")


def _clips_in_one_replayed_stage(args: Namespace) -> bool:
    stages = getattr(args, "pipeline_model_parallel_size", None)
    return _by_stage(args) and stages == 1 and _above(0, "clip_grad")(args)


def _mtp_across_stages(args: Namespace) -> bool:
    return (
        bool(_get(args, "mtp_num_layers")) and (_get(args, "pipeline_model_parallel_size") or 1) > 1
    )


_OWN_GROUPS = "it communicates outside torch.distributed, so its groups cannot be rebuilt in place"
_LATE_WGRAD = "weight gradients are computed apart from the backward pass that replay repeats"
_QUANTIZED = "quantized copies and scaling history of parameters are not captured yet"
_UNPROVED = "its state has not been proved to be captured completely"
_RESTARTS = "it restarts or replaces workers itself"
_NEW_BATCHES = "replay assumes that every iteration runs alike on the next samples"

TABLE: tuple[Unsupported, ...] = (
    # Who owns the parameters.
    Unsupported(
        "FSDP",
        _on("use_megatron_fsdp", "use_torch_fsdp2"),
        "parameters are sharded in ways that are not captured yet",
        "use --use-distributed-optimizer instead of --use-megatron-fsdp or --use-torch-fsdp2",
        digest=True,
    ),
    Unsupported(
        "--data-parallel-random-init",
        _on("data_parallel_random_init"),
        "data-parallel replicas have to be equal",
        _drop("--data-parallel-random-init"),
    ),
    Unsupported(
        "weight sharding over a further axis",
        lambda args: (
            _above(1, "gtp_weight_remat_size", "expert_gtp_weight_remat_size")(args)
            or _above(
                _get(args, "tensor_model_parallel_size") or 1, "tensor_parallel_num_weight_shards"
            )(args)
            or _above(
                # The host fills this in with the size of the expert tensor-parallel group.
                _get(args, "expert_tensor_parallel_size")
                or _get(args, "tensor_model_parallel_size")
                or 1,
                "expert_tensor_parallel_num_weight_shards",
            )(args)
        ),
        "shards beyond tensor parallelism are not captured yet",
        _drop("--tensor-parallel-num-weight-shards", "--expert-tensor-parallel-num-weight-shards"),
    ),
    Unsupported(
        "experts stored as one grouped parameter",
        _on("moe_single_grouped_weight", "moe_single_grouped_bias"),
        "each expert is captured by itself",
        _drop("--moe-single-grouped-weight", "--moe-single-grouped-bias"),
    ),
    # Precision.
    Unsupported(
        "FP8 parameters",
        _on("fp8_param_gather", "reuse_grad_buf_for_mxfp8_param_ag"),
        _QUANTIZED,
        _drop("--fp8-param-gather"),
    ),
    Unsupported("FP8 training", _on("fp8"), _QUANTIZED, "use --bf16 without --fp8-format"),
    Unsupported(
        "FP4 training", _on("fp4", "fp4_param_gather"), _QUANTIZED, "use --bf16 without FP4"
    ),
    Unsupported(
        "a per-module precision recipe",
        _on("te_precision_config_file", "kitchen_config_file", "kitchen_recipe_number"),
        _QUANTIZED,
        "drop the recipe and use --bf16",
    ),
    # Optimizer.
    Unsupported(
        "an optimizer other than Adam and SGD",
        _is_not("optimizer", "adam", "sgd"),
        "only state that is kept per element is captured",
        "use --optimizer adam",
    ),
    Unsupported(
        "the layer-wise distributed optimizer",
        _on("use_layer_wise_distributed_optimizer"),
        "its state is spread by layer, not by shard",
        "use --optimizer adam --use-distributed-optimizer",
    ),
    Unsupported(
        "optimizer CPU offload",
        _on("optimizer_cpu_offload"),
        "the offloaded state changes while it would be captured",
        _drop("--optimizer-cpu-offload"),
    ),
    Unsupported(
        "the precision-aware optimizer",
        _on("use_precision_aware_optimizer"),
        "main parameters and moments are not plain FP32 tensors",
        _drop("--use-precision-aware-optimizer"),
    ),
    Unsupported(
        "several distributed-optimizer instances",
        _above(1, "num_distributed_optimizer_instances"),
        "shards are replicated in a way that is not captured yet",
        "set --num-distributed-optimizer-instances 1",
    ),
    Unsupported(
        "--overlap-param-gather-with-optimizer-step",
        _on("overlap_param_gather_with_optimizer_step"),
        "parameters are gathered before the step is complete, so there is no commit point",
        _drop("--overlap-param-gather-with-optimizer-step"),
    ),
    Unsupported(
        "QK clipping", _on("qk_clip"), "it changes weights after the step", _drop("--qk-clip")
    ),
    # Schedule and kernels.
    Unsupported(
        "CUDA graphs",
        lambda args: (
            _is_not("cuda_graph_impl", "none")(args)
            or _on("enable_cuda_graph", "external_cuda_graph", "optimizer_cuda_graph")(args)
        ),
        "a captured graph cannot be stopped, logged or replayed with frozen operators",
        "set --cuda-graph-impl none and drop --optimizer-cuda-graph",
    ),
    Unsupported(
        "multi-token prediction over several pipeline stages",
        _mtp_across_stages,
        "embeddings are shared across stages in a way that is not logged yet",
        "drop --mtp-num-layers or set --pipeline-model-parallel-size 1",
    ),
    Unsupported(
        "--use-ring-exchange-p2p",
        _on("use_ring_exchange_p2p"),
        _OWN_GROUPS,
        _drop("--use-ring-exchange-p2p"),
    ),
    Unsupported(
        "batch-level expert-parallel overlap",
        _on("overlap_moe_expert_parallel_comm"),
        "two microbatches are interleaved inside a stage, which replay cannot repeat yet",
        _drop("--overlap-moe-expert-parallel-comm"),
    ),
    Unsupported(
        "delayed weight gradients",
        _on(
            "delay_wgrad_compute",
            "overlap_dispatch_backward_with_experts_wgrad",
            "defer_embedding_wgrad_compute",
        ),
        _LATE_WGRAD,
        "drop --delay-wgrad-compute, --overlap-dispatch-backward-with-experts-wgrad and "
        "--defer-embedding-wgrad-compute",
    ),
    Unsupported(
        "activation offload",
        lambda args: (
            _on("fine_grained_activation_offloading", "moe_paged_stash")(args)
            or _above(0, "cpu_offloading_num_layers")(args)
        ),
        "its buffers and streams live across iterations and are not reset after an abort",
        "drop --fine-grained-activation-offloading, --cpu-offloading-num-layers and "
        "--moe-paged-stash",
    ),
    Unsupported(
        "--te-rng-tracker",
        _on("te_rng_tracker", "inference_rng_tracker"),
        "its random states are held by another library",
        _drop("--te-rng-tracker", "--inference-rng-tracker"),
    ),
    # Communication outside torch.distributed.
    Unsupported(
        "the flex token dispatcher",
        lambda args: (
            _is("moe_token_dispatcher_type", "flex")(args) or _on("moe_enable_deepep")(args)
        ),
        _OWN_GROUPS,
        "use --moe-token-dispatcher-type alltoall without --moe-enable-deepep",
    ),
    Unsupported(
        "tensor-parallel overlap in userbuffers",
        _on("tp_comm_overlap"),
        _OWN_GROUPS,
        _drop("--tp-comm-overlap"),
    ),
    Unsupported("NCCL user buffers", _on("nccl_ub"), _OWN_GROUPS, _drop("--use-nccl-ub")),
    Unsupported("SHARP", _on("use_sharp"), _OWN_GROUPS, _drop("--use-sharp")),
    Unsupported(
        "symmetric-memory all-reduce",
        _on("symmetric_ar_type"),
        _OWN_GROUPS,
        _drop("--symmetric-ar-type"),
    ),
    Unsupported(
        "UCC for pipeline communication",
        _is("pipeline_model_parallel_comm_backend", "ucc"),
        "aborting its groups in place is not proved",
        "drop --pipeline-model-parallel-comm-backend ucc",
    ),
    Unsupported(
        "context parallelism",
        _above(1, "context_parallel_size"),
        "no recovery with it has been compared bit for bit yet",
        _drop("--context-parallel-size"),
    ),
    Unsupported(
        "hybrid or hierarchical context parallelism",
        _on("hybrid_context_parallel", "hierarchical_context_parallel_sizes"),
        "its groups change from batch to batch or are held by another library",
        _drop("--hybrid-context-parallel", "--hierarchical-context-parallel-sizes"),
    ),
    Unsupported(
        "gradient clipping in a single pipeline stage under the stage cut",
        _clips_in_one_replayed_stage,
        "the norm does not cross stages, so it is not in the log, and a replay would get another",
        "use --moetion-cut shard, more pipeline stages, or --clip-grad 0",
    ),
    Unsupported(
        "fp16 with loss scaling under the stage cut",
        lambda args: _on("fp16")(args) and _by_stage(args),
        "no replay of an overflow has been compared bit for bit yet",
        "use --bf16 or --moetion-cut shard",
    ),
    Unsupported(
        "--lazy-mpu-init",
        _on("lazy_mpu_init"),
        "groups are made too late",
        _drop("--lazy-mpu-init"),
    ),
    Unsupported(
        "--fake-process-group",
        _on("fake_process_group"),
        "nothing is trained on it",
        _drop("--fake-process-group"),
    ),
    # Data and iterations.
    Unsupported(
        "--dataloader-type external",
        _is("dataloader_type", "external"),
        "a replacement cannot place somebody else's iterator at the right sample",
        "use --dataloader-type single or cyclic",
    ),
    Unsupported(
        "a batch size that changes",
        _on("rampup_batch_size", "step_batch_size_schedule", "decrease_batch_size_if_needed"),
        _NEW_BATCHES,
        "set a fixed --global-batch-size",
    ),
    Unsupported(
        "--phase-transition-iterations",
        _on("phase_transition_iterations"),
        _NEW_BATCHES,
        _drop("--phase-transition-iterations"),
    ),
    Unsupported(
        "--iterations-to-skip",
        _on("iterations_to_skip"),
        _NEW_BATCHES,
        _drop("--iterations-to-skip"),
    ),
    Unsupported(
        "saving or loading of logits",
        _on("logits_save_dir", "logits_load_dir"),
        "they enter or leave the last stage beside its logged inbox",
        _drop("--logits-save-dir", "--logits-load-dir"),
    ),
    Unsupported(
        "reinforcement learning",
        _on("perform_rl_step", "moe_enable_routing_replay"),
        "rollouts enter a stage beside its logged inbox",
        "drop --perform-rl-step and --moe-enable-routing-replay",
    ),
    Unsupported(
        "knowledge distillation",
        _on("export_kd_teacher_load", "export_kd_cfg"),
        "the teacher crosses stages beside the logged inbox",
        _drop("--export-kd-teacher-load"),
    ),
    Unsupported(
        "hybrid (state-space) models",
        _on("hybrid_layer_pattern", "hybrid_override_pattern", "is_hybrid_model"),
        _UNPROVED,
        "use a transformer model",
    ),
    Unsupported(
        "experimental attention variants",
        _on("experimental_attention_variant"),
        _UNPROVED,
        _drop("--experimental-attention-variant"),
    ),
    # Others who restart, rerun or reconfigure.
    Unsupported(
        "--inprocess-restart",
        _on("inprocess_restart"),
        _RESTARTS,
        _drop("--inprocess-restart"),
    ),
    Unsupported(
        "--enable-ft-package", _on("enable_ft_package"), _RESTARTS, _drop("--enable-ft-package")
    ),
    Unsupported(
        "asynchronous or node-local checkpoints",
        lambda args: (
            _on("async_save", "use_persistent_ckpt_worker", "replication")(args)
            or _is("non_persistent_ckpt_type", "local")(args)
        ),
        "their workers hold on to process groups that a recovery replaces",
        "drop --async-save, --use-persistent-ckpt-worker and --non-persistent-ckpt-type local",
    ),
    Unsupported(
        "checkpoints of a structure that is known beforehand",
        _on("ckpt_assume_constant_structure"),
        "a replacement has not seen the checkpoint that the others go by",
        _drop("--ckpt-assume-constant-structure"),
    ),
    Unsupported(
        "checkpoints in object storage",
        lambda args: str(_get(args, "save") or "").startswith("msc://"),
        "one that is half written could not be taken away",
        "give --save a folder",
    ),
    Unsupported(
        "several or whole validation sets",
        _on("full_validation", "multiple_validation_sets"),
        "a replacement cannot place their iterators at the right sample",
        _drop("--full-validation", "--multiple-validation-sets"),
    ),
    Unsupported(
        "--rerun-mode report_stats",
        _is("rerun_mode", "report_stats"),
        "every iteration runs several times, which the log does not tell apart",
        "use --rerun-mode validate_results or disabled",
    ),
    Unsupported(
        "result error injection",
        _above(0, "error_injection_rate"),
        "iterations are rerun at random",
        _drop("--error-injection-rate"),
    ),
    Unsupported(
        "--gpu-sniff-test-interval",
        _on("gpu_sniff_test_interval"),
        "it runs its own communication between iterations",
        _drop("--gpu-sniff-test-interval"),
    ),
    Unsupported(
        "--yaml-cfg",
        _on("yaml_cfg"),
        "its arguments have other names, so nothing in this table could be checked",
        "give the arguments on the command line",
        digest=True,
    ),
)
