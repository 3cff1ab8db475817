"""The training loop on one and on several ranks, against plain torch in one process."""

from __future__ import annotations

import copy
import gc
import inspect
import itertools
import os
import warnings
import weakref

import pytest
import safetensors.torch
import torch
from ranks import run_ranks
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from nbaccel.core import Accelerator, DDPOptions, ScalerOptions
from nbaccel.errors import ConfigError, TrustError

PRIME = 67  # samples: no batch size divides it


def _data():
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(PRIME, 6, generator=generator)
    return x, (x @ torch.randn(6, 2, generator=generator)).tanh()


def _model():
    torch.manual_seed(11)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2))


def _plain(global_batch, accumulation=1, epochs=2, clip=None):
    """What the maths says: each window one mean over all its samples."""
    x, y = _data()
    model = _model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)
    window = global_batch * accumulation
    for _ in range(epochs):
        for start in range(0, PRIME, window):
            loss = nn.functional.mse_loss(model(x[start : start + window]), y[start : start + window])
            loss.backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return _flat(model), scheduler.get_last_lr()


def _flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()]).double()


def _train(global_batch, accumulation, clip, short, options):
    acc = Accelerator(cpu=True, gradient_accumulation_steps=accumulation, **options)
    model = _model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)
    loader = DataLoader(TensorDataset(*_data()), batch_size=global_batch // acc.num_processes)
    model, optimizer, loader, scheduler = acc.prepare(model, optimizer, loader, scheduler)
    steps = 0
    for _ in range(2):
        for x, y in loader:
            if short:
                acc.step(nn.functional.mse_loss(model(x), y), optimizer, scheduler, clip=clip)
            else:
                with acc.accumulate(model):
                    acc.backward(nn.functional.mse_loss(model(x), y))
                    if clip:
                        acc.clip_grad_norm_(model.parameters(), clip)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
            steps += acc.sync_gradients
    assert acc.steps == steps
    return _flat(acc.unwrap_model(model)), scheduler.get_last_lr()


WAYS = [(1, None, False), (4, 0.05, False), (3, 0.05, True), (1, 0.05, True)]
"""Accumulation, clipping, and whether a step is one call."""


@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_training_when_on_several_ranks_equals_one_process(num_processes):
    ranks = run_ranks(lambda: [_train(8, *way, {}) for way in WAYS], num_processes=num_processes)
    for (accumulation, clip, short), *values in zip(WAYS, *ranks, strict=True):
        expected, rate = _plain(8, accumulation, clip=clip)
        for weights, last in values:
            assert torch.equal(weights, values[0][0]), (accumulation, clip, short)
            assert (weights - expected).abs().max() <= 1e-6, (accumulation, clip, short)
            assert last == rate, "one scheduler step per optimizer step"


def test_training_when_in_this_process_equals_plain_torch():
    expected, rate = _plain(8)
    weights, last = _train(8, 1, None, False, {})
    assert torch.equal(weights, expected)
    assert last == rate


HOOKS = ("fp16", "bf16", "power_sgd")


def _train_otherwise():
    hooks = [{"ddp": DDPOptions(comm_hook=hook, power_sgd_start=1000)} for hook in HOOKS]
    return [_train(8, 1, None, False, options)[0] for options in (*hooks, {"loss_weighting": "equal"})]


def test_training_when_gradients_travel_compressed_or_losses_count_alike():
    expected, _ = _plain(8)
    (*zero, alike), (*one, _) = run_ranks(_train_otherwise)
    for hook, weights, other in zip(HOOKS, zero, one, strict=True):
        assert torch.equal(weights, other)
        error = (weights - expected).abs().max().item()
        assert error < 0.05
        assert (error > 1e-6) == (hook != "power_sgd")  # PowerSGD has not begun to compress yet
    assert (alike - expected).abs().max() > 1e-5, "it differs in the tail"


# --- sums over tokens -----------------------------------------------------------------------------------

LENGTHS = [3, 9, 1, 4, 7, 2, 8, 5, 6, 11, 1]


def _sequences():
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(n, 6, generator=generator) for n in LENGTHS]


def _tokens_plain(window):
    model = _model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sequences = _sequences()
    for start in range(0, len(LENGTHS), window):
        batch = torch.cat(sequences[start : start + window])
        (model(batch) ** 2).sum(1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return _flat(model)


def _tokens(accumulation):
    acc = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    model = _model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(_sequences(), batch_size=1, collate_fn=lambda batch: batch[0])
    model, optimizer, loader = acc.prepare(model, optimizer, loader)
    for sequence in loader:
        with acc.accumulate(model):
            # the repeated one of a rank without a sample of its own counts for nothing
            acc.backward((model(sequence) ** 2).sum(), weight=len(sequence))
            optimizer.step()
            optimizer.zero_grad()
    return _flat(acc.unwrap_model(model))


@pytest.mark.parametrize(("num_processes", "accumulation"), [(1, 4), (2, 2), (4, 1)])
def test_backward_when_weighted_by_tokens(num_processes, accumulation):
    expected = _tokens_plain(num_processes * accumulation)
    for weights in run_ranks(_tokens, accumulation, num_processes=num_processes):
        assert (weights - expected).abs().max() <= 1e-6


# --- preparing ------------------------------------------------------------------------------------------


def test_prepare_when_called_twice_or_nested():
    acc = Accelerator(cpu=True)
    model = _model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(TensorDataset(*_data()), batch_size=4)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    first = acc.prepare([scheduler, {"loader": loader}], (optimizer, model))
    (prepared_scheduler, mapping), (prepared_optimizer, prepared_model) = first
    assert prepared_model is model
    again = acc.prepare(
        prepared_optimizer, optimizer, mapping["loader"], loader, prepared_scheduler, scheduler
    )
    assert again[0] is again[1] is prepared_optimizer
    assert again[2] is again[3] is mapping["loader"]
    assert again[4] is again[5] is prepared_scheduler
    assert prepared_optimizer.param_groups is optimizer.param_groups
    other = Accelerator(cpu=True)
    assert other.prepare(prepared_optimizer).optimizer is optimizer


def test_prepare_when_given_nothing_or_something_unknown():
    acc = Accelerator(cpu=True)
    with pytest.raises(ConfigError, match="given nothing"):
        acc.prepare()
    with pytest.raises(ConfigError, match="with a str"):
        acc.prepare("model")


def test_backward_when_loss_is_not_one_number():
    acc = Accelerator(cpu=True)
    with pytest.raises(ConfigError, match=r"shape \[3\].*mean"):
        acc.backward(torch.ones(3, requires_grad=True) * 2)
    for one in (acc, Accelerator(cpu=True, gradient_accumulation_steps=2)):
        for given in (3.0, None, {"loss": torch.ones((), requires_grad=True)}):
            with pytest.raises(ConfigError, match=f"was given a {type(given).__name__}; of a model's output"):
                one.backward(given)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("compile", "fast", "or a mode of torch.compile: 'default'"),
        ("measure", "no", "it must be true or false"),
        ("save_every", "0s", "it must be a time above 0"),
        ("project_dir", 3, "it must be text"),
    ],
)
def test_arguments_when_they_cannot_be_honoured(name, value, words):
    with pytest.raises(ConfigError, match=rf"{name} \(from Accelerator\(\.\.\.\)\) is {value!r}; .*{words}"):
        Accelerator(cpu=True, **{name: value})


def test_optimizer_when_accumulation_was_asked_but_not_used():
    acc = Accelerator(cpu=True, gradient_accumulation_steps=4, measure=True)
    model = acc.prepare(_model())
    optimizer = acc.prepare(torch.optim.SGD(model.parameters(), lr=0.1))
    acc.backward(model(torch.ones(1, 6)).sum())
    with pytest.raises(ConfigError, match="accumulate"):
        optimizer.step()


def test_zero_grad_when_called_first_keeps_what_the_window_has():
    acc = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = acc.prepare(nn.Linear(1, 1, bias=False))
    optimizer = acc.prepare(torch.optim.SGD(model.parameters(), lr=0.0))
    seen = []
    for value in (1.0, 3.0, 5.0, 7.0):
        with acc.accumulate(model):
            optimizer.zero_grad()
            acc.backward(model(torch.tensor([[value]])).sum())
            if acc.sync_gradients:
                seen.append(model.weight.grad.item())
            optimizer.step()
    assert seen == [2.0, 6.0]


def test_accumulate_when_two_models_have_windows_of_their_own():
    acc = Accelerator(cpu=True, gradient_accumulation_steps=2)
    one, two = acc.prepare(nn.Linear(1, 1), nn.Linear(1, 1))
    synced = []
    for _ in range(4):
        for model in (one, two):
            with acc.accumulate(model):
                acc.backward(model(torch.ones(1, 1)).sum())
                synced.append(acc.sync_gradients)
    assert synced == [False, False, True, True] * 2


# --- precision ------------------------------------------------------------------------------------------


def _seen_precision(kind):
    acc = Accelerator(cpu=True, mixed_precision=kind)
    seen = []

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            out = self.layer(x)
            seen.append(out.dtype)
            return {"out": out}

    model = acc.prepare(Model())
    out = model(torch.ones(2, 4))["out"]
    twin = copy.deepcopy(acc.unwrap_model(model))
    assert twin(torch.ones(2, 4))["out"].dtype == torch.float32
    inner = acc.unwrap_model(model)(torch.ones(2, 4))["out"].dtype
    return seen[0], out.dtype, inner, seen[-1], acc.mixed_precision


@pytest.mark.filterwarnings("ignore:mixed_precision='bf16' is emulated")
@pytest.mark.parametrize(("kind", "dtype"), [("bf16", torch.bfloat16), ("no", torch.float32)])
def test_precision_when_asked_is_what_the_model_computes_in(kind, dtype):
    for value in [_seen_precision(kind), *run_ranks(_seen_precision, kind)]:
        assert value == (dtype, torch.float32, torch.float32, dtype, kind)


def test_fp16_when_gradients_overflow_skips_optimizer_and_scheduler():
    acc = Accelerator(cpu=True, mixed_precision="fp16")
    model = acc.prepare(nn.Linear(2, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    optimizer, scheduler = acc.prepare(optimizer, scheduler)
    before = model.weight.detach().clone()
    acc.backward(model(torch.ones(1, 2)).sum() * float("inf"))
    acc.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    assert acc.optimizer_step_was_skipped
    assert acc.steps == 0
    assert torch.equal(model.weight, before)
    assert scheduler.get_last_lr() == [0.1]
    acc.backward(model(torch.ones(1, 2)).sum())
    norm = acc.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    scheduler.step()
    assert norm.item() == pytest.approx(3**0.5, rel=1e-2)  # of the true gradient, the scale taken off
    assert not acc.optimizer_step_was_skipped
    assert acc.steps == 1
    assert scheduler.get_last_lr() == [0.05]


@pytest.mark.parametrize("to_none", [True, False])
def test_fp16_when_two_optimizers_are_clipped_apart_takes_each_scale_off_once(to_none):
    acc = Accelerator(cpu=True, mixed_precision="fp16", scaler=ScalerOptions(init_scale=256.0))
    one, two = acc.prepare(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    optimizers = acc.prepare(*(torch.optim.SGD(m.parameters(), lr=1.0) for m in (one, two)))
    for _ in range(2):
        for model, optimizer in zip((one, two), optimizers, strict=True):
            nn.init.zeros_(model.weight)
            optimizer.zero_grad(set_to_none=to_none)
        for slope, model in ((0.5, one), (0.25, two)):
            acc.backward(model(torch.tensor([[slope]])).sum())
            acc.clip_grad_value_(model.parameters(), 1.0)
            assert acc.clip_grad_norm_(model.parameters(), 1.0).item() == slope
        for optimizer in optimizers:
            optimizer.step()
        assert (one.weight.item(), two.weight.item()) == (-0.5, -0.25)


def test_fp16_when_gradients_are_added_to_clipped_ones_is_refused():
    acc = Accelerator(cpu=True, mixed_precision="fp16", scaler=ScalerOptions(init_scale=256.0))
    model, other = acc.prepare(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    optimizer, _ = acc.prepare(*(torch.optim.SGD(m.parameters(), lr=1.0) for m in (model, other)))
    x = torch.ones(1, 1)

    def clip():
        acc.backward(model(x).sum())
        return acc.clip_grad_norm_(model.parameters(), 9.0).item()

    clip()
    acc.backward(other(x).sum())
    with pytest.raises(ConfigError, match=r"backward on rank 0 .* the SGD optimizer .*zero_grad\(\)"):
        acc.backward(other(model(x)).sum())
    optimizer.zero_grad()
    assert clip() == 1.0  # the step before was left out


# --- tied to the peer's names ---------------------------------------------------------------------------


def test_names_when_the_peer_has_them_are_built_or_refused_by_name():
    import accelerate

    from nbaccel.core import refused

    acc = Accelerator(cpu=True)
    for name in dir(accelerate.Accelerator):
        if name.startswith("_"):
            continue
        if name in refused.ATTRIBUTES:
            with pytest.raises(AttributeError, match=f"accelerator.{name} "):
                getattr(acc, name)
        else:
            assert hasattr(acc, name), name


def test_names_of_loaders_when_the_peer_has_them_are_built_or_refused_by_name():
    import accelerate

    loader = DataLoader([1.0, 2.0], batch_size=2)
    theirs = accelerate.Accelerator(cpu=True).prepare(loader)
    ours = Accelerator(cpu=True).prepare(loader)
    names = {*dir(type(theirs)), *vars(theirs)}  # its dir() is that of a DataLoader
    lacking = {name for name in names if not name.startswith("_") and not hasattr(ours, name)}
    assert lacking >= {"remainder", "total_dataset_length"}
    for name in lacking:
        with pytest.raises(AttributeError, match=f"loader.{name} (is|does) "):
            getattr(ours, name)
    with pytest.raises(AttributeError, match="'DataLoader' object has no attribute 'sample'"):
        _ = ours.sample


@pytest.mark.parametrize("name", ["fsdp_plugin", "kwargs_handlers", "dataloader_config"])
def test_arguments_when_the_peers_are_refused_by_name(name):
    with pytest.raises(ConfigError, match=name):
        Accelerator(cpu=True, **{name: 1})


def test_parameters_of_methods_when_the_peers_are_taken_or_refused_by_name():
    from accelerate import Accelerator as Theirs

    acc = Accelerator(cpu=True)
    positional = {
        "save_model": (nn.Linear(1, 1), "nowhere"),
        "log": ({},),
        "prepare_data_loader": (DataLoader([1]),),
    }
    refused = []
    for name, method in inspect.getmembers(Theirs, inspect.isfunction):
        ours = getattr(Accelerator, name, None)
        if name.startswith("_") or ours is None:
            continue
        for one in list(inspect.signature(inspect.unwrap(method)).parameters.values())[1:]:
            if (
                one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
                or one.name in inspect.signature(ours).parameters
            ):
                continue
            with pytest.raises(ConfigError, match=one.name):
                getattr(acc, name)(*positional.get(name, ()), **{one.name: False})
            refused.append(one.name)
    assert {"safe_serialization", "autocast_handler", "profile_handler"} <= set(refused)
    with pytest.raises(ConfigError, match="log_kwargs"):  # which its signature hides
        acc.log({}, log_kwargs={})
    with pytest.raises(TypeError, match="log takes no argument 'redcue'"):
        acc.log({}, redcue="mean")


def test_arguments_when_misspelt_name_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'mixed_precision'"):
        Accelerator(cpu=True, mixed_precison="bf16")


# --- what the loader in hand is, what is let go, what is compiled ------------------------------------------


def _two_loaders_in_turns():
    acc = Accelerator(cpu=True)
    five, eight = acc.prepare(
        DataLoader(torch.arange(1.0, 6.0), batch_size=1), DataLoader(torch.arange(8.0), batch_size=1)
    )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = [acc.gather_for_metrics(x, loader=five) for x, _ in zip(five, eight, strict=False)]
    return torch.cat(found).tolist(), [
        str(one.message) for one in said if "read in turns" in str(one.message)
    ]


def test_gather_for_metrics_when_two_loaders_are_read_in_turns():
    (found, said), (_, nothing) = run_ranks(_two_loaders_in_turns)
    assert sorted(found) == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert (len(said), nothing) == (1, [])


@pytest.mark.filterwarnings("ignore:.*even_batches=True:UserWarning")
@pytest.mark.parametrize("named", [False, True])
def test_gather_for_metrics_when_after_the_loop_tells_of_repeated_samples(named):
    acc = Accelerator(cpu=True, even_batches=True)
    loader = acc.prepare(DataLoader(torch.arange(5.0), batch_size=2))
    found = torch.cat(list(loader))
    options = {"loader": loader} if named else {}
    assert acc.gather_for_metrics(found.sum(), **options) == found.sum()
    assert len(acc.gather_for_metrics(found[:5], **options)) == 5
    with pytest.warns(UserWarning, match=r"on rank 0: .* 6 entries, .* of which 1 only .* in the loop"):
        assert len(acc.gather_for_metrics({"x": found}, **options)["x"]) == 6


def test_free_memory_when_done_lets_go_of_models_and_data():
    acc = Accelerator(cpu=True, gradient_accumulation_steps=2, verify=True)
    first, second, data = _model(), _model(), TensorDataset(*_data())
    held = [weakref.ref(one) for one in (first, second, data)]
    optimizer = torch.optim.SGD([*first.parameters(), *second.parameters()], lr=0.1)
    first, second, optimizer, loader = acc.prepare(first, second, optimizer, DataLoader(data, batch_size=4))
    for x, _ in loader:
        with acc.accumulate(first):
            acc.backward(first(x).mean() + second(x).mean())
            optimizer.step()
            optimizer.zero_grad()
    first, second, optimizer, loader, data, x = acc.free_memory(first, second, optimizer, loader, data, x)
    gc.collect()
    assert [one() for one in held] == [None] * 3


def test_unwrap_model_when_compiled_gives_the_plain_one_back_and_saves_its_names(tmp_path):
    acc = Accelerator(cpu=True)
    plain = nn.Linear(3, 1)
    model = acc.prepare(torch.compile(plain, backend="eager"))
    assert acc.unwrap_model(model) is not plain
    assert acc.unwrap_model(model, keep_torch_compile=False) is plain
    (file,) = acc.save_model(model, tmp_path)
    assert safetensors.torch.load_file(file).keys() == {"weight", "bias"}
    kept = plain.weight.detach().clone()
    nn.init.zeros_(plain.weight)
    acc.load_model(model, tmp_path)
    assert torch.equal(plain.weight, kept)


def test_gather_for_metrics_when_the_loader_has_no_length():
    acc = Accelerator(cpu=True)
    loader = acc.prepare(DataLoader(Endless(), batch_size=2))
    for x in loader:
        assert acc.gather_for_metrics(x, loader=loader).tolist() == [0, 1]
        break


class Endless(IterableDataset):
    def __iter__(self):
        return itertools.count()


def _unequal_models():
    acc, apart = Accelerator(cpu=True), int(os.environ["RANK"]) == 1
    frozen = nn.Linear(2, 1).requires_grad_(not apart)
    buffered = nn.Linear(2, 1)
    buffered.register_buffer("seen", torch.zeros(2 + apart))
    less = nn.Sequential(*[nn.Linear(2, 2)] * (1 - apart))
    told = []
    for model in (nn.Linear(3 if apart else 2, 1), frozen, less, buffered):
        with pytest.raises(TrustError) as raised:
            acc.prepare(model)
        told.append(str(raised.value))
    return told


def test_prepare_when_the_ranks_models_differ_names_the_parameter():
    told = run_ranks(_unequal_models)
    assert told[0] == told[1]
    for text, words in zip(
        told[0],
        (
            "rank 0 has 'weight' [1, 2] of float32 and rank 1 'weight' [1, 3] of float32 in a Linear",
            "rank 1 'weight' [1, 2] of float32 (frozen)",
            "rank 0 has '0.weight' [2, 2] of float32 and rank 1 nothing more",
            "rank 0 has 'seen' [2] of float32 and rank 1 'seen' [3] of float32",
        ),
        strict=True,
    ):
        assert words in text
        assert "a branch on the rank" in text
