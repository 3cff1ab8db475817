"""accelerate's arguments and names on one process: what becomes of them, and what is refused."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import pkgutil
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import nbaccel.compat.accelerate as compat
from nbaccel.compat.accelerate import names
from nbaccel.compat.accelerate.local_sgd import LocalSGD
from nbaccel.compat.accelerate.refused import REFUSED
from nbaccel.core.loop.wrappers import PreparedOptimizer, PreparedScheduler
from nbaccel.errors import ConfigError
from nbaccel.fp8 import FP8Options
from nbaccel.parallel import FSDP, ContextParallel, DeepSpeed, TensorParallel


def accelerator(**options):
    return compat.Accelerator(cpu=True, **options)


@pytest.mark.parametrize("name", sorted(names.HOMES))
def test_name_when_taken_from_either_module(name):
    assert getattr(compat, name) is getattr(compat.utils, name)
    assert callable(getattr(compat, name)) or name.isupper() or name == "KwargsHandler"


def test_name_when_several_modules_have_it_is_the_same_in_all():
    for module in pkgutil.walk_packages(compat.__path__, f"{compat.__name__}."):
        home = importlib.import_module(module.name)
        listed = names.HOMES.keys() & set(getattr(home, "__all__", ()))
        assert [name for name in listed if getattr(home, name) is not getattr(compat, name)] == [], home


def test_unknown_name_when_asked_for_says_what_there_is():
    with pytest.raises(AttributeError, match="PartialState"):
        _ = compat.PartialStates
    assert compat.is_torch_available()
    assert not compat.utils.is_a_package_nobody_has_available()
    assert not hasattr(compat, "PartialStates")
    assert not hasattr(compat, "no.such.name")
    assert getattr(compat.utils, "prepare_pippy", None) is None


@pytest.mark.parametrize(
    ("module", "name", "words"),
    [
        ("", "PartialStates", "did you mean 'PartialState'"),
        ("", "no_such_name", "docs/migration.md lists"),
        ("", "prepare_pippy", r"Pipeline\(\.\.\.\)"),
        (".utils", "MegatronLMPlugin", "Megatron"),
        (".utils", "no_such_name", "docs/migration.md lists"),
        (".inference", "prepare_pippy", r"Pipeline\(\.\.\.\)"),
        (".hooks", "AlignDevicesHook", "register_forward_pre_hook"),
        (".tracking", "WandBTracker", "get_tracker"),
        (".utils.dataclasses", "BnbQuantizationConfig", "quantise"),
        (".utils.imports", "no_such_name", "docs/migration.md lists"),
        (".utils.environment", "parse_flag_from_env", "read os.environ"),
        (".checkpointing", "save_accelerator_state", "accelerator.save_state"),
    ],
)
def test_missing_name_when_imported_says_what_to_do(module, name, words):
    statement = f"from nbaccel.compat.accelerate{module} import {name}"
    with pytest.raises(ImportError, match=words):
        exec(statement)
    many = "\n".join(f"n{i} = {i}" for i in range(300))  # names past the 255th need a longer instruction
    with pytest.raises(ImportError, match=words):
        exec(f"{many}\n{statement}", {})


def test_package_when_imported_without_from_finds_its_modules():
    code = (
        "import nbaccel.compat.accelerate as accelerate\n"
        "import importlib\n"
        "print(accelerate.__version__)\n"
        "for name in 'state logging tracking local_sgd launchers hooks inference optimizer scheduler utils "
        "utils.memory utils.random utils.versions utils.modeling'.split():\n"
        "    found = accelerate\n"
        "    for part in name.split('.'): found = getattr(found, part)\n"
        "    assert found is importlib.import_module('nbaccel.compat.accelerate.' + name), name\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (ran.stdout, ran.returncode) == ("1.15.0\n", 0), ran.stderr


def test_name_of_accelerates_face_when_imported_is_here_or_refused_by_name():
    wheel = importlib.util.find_spec("accelerate")  # not imported
    tree = ast.parse(Path(wheel.origin).read_text())
    theirs = {a.name for node in tree.body if isinstance(node, ast.ImportFrom) for a in node.names}
    assert {name for name in theirs if not name.startswith("is_")} <= names.HOMES.keys() | REFUSED.keys()
    assert not names.HOMES.keys() & REFUSED.keys()


def test_name_when_it_is_here_is_in_the_migration_page():
    page = (Path(__file__).parents[2] / "docs" / "migration.md").read_text()
    table = page.partition("## What `nbaccel.compat.accelerate` has")[2].partition("\n## ")[0]
    assert [name for name in names.HOMES if f"`{name}`" not in table] == []


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


def test_batches_when_asked_by_nbaccels_arguments_are_told_as_they_are():
    made = accelerator(split_batches=True, even_batches=False, dispatch_batches=True)
    assert (made.split_batches, made.even_batches, made.dispatch_batches) == (True, False, True)
    with pytest.raises(ConfigError, match="even_batches=True is set, but False was asked"):
        made.even_batches = True
    made = accelerator()
    made.even_batches = False
    assert (made.even_batches, made.dispatch_batches) == (False, None)


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


def test_profile_when_its_activities_are_named_records_them():
    made = accelerator(kwargs_handlers=[compat.ProfileKwargs(activities=["cpu"])])
    with made.profile() as profile:
        torch.ones(2) + 1
    assert "aten::add" in {event.key for event in profile.key_averages()}
    assert len(compat.ProfileKwargs(activities=["CPU", "cuda", "privateuse1"]).options()["activities"]) == 3
    with pytest.raises(ConfigError, match="'gpu' is none of torch's profiler, which has cpu, "):
        compat.ProfileKwargs(activities=["gpu"]).options()


def test_attribute_when_it_cannot_be_set_is_refused():
    made = accelerator()
    with pytest.raises(AttributeError):
        made.num_processes = 4
    assert made.num_processes == 1


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
        "dispatch": True, "even_batches": False, "tell_repeats": False, "shard": "contiguous", "split_batches": False
    }  # fmt: skip
    assert made._loader_options(iterable=False)["dispatch"] is False
    assert accelerator(even_batches=True)._loader_options(iterable=False)["tell_repeats"]
    prepare = importlib.import_module("nbaccel.compat.accelerate.data_loader").prepare_data_loader
    filled = prepare(DataLoader(range(5), batch_size=2), num_processes=2, process_index=0)
    assert filled.even_batches  # of which nothing is said: it is the default there
    loader = made.prepare(DataLoader(Stream(), batch_size=2))
    later = made.skip_first_batches(loader, 1)
    with pytest.warns(UserWarning, match="read and dropped"):
        assert [batch.tolist() for batch in later] == [
            [2, 3],
            [4],
        ]  # accelerate fills nothing on one rank either
    with pytest.raises(ConfigError, match="at least 0, not -1"):
        made.skip_first_batches(loader, -1)
    plain = compat.skip_first_batches(DataLoader(Stream(), batch_size=2), 1)
    assert [[batch.tolist() for batch in plain] for _ in range(2)] == [[[2, 3], [4]]] * 2
    assert len(compat.skip_first_batches(DataLoader(range(5)), 3)) == 2
    with pytest.raises(ConfigError, match="takes a DataLoader, not a list"):
        compat.skip_first_batches([1, 2], 1)


def test_checkpoints_when_named_automatically_lie_in_the_project(tmp_path):
    project = compat.ProjectConfiguration(
        project_dir=str(tmp_path), automatic_checkpoint_naming=True, total_limit=1
    )
    made = accelerator(project_config=project)
    model = made.prepare(torch.nn.Linear(1, 1))
    made.save_state()
    made.unwrap_model(model).weight.data.fill_(7.0)
    last = made.save_state("ignored")
    assert [str(path) for path in tmp_path.iterdir()] == [str(tmp_path / "checkpoints")]
    assert [str(path) for path in (tmp_path / "checkpoints").iterdir()] == [last]
    assert last == str(tmp_path / "checkpoints" / "checkpoint_1")
    model.weight.data.fill_(0.0)
    made.load_state()
    assert model.weight.item() == 7.0
    assert made.save_iteration == 2
    made.load_state(tmp_path / "checkpoints" / "checkpoint_1")


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


def test_trackers_when_scripts_use_them_take_accelerates_arguments(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    made = accelerator(log_with="tensorboard", project_dir=tmp_path)
    assert made.trackers == []
    made.init_trackers("p")
    (tracker,) = made.trackers
    assert tracker is made.get_tracker("tensorboard")
    assert tracker.writer is made.get_tracker("tensorboard", unwrap=True)
    tracker.log_images({"two": torch.rand(2, 3, 5, 6).numpy()}, step=1)
    made.end_training()
    events = EventAccumulator(str(tmp_path / "p"))
    events.Reload()
    sizes = [(one.width, one.height) for name in ("two/0", "two/1") for one in events.Images(name)]
    assert sizes == [(6, 5), (6, 5)]


def test_configuration_objects_when_asked_tell_what_is_not_as_by_default():
    given = compat.DistributedDataParallelKwargs(bucket_cap_mb=50)
    assert given.to_kwargs() == {"bucket_cap_mb": 50}
    assert given.to_dict()["bucket_cap_mb"] == 50
    assert compat.InitProcessGroupKwargs(timeout=timedelta(hours=1)).to_kwargs() == {
        "timeout": timedelta(hours=1)
    }
    assert compat.utils.ComputeEnvironment.LOCAL_MACHINE == "LOCAL_MACHINE"
    merged = compat.utils.merge_dicts({"a": {"b": 1}, "c": 2}, {"a": {"d": 3}})
    assert merged == {"a": {"b": 1, "d": 3}, "c": 2}
    assert compat.utils.environment.str_to_bool("on", to_bool=True) is True


def test_accumulation_when_asked_of_the_gradient_state():
    made = accelerator(gradient_accumulation_steps=2)
    state = made.gradient_state
    assert (state.adjust_scheduler, state.plugin_kwargs) == (True, {"num_steps": 2})
    loader = made.prepare(DataLoader(TensorDataset(torch.arange(4.0))))
    seen = [state.dataloader_references for _ in loader]
    assert seen == [[None, loader]] * 4
    assert state.dataloader_references == [None]


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


def test_model_when_offloaded_with_a_hook_comes_when_it_is_called():
    first, hook = compat.cpu_offload_with_hook(torch.nn.Linear(2, 2), "meta")
    second, last = compat.cpu_offload_with_hook(torch.nn.Linear(2, 2), prev_module_hook=hook)
    assert first.weight.device.type == "cpu"
    assert first(input=torch.ones(1, 2)).device.type == first.weight.device.type == "meta"
    with pytest.raises(
        NotImplementedError, match="meta tensor"
    ):  # the first is asked to leave, which meta cannot
        second(torch.ones(1, 2))
    last.remove()
    assert second(torch.ones(1, 2)).device.type == "cpu"


@pytest.mark.parametrize("device_map", [None, {"": "cpu"}, {"0": "cpu", "1": "disk"}])
@pytest.mark.parametrize("empty", [False, True])
def test_checkpoint_when_loaded_into_a_model_fills_it(tmp_path, device_map, empty):
    def make():
        return torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))

    saved = make()
    path = tmp_path / compat.utils.WEIGHTS_NAME
    torch.save(saved.state_dict(), path)
    with compat.init_empty_weights(include_buffers=empty) if empty else torch.no_grad():
        model = make()
    before = model[0].weight
    compat.load_checkpoint_in_model(model, path, device_map)
    assert all(torch.equal(value, saved.state_dict()[name]) for name, value in model.state_dict().items())
    assert (model[0].weight is before) == (device_map is None and not empty)
    model(torch.ones(2, 2)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert not torch.equal(model[1].bias, saved[1].bias)


def test_tensors_when_handled_one_by_one(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    torch.save(model.state_dict(), tmp_path / "weights.bin")
    state = compat.utils.load_state_dict(
        tmp_path / "weights.bin", {"0": "meta", "1": "cpu", "1.bias": "disk"}
    )
    assert state.keys() == model.state_dict().keys() - {"1.bias"}
    assert (state["0.bias"].device.type, state["1.weight"].device.type) == ("meta", "cpu")
    own = dict(compat.utils.named_module_tensors(model, recurse=True))
    assert own.keys() == model.state_dict().keys()
    model.register_buffer("kept", torch.ones(1), persistent=False)
    assert dict(compat.utils.named_module_tensors(model, remove_non_persistent=True)) == {}

    put = compat.utils.set_module_tensor_to_device
    put(model, "0.weight", "meta")
    with pytest.raises(ConfigError, match="no value"):
        put(model, "0.weight", "cpu")
    with pytest.raises(ConfigError, match=r"\(3, 2\), and its value is \(1,\)"):
        put(model, "0.weight", "cpu", torch.ones(1))
    with pytest.raises(ConfigError, match=r"no parameter or buffer '0\.width'"):
        put(model, "0.width", "cpu")
    put(model, "0.weight", "cpu", torch.full((3, 2), 2.0, dtype=torch.float64))
    assert (model[0].weight.dtype, model[0].weight.sum().item()) == (torch.float32, 12.0)
    assert isinstance(model[0].weight, torch.nn.Parameter)
    put(model, "1.running_mean", "cpu", torch.ones(3), torch.float16)
    assert model.state_dict()["1.running_mean"].dtype == torch.float16


def test_memory_when_asked_for_is_what_models_may_take():
    model = torch.nn.Linear(2, 2)
    assert compat.utils.get_max_memory({"cpu": "1GB", "disk": 5}) == {"cpu": 10**9, "disk": 5}
    limits = compat.utils.get_balanced_memory(model)
    assert limits.keys() == {*range(torch.cuda.device_count()), "cpu"}
    assert compat.infer_auto_device_map(model, {"cpu": limits["cpu"]}) == {"": "cpu"}
    with pytest.raises(ConfigError, match="max_memory"):
        compat.utils.get_balanced_memory(model, low_zero=True)
    assert compat.utils.convert_file_size_to_int("1MiB") == 1 << 20
    assert [compat.utils.convert_bytes(size) for size in (10, 1536, 2**60)] == [
        "10 bytes",
        "1.5 KB",
        "1024.0 PB",
    ]
    assert compat.utils.should_reduce_batch_size(RuntimeError("CUDA out of memory."))
    assert not compat.utils.should_reduce_batch_size(RuntimeError("else"))
    compat.utils.clear_device_cache(garbage_collection=True)
    assert compat.utils.release_memory(model, model) == [None, None]


def test_versions_when_compared():
    assert compat.utils.is_torch_version(">=", "2.6")
    assert not compat.utils.is_torch_version("<", "2.6.0")
    assert compat.utils.compare_versions("pytest", ">", "2.10")
    with pytest.raises(ValueError, match="'=>'"):
        compat.utils.compare_versions("pytest", "=>", "2")


def test_prepared_when_scripts_ask_what_it_is():
    made = accelerator(
        kwargs_handlers=[compat.GradScalerKwargs()], dynamo_backend=compat.utils.DynamoBackend.NO
    )
    assert compat.utils.is_initialized()
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    model, optimizer, scheduler = made.prepare(model, optimizer, scheduler)
    assert compat.optimizer.AcceleratedOptimizer is PreparedOptimizer
    assert isinstance(optimizer, compat.optimizer.AcceleratedOptimizer)
    assert isinstance(scheduler, compat.scheduler.AcceleratedScheduler)
    assert compat.scheduler.AcceleratedScheduler is PreparedScheduler
    assert isinstance(compat.GradScalerKwargs(), compat.utils.KwargsHandler)
    assert not compat.utils.is_compiled_module(model)
    assert compat.utils.is_compiled_module(torch.compile(model))
    with pytest.raises(ConfigError, match="inductor"):
        accelerator(dynamo_backend=compat.utils.DynamoBackend.EAGER)


def test_checkpoint_when_merged_is_one_models_weights(tmp_path):
    made = accelerator()
    model = made.prepare(torch.nn.Linear(2, 2))
    made.save_state(str(tmp_path / "checkpoint"))
    compat.utils.merge_fsdp_weights(str(tmp_path / "checkpoint"), str(tmp_path / "out"))
    state = compat.utils.load_state_dict(tmp_path / "out" / compat.utils.SAFE_WEIGHTS_NAME)
    assert torch.equal(state["weight"], model.state_dict()["weight"])
    with pytest.raises(ConfigError, match="keeps the checkpoint"):
        compat.utils.merge_fsdp_weights(str(tmp_path / "checkpoint"), "out", remove_checkpoint_dir=True)


def test_hooks_when_removed_leave_a_plain_model():
    model = compat.dispatch_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), {"": "cpu"})
    assert compat.hooks.remove_hook_from_module(model, recurse=True) is model
    assert not hasattr(model, "device_map_table")
    compat.hooks.remove_hook_from_submodules(model)
