"""Where accelerate's own test scripts are edited before they run on nbaccel, each edit with its reason.

Their imports are replaced as a user would; what stands here is everything else. docs/migration.md tells users.
"""

from __future__ import annotations

from dataclasses import dataclass

SCHEDULER = (
    "a scheduler steps once per optimizer step; with scheduler_steps='per_rank' as many times as ranks"
)
TAIL = "the last, shorter window of an epoch is divided by its own number of micro-steps"
COUNTING = "no sample is given to a rank twice to even things out, and what is repeated counts for nothing"
ORDER = "the order of a shuffled loader is that of (seed, epoch), not of its generator's draws, so it can be resumed"
NO_SHARED_STATE = "there is no state shared between objects, which could be reset under an Accelerator's feet"
OWN_LOADER = (
    "a prepared loader divides by itself: no sampler objects stand between, iterables are filled up too"
)
NOT_PICKLED = "an Accelerator holds a process group and a loop in progress, which cannot be pickled"
HOOKS = "gradients are compressed by one hook, without a wrapper around it, and PowerSGD is not batched"
NO_DEVICE = "no difference: what the script keeps for devices is done on the CPU"

NOT_RUN = {
    "test_merge_weights": "merges the files of FSDP's first version with accelerate's own functions; here any "
    "strategy's checkpoint is merged by `nbaccel merge` (tests/core/test_merge.py)",
    "test_notebook": "of accelerate's launcher, not of its Accelerator: it passes a queue to the forked ranks and "
    "expects torchelastic's error (our launcher: tests/notebook, tests/session)",
    "external_deps/test_ds_alst_ulysses_sp": "DeepSpeed's sequence parallelism does not exist here",
    "external_deps/test_ds_multiple_model": "reads DeepSpeed configurations that the wheel does not hold, and needs "
    "several plugins in one Accelerator, which has one strategy here",
    "external_deps/test_peak_memory_usage": "reads the counters of a GPU's memory",
    "external_deps/test_pippy": "does nothing without GPUs: 'Less than two GPUs found, not running tests!'",
    "external_deps/test_zero3_integration": "starts NCCL, which needs GPUs",
}
"""Scripts that are not run, each with its reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """`old` of the script becomes `new`."""

    script: str
    reason: str
    old: str
    new: str


DIFFERENCES = [
    Difference(
        script="test_script",
        reason=ORDER,
        old="batch_size=batch_size, shuffle=True, generator=generator)",
        new="batch_size=batch_size, shuffle=False)",
    ),
    Difference(
        script="test_script",
        reason=COUNTING,  # two rows on four ranks
        old="expected = torch.tensor([[4, 5, 6, 7]]).to(state.device)",
        new="expected = torch.tensor([[4, 5, 6, 7]])[: int(state.process_index == 1)].to(state.device)",
    ),
    Difference(
        script="test_script",
        reason=OWN_LOADER,
        old="    if state.num_processes > 1:\n        check_seedable_sampler_in_batch_sampler_shard()\n",
        new="",
    ),
    Difference(
        script="test_script",
        reason=NO_SHARED_STATE,
        old="        test_reinstantiated_state()\n",
        new="        pass\n",
    ),
    Difference(
        script="test_sync",
        reason=TAIL,
        old="        loss /= accelerator.gradient_accumulation_steps\n",
        new="        state, steps = accelerator.gradient_state, accelerator.gradient_accumulation_steps\n"
        "        rest = len(state.active_dataloader) % steps\n"
        "        loss /= rest if state.end_of_dataloader and rest else steps\n",
    ),
    Difference(
        script="test_metrics",
        reason=NO_DEVICE,
        old='accelerator.device.type != "cpu" and not',
        new="not",
    ),
    Difference(
        script="test_ddp_comm_hook",
        reason=NO_DEVICE,
        old="        device_ids=[accelerator.local_process_index],\n"
        "        output_device=accelerator.local_process_index,\n",
        new="",
    ),
    Difference(
        script="test_ddp_comm_hook",
        reason=HOOKS,
        old="        (DDPCommunicationHookType.POWER_SGD, DDPCommunicationHookType.FP16, {}),\n"
        "        (DDPCommunicationHookType.POWER_SGD, DDPCommunicationHookType.BF16, {}),\n",
        new="",
    ),
    Difference(
        script="test_ddp_comm_hook",
        reason=HOOKS,
        old="        (DDPCommunicationHookType.BATCHED_POWER_SGD, DDPCommunicationHookType.NO, {}),\n"
        "        (DDPCommunicationHookType.BATCHED_POWER_SGD, DDPCommunicationHookType.FP16, {}),\n"
        "        (DDPCommunicationHookType.BATCHED_POWER_SGD, DDPCommunicationHookType.BF16, {}),\n",
        new="",
    ),
    Difference(
        script="test_distributed_data_loop",
        reason=COUNTING,  # three samples one by one on two ranks: the filler counts as no sample
        old="process_1_expected_batch_sizes=[1],",
        new="process_1_expected_batch_sizes=[1, 1],",
    ),
    Difference(
        script="test_distributed_data_loop",
        reason=COUNTING,
        old="assert batch_idxs == [0]\n",
        new="assert batch_idxs == [0, 1]\n",
    ),
    Difference(
        script="test_distributed_data_loop",
        reason=OWN_LOADER,
        old=".batch_sampler.even_batches",
        new=".even_batches",
    ),
    Difference(
        script="test_distributed_data_loop",
        reason=OWN_LOADER,
        old="    test_join_raises_warning_for_iterable_when_overriding_even_batches()\n",
        new="",
    ),
    Difference(
        script="test_distributed_data_loop",
        reason=NO_SHARED_STATE,  # the script tells the state that the ranks are another kind
        old="    accelerator.state.distributed_type = DistributedType.FSDP\n"
        "    test_join_raises_warning_for_non_ddp_distributed(accelerator)\n"
        "    accelerator.state.distributed_type = original_state\n",
        new="",
    ),
    Difference(
        script="test_distributed_data_loop",
        reason=NOT_PICKLED,
        old="    test_pickle_accelerator()\n",
        new="",
    ),
]
