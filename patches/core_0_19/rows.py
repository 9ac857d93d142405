"""The rows of moment 2."""

from megatron_moetion.interception import Patch

from . import interludes
from . import training as t

ROWS: tuple[Patch, ...] = (
    Patch(
        target="torch.distributed:init_process_group",
        how="around",
        handler=t.init_process_group,
        signature=(
            "(backend=..., init_method=..., timeout=..., world_size=..., rank=..., store=..., "
            "group_name=..., pg_options=..., device_id=..., _ranks=...)"
        ),
        digest="b26b016e14cc",
        stage="recovery",
        why="a replacement sets itself up alone; a new epoch starts from the same options",
        retire_when="torch offers re-initialisation in place",
    ),
    Patch(
        target="torch.distributed:new_group",
        how="around",
        handler=t.new_group,
        signature=(
            "(ranks=..., timeout=..., backend=..., pg_options=..., use_local_synchronization=..., "
            "group_desc=..., device_id=..., sort_ranks=...)"
        ),
        digest="8c5521f14690",
        stage="recovery",
        why="groups are made again in creation order after a failure",
        retire_when="torch offers re-initialisation in place",
    ),
    Patch(
        target="torch.distributed.distributed_c10d:Work.wait",
        how="around",
        handler=t.work_wait,
        signature="",
        stage="recovery",
        why="gloo never wakes who waits for a transfer that was under way when its peer died",
        retire_when="gloo tells every waiter of a connection that it has ended",
    ),
    Patch(
        target="torch.distributed:all_reduce",
        how="around",
        handler=t.collective("all_reduce"),
        signature="(tensor, op=..., group=..., async_op=...)",
        digest="b5bedbdd93be",
        stage="inbox",
        why="results of collectives that cross stages are part of a stage's inbox",
        retire_when="Megatron routes them through one seam",
    ),
    Patch(
        target="torch.distributed:broadcast",
        how="around",
        handler=t.collective("broadcast"),
        signature="(tensor, src=..., group=..., async_op=..., group_src=...)",
        digest="c79ee91459c9",
        stage="inbox",
        why="results of collectives that cross stages are part of a stage's inbox",
        retire_when="Megatron routes them through one seam",
    ),
    Patch(
        target="torch.distributed:reduce",
        how="around",
        handler=t.collective("reduce"),
        signature="(tensor, dst=..., op=..., group=..., async_op=..., group_dst=...)",
        digest="944c46641975",
        stage="inbox",
        why="results of collectives that cross stages are part of a stage's inbox",
        retire_when="Megatron routes them through one seam",
    ),
    Patch(
        target="torch.distributed:barrier",
        how="around",
        handler=t.collective("barrier"),
        signature="(group=..., async_op=..., device_ids=..., timeout=...)",
        digest="ee0f09f31d27",
        stage="inbox",
        why="results of collectives that cross stages are part of a stage's inbox",
        retire_when="Megatron routes them through one seam",
    ),
    Patch(
        target="torch.distributed:all_gather",
        how="around",
        handler=t.collective("all_gather"),
        signature="(tensor_list, tensor, group=..., async_op=...)",
        digest="42f0fb24f8e8",
        stage="inbox",
        why="results of collectives that cross stages are part of a stage's inbox",
        retire_when="Megatron routes them through one seam",
    ),
    Patch(
        target="torch.distributed:all_gather_object",
        how="around",
        handler=t.collective("all_gather_object"),
        signature="(object_list, obj, group=...)",
        digest="df42d97f87f9",
        stage="inbox",
        why="results of collectives that cross stages are part of a stage's inbox",
        retire_when="Megatron routes them through one seam",
    ),
    Patch(
        target="torch.distributed:broadcast_object_list",
        how="around",
        handler=t.collective("broadcast_object_list"),
        signature="(object_list, src=..., group=..., device=..., group_src=...)",
        digest="8dded8659019",
        stage="inbox",
        why="results of collectives that cross stages are part of a stage's inbox",
        retire_when="Megatron routes them through one seam",
    ),
    Patch(
        target="torch.distributed:gather",
        how="around",
        handler=t.collective("gather"),
        signature="(tensor, gather_list=..., dst=..., group=..., async_op=..., group_dst=...)",
        digest="202e67c83ef0",
        stage="inbox",
        why="results of collectives that cross stages are part of a stage's inbox",
        retire_when="Megatron routes them through one seam",
    ),
    Patch(
        target="torch.distributed:scatter",
        how="around",
        handler=t.collective("scatter"),
        signature="(tensor, scatter_list=..., src=..., group=..., async_op=..., group_src=...)",
        digest="e90f28380ffc",
        stage="inbox",
        why="results of collectives that cross stages are part of a stage's inbox",
        retire_when="Megatron routes them through one seam",
    ),
    Patch(
        target="torch.distributed:all_to_all",
        how="around",
        handler=t.collective("all_to_all"),
        signature="(output_tensor_list, input_tensor_list, group=..., async_op=...)",
        digest="0dde81dc2576",
        stage="inbox",
        why="results of collectives that cross stages are part of a stage's inbox",
        retire_when="Megatron routes them through one seam",
    ),
    Patch(
        target="megatron.core.timers:dist_all_gather_func",
        how="around",
        handler=t.collective("all_gather_into_tensor"),
        signature="(output_tensor, input_tensor, group=..., async_op=...)",
        digest="f6341959287e",
        stage="inbox",
        why=(
            "timers are gathered over the world after the step; the other places gather inside a "
            "stage"
        ),
        retire_when="Megatron routes them through one seam",
        also=(
            "megatron.core.utils:dist_all_gather_func!",
            "megatron.core.tensor_parallel.utils:dist_all_gather_func!",
            "megatron.core.tensor_parallel.mappings:dist_all_gather_func!",
            "megatron.core.tensor_parallel.layers:dist_all_gather_func!",
            "megatron.core.distributed.param_and_grad_buffer:dist_all_gather_func!",
            "megatron.core.transformer.multi_token_prediction:dist_all_gather_func!",
        ),
    ),
    Patch(
        target="megatron.core.pipeline_parallel.p2p_communication:P2PCommunicator._communicate",
        how="around",
        handler=t.communicate,
        signature=(
            "(self, *, tensor_send_next, tensor_send_prev, recv_prev, recv_next, tensor_shape, "
            "wait_on_reqs=...)"
        ),
        digest="fb65b4877f57",
        stage="inbox",
        why="everything between stages passes here, for plain and interleaved 1F1B alike",
        retire_when="Megatron offers a communicator hook",
    ),
    Patch(
        target="megatron.core.rerun_state_machine:RerunDataIterator.__next__",
        how="around",
        handler=t.next_batch,
        signature="(self)",
        digest="0f00b292c9b8",
        stage="inbox",
        why="batches are part of a stage's inbox",
        retire_when="Megatron logs batches",
    ),
    Patch(
        target="megatron.core.rerun_state_machine:RerunStateMachine.validate_result",
        how="around",
        handler=t.validate_result,
        signature=(
            "(self, result, rejection_func, message, comparison_func=..., tolerance=..., fatal=...)"
        ),
        digest="48120a1d94e8",
        stage="recovery",
        why="a NaN right behind a rebuild says that what it was rebuilt from is not to be trusted",
        retire_when="Megatron tells who rejects a result before it acts on it",
    ),
    Patch(
        target="megatron.core.pipeline_parallel.schedules:forward_step",
        how="around",
        handler=t.counted("forward"),
        signature=(
            "(forward_step_func, data_iterator, model, num_microbatches, input_tensor, "
            "forward_data_store, config, cp_group_size, collect_non_loss_data=..., "
            "checkpoint_activations_microbatch=..., is_first_microbatch=..., "
            "current_microbatch=..., vp_stage=..., is_last_stage=...)"
        ),
        digest="24c526af4445",
        stage="faults",
        why="a place for scripted faults",
        retire_when="never",
    ),
    Patch(
        target="megatron.core.pipeline_parallel.schedules:backward_step",
        how="around",
        handler=t.counted("backward"),
        signature="(input_tensor, output_tensor, output_tensor_grad, config)",
        digest="435628e2479e",
        stage="faults",
        why="a place for scripted faults",
        retire_when="never",
    ),
    Patch(
        target="megatron.core.distributed.distributed_data_parallel:DistributedDataParallel.finish_grad_sync",
        how="around",
        handler=t.passed("grad-sync"),
        signature="(self, force_all_reduce=...)",
        digest="9d8b390c8019",
        stage="faults",
        why="a place for scripted faults",
        retire_when="never",
    ),
    Patch(
        target="megatron.core.distributed.param_and_grad_buffer:_ParamAndGradBucketGroup.start_param_sync",
        how="around",
        handler=t.param_gather,
        signature="(self, force_sync=...)",
        digest="277b3a9c5190",
        stage="recovery",
        why="under the shard cut a rank finishes its update without peers; a place for faults",
        retire_when="never",
    ),
    Patch(
        target="megatron.core.optimizer.optimizer:ChainedOptimizer.step",
        how="around",
        handler=t.optimizer_step,
        signature="(self)",
        digest="677190157ebd",
        stage="snapshot",
        why="frames are captured right after the outermost step",
        retire_when="Megatron offers a post-step hook",
    ),
    Patch(
        target="megatron.core.optimizer.optimizer:MixedPrecisionOptimizer.step",
        how="around",
        handler=t.optimizer_step,
        signature="(self)",
        digest="6c43245d12f3",
        stage="snapshot",
        why="frames are captured right after the outermost step",
        retire_when="Megatron offers a post-step hook",
    ),
    Patch(
        target="megatron.core.transformer.moe.router:TopKRouter.routing",
        how="around",
        handler=t.routing,
        signature="(self, logits, padding_mask=...)",
        digest="064bc38e4dc6",
        stage="schedule",
        why="how many tokens each expert gets decides in which order experts are captured",
        retire_when="Megatron counts tokens for each expert in every configuration",
    ),
    Patch(
        target="megatron.core.optimizer.optimizer:FP32Optimizer.step",
        how="around",
        handler=t.optimizer_step,
        signature="(self)",
        digest="4eb0a24a74cf",
        stage="snapshot",
        why="frames are captured right after the outermost step",
        retire_when="Megatron offers a post-step hook",
    ),
    Patch(
        target="megatron.core.optimizer.optimizer:ChainedOptimizer.step_with_ready_grads",
        how="around",
        handler=t.step_with_ready_grads,
        signature="(self)",
        digest="689b9abfbebb",
        stage="recovery",
        why="the commit point: gradients are final, no parameter has changed",
        retire_when="Megatron offers a pre-step hook",
    ),
    Patch(
        target="megatron.core.optimizer.optimizer:MixedPrecisionOptimizer.step_with_ready_grads",
        how="around",
        handler=t.step_with_ready_grads,
        signature="(self)",
        digest="ecd7b034b8df",
        stage="recovery",
        why="the commit point: gradients are final, no parameter has changed",
        retire_when="Megatron offers a pre-step hook",
    ),
    Patch(
        target="megatron.core.optimizer.optimizer:FP32Optimizer.step_with_ready_grads",
        how="around",
        handler=t.step_with_ready_grads,
        signature="(self)",
        digest="bbb3bfede92d",
        stage="recovery",
        why="the commit point: gradients are final, no parameter has changed",
        retire_when="Megatron offers a pre-step hook",
    ),
    Patch(
        target="megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.step_with_ready_grads",
        how="around",
        handler=t.step_with_ready_grads,
        signature="(self)",
        digest="77837ba46371",
        stage="recovery",
        why="the commit point: gradients are final, no parameter has changed",
        retire_when="Megatron offers a pre-step hook",
    ),
    Patch(
        target="megatron.training.training:setup_model_and_optimizer",
        how="around",
        handler=t.setup_model_and_optimizer,
        signature=(
            "(model_type, model_provider_func=..., checkpointing_context=..., *, "
            "cfg_container=..., pg_collection=...)"
        ),
        digest="3d67da87effa",
        stage="recovery",
        why="a replacement takes over counters before data iterators are built",
        retire_when="Megatron offers a load hook",
    ),
    Patch(
        target="megatron.training.training:build_train_valid_test_data_iterators",
        how="around",
        handler=t.build_data_iterators,
        signature="(build_train_valid_test_datasets_provider)",
        digest="d12ed278f953",
        stage="recovery",
        why="batches that were lost with a node are drawn again, from an older sample on",
        retire_when="Megatron can place a data iterator at any sample",
    ),
    Patch(
        target="megatron.training.training:train_step",
        how="around",
        handler=t.train_step,
        signature=(
            "(forward_step_func, data_iterator, model, optimizer, opt_param_scheduler, config, "
            "forward_backward_func, iteration=..., pg_collection=..., p2p_communicator=...)"
        ),
        digest="68989d425b23",
        stage="snapshot",
        why="one iteration: where protection begins and where a failure is recovered from",
        retire_when="Megatron offers iteration hooks",
    ),
    Patch(
        target="megatron.training.training:training_log",
        how="around",
        handler=t.training_log,
        signature=(
            "(loss_dict, total_loss_dict, learning_rate, iteration, loss_scale, "
            "report_memory_flag, skipped_iter, grad_norm, params_norm, num_zeros_in_grad, "
            "max_attention_logit, pg_collection=..., is_first_iteration=..., "
            "seqlen_squared_sum_in_batch=..., total_real_tokens_in_batch=...)"
        ),
        digest="5e34a182d566",
        stage="recovery",
        why="running sums of the log line belong to the state of the loop",
        retire_when="Megatron keeps them in an object",
    ),
    Patch(
        target="megatron.training.training:checkpoint_and_decide_exit",
        how="around",
        handler=t.checkpoint_and_decide_exit,
        signature=(
            "(model, optimizer, opt_param_scheduler, iteration, "
            "num_floating_point_operations_so_far, checkpointing_context, train_data_iterator)"
        ),
        digest="a581d0350f89",
        stage="recovery",
        why="the operation count belongs to the state of the loop",
        retire_when="Megatron keeps it in an object",
    ),
    Patch(
        target="megatron.training.training:evaluate_and_print_results",
        how="around",
        handler=interludes.evaluation,
        signature=(
            "(prefix, forward_step_func, data_iterator, model, iteration, "
            "process_non_loss_data_func, config, verbose=..., write_to_tensorboard=..., "
            "non_loss_data_func=..., pg_collection=..., p2p_communicator=...)"
        ),
        digest="699dfbe69cf2",
        stage="recovery",
        why="evaluation is repeated as a whole when a peer is lost in it",
        retire_when="Megatron can repeat an evaluation",
    ),
    Patch(
        target="megatron.training.training:disable_forward_pre_hook",
        how="around",
        handler=interludes.parameter_sync,
        signature="(model_chunks, optimizer=..., param_sync=...)",
        digest="4defb19dbfd5",
        stage="recovery",
        why="parameters are gathered before an evaluation, inside a stage and outside its steps",
        retire_when="Megatron gathers them inside the evaluation",
    ),
    Patch(
        target="megatron.training.training:save_checkpoint_and_time",
        how="around",
        handler=interludes.saving,
        signature=(
            "(iteration, model, optimizer, opt_param_scheduler, "
            "num_floating_point_operations_so_far, checkpointing_context, non_persistent_ckpt=..., "
            "train_data_iterator=...)"
        ),
        digest="f72b7873e170",
        stage="recovery",
        why="a checkpoint is written again as a whole when a peer is lost in it",
        retire_when="Megatron can repeat a save",
    ),
    Patch(
        target="megatron.training.training:train_step",
        how="around",
        handler=t.digest_step,
        signature=(
            "(forward_step_func, data_iterator, model, optimizer, opt_param_scheduler, config, "
            "forward_backward_func, iteration=..., pg_collection=..., p2p_communicator=...)"
        ),
        digest="68989d425b23",
        stage="digest",
        group="digest",
        why="hashes of the state after an iteration",
        retire_when="Megatron offers iteration hooks",
    ),
    Patch(
        target="megatron.training.ft_integration:shutdown",
        how="around",
        handler=t.finished,
        signature="()",
        digest="e301bbca8b29",
        stage="recovery",
        why="the agent is told that the exit which follows is no failure",
        retire_when="Megatron offers an exit hook",
    ),
)
