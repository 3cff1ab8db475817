"""accelerate's arguments and names on one process: what becomes of them, and what is refused."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import nbaccel.compat.accelerate as compat
from nbaccel.compat.accelerate import names
from nbaccel.compat.accelerate.local_sgd import LocalSGD
from nbaccel.errors import ConfigError
from nbaccel.fp8 import FP8Options
from nbaccel.parallel import FSDP, ContextParallel, DeepSpeed, TensorParallel


def accelerator(**options):
    return compat.Accelerator(cpu=True, **options)


@pytest.mark.parametrize("name", sorted(names.HOMES))
def test_name_when_taken_from_either_module(name):
    assert getattr(compat, name) is getattr(compat.utils, name)
    assert callable(getattr(compat, name)) or name.startswith("SAFE_")


def test_unknown_name_when_asked_for_says_what_there_is():
    with pytest.raises(AttributeError, match="PartialState"):
        _ = compat.PartialStates
    assert compat.is_torch_available()
    assert not compat.utils.is_a_package_nobody_has_available()


def test_arguments_when_given_as_accelerates_objects():
    made = accelerator(
        mixed_precision=compat.PrecisionType.FP16,
        gradient_accumulation_plugin=compat.GradientAccumulationPlugin(num_steps=3),
        dataloader_config=compat.DataLoaderConfiguration(even_batches=False, data_seed=5),
        project_config=compat.ProjectConfiguration(project_dir="out", total_limit=2),
        kwargs_handlers=[
            compat.DistributedDataParallelKwargs(bucket_cap_mb=50, comm_hook="bf16"),
            compat.GradScalerKwargs(init_scale=8.0),
            compat.InitProcessGroupKwargs(timeout=timedelta(hours=1)),
        ],
        dynamo_backend="inductor",
        scheduler_steps="per_rank",
    )
    config = made.config
    assert (config.mixed_precision, config.gradient_accumulation_steps) == ("fp16", 3)
    assert (config.project_dir, config.keep, config.compile) == ("out", 2, True)
    assert config.scheduler_steps == "per_rank"
    assert (made.even_batches, made.logging_dir, made.project_dir) == (False, "out", "out")
    assert made.prepare(DataLoader(TensorDataset(torch.arange(4)))).seed == 5


def test_plugins_when_given_become_strategies():
    sharded = compat.FullyShardedDataParallelPlugin(
        sharding_strategy="SHARD_GRAD_OP", transformer_cls_names_to_wrap=["Block"], cpu_offload=True
    )
    assert sharded.strategy() == FSDP(sharding="shard_grad_op", wrap=["Block"], cpu_offload=True)
    assert compat.DeepSpeedPlugin(zero_stage=3, offload_param_device="cpu").strategy() == DeepSpeed(
        stage=3, offload_param="cpu"
    )
    assert compat.TorchTensorParallelPlugin(tp_size=2).strategy() == TensorParallel(size=2)
    asked = accelerator(deepspeed_plugin=compat.DeepSpeedPlugin(gradient_accumulation_steps=4)).config
    assert (asked.strategy, asked.gradient_accumulation_steps) == ("deepspeed", 4)


def test_sizes_of_parallelism_when_given_become_strategies():
    config = compat.ParallelismConfig
    assert config().strategy() is config(dp_replicate_size=4).strategy() is None
    assert config(tp_size=2).strategy() == TensorParallel(size=2)
    assert config(dp_shard_size=4).strategy() == FSDP()
    assert config(dp_replicate_size=2, dp_shard_size=2, cp_size=2).strategy() == FSDP(
        sharding="hybrid_shard", shard_size=4, context_parallel=ContextParallel(size=2)
    )
    wrapped = FSDP(wrap=["Block"], cpu_offload=True)
    assert config(dp_shard_size=2, tp_size=2).strategy(wrapped) == FSDP(
        wrap=["Block"], cpu_offload=True, tensor_parallel=TensorParallel(size=2)
    )
    made = accelerator(parallelism_config=config())
    assert (made.parallelism_config.total_size, made.should_save_model, made.deepspeed_plugin) == (
        1,
        True,
        None,
    )
    assert made.is_composable_parallelism_enabled is made.is_fsdp2 is False


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: compat.ParallelismConfig(sp_size=2), "cp_size cuts sequences"),
        (lambda: compat.ParallelismConfig(tp_size=0), "at least 1"),
        (lambda: compat.ParallelismConfig(tp_handler=object()), "tp_handler cannot be honoured"),
        (
            lambda: compat.ParallelismConfig(dp_shard_size=2).strategy(DeepSpeed()),
            "go together with DeepSpeed",
        ),
        (lambda: compat.ParallelismConfig(dp_replicate_size=2).check(3), "2 ranks .* and there are 3"),
        (lambda: compat.utils.DummyOptim([]), "make the optimizer in the script"),
        (lambda: compat.utils.DummyScheduler(None), "make the scheduler in the script"),
    ],
)
def test_object_when_it_has_no_counterpart_is_refused(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gradient_accumulation_plugin": compat.GradientAccumulationPlugin(sync_each_batch=True)}, "once"),
        ({"gradient_accumulation_plugin": compat.GradientAccumulationPlugin(sync_with_dataloader=False)}, "epoch"),
        ({"project_config": compat.ProjectConfiguration(save_on_each_node=True)}, "one folder"),
        ({"kwargs_handlers": [object()]}, "cannot be honoured"),
        ({"kwargs_handlers": [compat.GradScalerKwargs(enabled=False)]}, "scaler"),
        ({"dynamo_backend": "eager"}, "inductor"),
        (
            {
                "fsdp_plugin": compat.FullyShardedDataParallelPlugin(),
                "torch_tp_plugin": compat.TorchTensorParallelPlugin(),
            },
            "cannot go together",
        ),
        ({"gradient_accumulation_steps": 2, "deepspeed_plugin": compat.DeepSpeedPlugin(
            gradient_accumulation_steps=4
        )}, "asked twice"),
        ({"megatron_lm_plugin": object()}, "megatron"),
        ({"no_such_argument": 1}, "no_such_argument"),
    ],
)  # fmt: skip
def test_argument_when_it_cannot_be_honoured_is_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        accelerator(**options)


def test_fp8_recipes_when_given_become_options():
    assert compat.AORecipeKwargs().options() == compat.FP8RecipeKwargs(backend="ao").options() == FP8Options()
    assert compat.TERecipeKwargs().options().backend == "transformer_engine"
    with pytest.raises(ConfigError, match="margin"):
        accelerator(mixed_precision="fp8", kwargs_handlers=[compat.TERecipeKwargs(margin=1)])
    with pytest.raises(ConfigError, match="MSAMP"):
        compat.FP8RecipeKwargs(backend="MSAMP").options()


def test_attribute_when_it_cannot_be_set_is_refused():
    made = accelerator()
    with pytest.raises(AttributeError):
        made.gradient_accumulation_steps = 4
    assert made.gradient_accumulation_steps == 1


def test_states_when_there_is_an_accelerator_tell_of_the_newest():
    made = accelerator(mixed_precision="fp16", gradient_accumulation_steps=2)
    assert compat.AcceleratorState().mixed_precision == made.state.mixed_precision == "fp16"
    assert compat.GradientState().num_steps == 2
    assert compat.PartialState().distributed_type == compat.DistributedType.NO == "NO"
    loader = made.prepare(DataLoader(TensorDataset(torch.arange(4.0)), batch_size=2))
    ends = [(compat.GradientState().end_of_dataloader, made.gradient_state.active_dataloader) for _ in loader]
    assert ends == [(False, loader), (True, loader)]
    assert made.gradient_state.active_dataloader is None


class Stream(IterableDataset):
    def __iter__(self):
        yield from range(5)


def test_loaders_when_prepared_are_arranged_as_scripts_expect():
    made = accelerator()
    assert made._loader_options(iterable=True) == {
        "dispatch": True, "even_batches": True, "shard": "contiguous", "split_batches": False
    }  # fmt: skip
    assert made._loader_options(iterable=False)["dispatch"] is False
    loader = made.prepare(DataLoader(Stream(), batch_size=2))
    with pytest.warns(UserWarning, match="read and dropped"):
        later = made.skip_first_batches(loader, 1)
    assert [batch.tolist() for batch in later] == [[2, 3], [4, 4]]


def test_checkpoints_when_named_automatically_lie_in_the_project(tmp_path):
    project = compat.ProjectConfiguration(
        project_dir=str(tmp_path), automatic_checkpoint_naming=True, total_limit=1
    )
    made = accelerator(project_config=project)
    model = made.prepare(torch.nn.Linear(1, 1))
    made.save_state()
    made.unwrap_model(model).weight.data.fill_(7.0)
    last = made.save_state("ignored")
    assert [str(path) for path in tmp_path.iterdir()] == [last]
    model.weight.data.fill_(0.0)
    made.load_state()
    assert model.weight.item() == 7.0
    assert made.save_iteration == 2


def test_tracker_when_it_is_the_scripts_own():
    class Kept(compat.GeneralTracker):
        name = "kept"

        def __init__(self):
            super().__init__()
            self.seen = []

        @property
        def tracker(self):
            return self.seen

        @compat.on_main_process
        def start(self):
            self.seen.append("start")

        @compat.on_main_process
        def store_init_configuration(self, values):
            self.seen.append(values)

        @compat.on_main_process
        def log(self, values, step=None, **kwargs):
            self.seen.append((values, step))

    made = accelerator(log_with=[Kept()])
    made.init_trackers("project", config={"lr": 0.1})
    made.log({"loss": 2.0}, step=3)
    assert made.get_tracker("kept", unwrap=True) == ["start", {"lr": 0.1}, ({"loss": 2.0}, 3)]
    made.end_training()


def test_operations_when_on_nested_structures():
    data = {"a": torch.ones(2, 3), "b": [torch.zeros(2, dtype=torch.bfloat16), "text"]}
    assert compat.utils.find_batch_size(data) == 2
    assert compat.utils.slice_tensors(data, slice(1))["a"].shape == (1, 3)
    assert compat.utils.concatenate([[data["a"]], [data["a"]]])[0].shape == (4, 3)
    assert compat.utils.convert_to_fp32(data)["b"][0].dtype == torch.float32
    moved = compat.utils.send_to_device(data, "meta", skip_keys="b")
    assert (moved["a"].device.type, moved["b"][0].device.type) == ("meta", "cpu")
    assert compat.utils.gather_object([1]) == [1]
    with pytest.raises(TypeError, match="str"):
        compat.utils.recursively_apply(torch.neg, data, error_on_other_type=True)


def test_module_when_scripts_take_names_from_it_has_them():
    from nbaccel.compat.accelerate import big_modeling, local_sgd, parallelism_config
    from nbaccel.compat.accelerate.utils import constants, deepspeed, memory

    homes = (big_modeling, local_sgd, parallelism_config, constants, deepspeed, memory)
    assert all(getattr(home, name) is not None for home in homes for name in home.__all__)


def test_local_sgd_when_given_this_accelerator_trains():
    made = accelerator()
    model, optimizer = made.prepare(
        model := torch.nn.Linear(1, 1), torch.optim.SGD(model.parameters(), lr=0.1)
    )
    with LocalSGD(accelerator=made, model=model, local_sgd_steps=2) as local_sgd:
        made.backward(model(torch.ones(1, 1)).sum())
        optimizer.step()
        local_sgd.step()
    assert made.steps == 1
