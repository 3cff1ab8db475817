"""Matrices divided over ranks: the numbers of one process, alone and together with FSDP2."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import run_ranks
from tiny import TinyLM, difference, held_bytes

from nbaccel import FSDP, TensorParallel
from nbaccel.errors import ConfigError

pytestmark = pytest.mark.timeout(300)
HEADS, SAMPLES = 4, 44
PLAN = {"blocks.*.up": "column", "blocks.*.down": "row"}


def build(family: str) -> torch.nn.Module:
    import transformers

    if family == "llama":
        config: Any = transformers.LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=HEADS,
            num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=True,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config)
    config = transformers.GPT2Config(
        vocab_size=32, n_embd=16, n_layer=2, n_head=HEADS, n_positions=32,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def train(family: str, strategy: Any, save: str | None = None, load: str | None = None) -> dict[str, Any]:
    from nbaccel.core import Accelerator

    acc = Accelerator(cpu=True, strategy=strategy, gradient_accumulation_steps=2, verify=True)
    torch.manual_seed(3)
    model = build(family)
    # moved a little: at a norm's initial ones a mistake in its gradient does not show
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    tokens = torch.randint(13, (SAMPLES, 8), generator=torch.Generator().manual_seed(1))
    data = torch.utils.data.TensorDataset(torch.arange(SAMPLES), tokens)
    loader = torch.utils.data.DataLoader(data, batch_size=8 // acc.strategy.data_axis.size)
    model, optimizer, loader = acc.prepare(model, optimizer, loader)
    if load:
        acc.load_state(load)
    found: dict[str, Any] = {"losses": [], "norms": [], "seen": [], "held": 0}
    for numbers, batch in loader:
        found["seen"] += acc.gather_for_metrics(numbers).tolist()
        with acc.accumulate(model):
            logits = model(batch).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
            acc.backward(loss)
            norm = acc.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            if acc.sync_gradients:
                found["held"] = held_bytes(model, optimizer)
            optimizer.zero_grad()
        axis = acc.strategy.data_axis.size
        part = loss.detach() * loader.batch_samples * axis / acc.num_processes
        found["losses"].append((acc.reduce(part) / loader.global_batch_samples).item())
        if norm is not None:
            found["norms"].append(float(norm))
        if save and acc.steps == 2 and acc.sync_gradients:
            acc.save_state(save)
    found["state"] = {name: value.flatten().tolist() for name, value in acc.get_state_dict(model).items()}
    model.eval()
    with torch.no_grad():
        text = model.generate(torch.ones(1, 2, dtype=torch.int64), max_new_tokens=4, do_sample=False)
    found["text"] = text.tolist()
    return found


def agrees(one: dict[str, Any], alone: dict[str, Any]) -> None:
    assert difference(one["losses"], alone["losses"]) <= 1e-5
    assert difference(one["norms"], alone["norms"]) <= 1e-4
    assert sorted(one["seen"]) == list(range(SAMPLES))
    assert one["state"].keys() == alone["state"].keys()
    worst = max(difference(one["state"][name], alone["state"][name]) for name in alone["state"])
    assert worst <= 5e-4, worst
    assert one["text"] == alone["text"]


def each(jobs: list[tuple[Any, ...]]) -> list[dict[str, Any]]:
    return [train(*job) for job in jobs]


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    families = ("llama", "gpt2")
    (found,) = run_ranks(each, [(family, "single") for family in families], num_processes=1)
    return dict(zip(families, found, strict=True))


@pytest.fixture(scope="module")
def middle(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("divided") / "middle")


@pytest.fixture(scope="module")
def four(middle: str) -> list[list[dict[str, Any]]]:
    """A mesh of two by two, whose middle is saved; and copies."""
    mesh = FSDP(tensor_parallel=TensorParallel(size=2))
    return run_ranks(each, [("llama", mesh, middle), ("gpt2", TensorParallel(size=2))], num_processes=4)


def test_training_when_matrices_are_divided_is_that_of_one_process_and_goes_on_from_a_mesh(
    alone: dict[str, Any], four: object, middle: str
) -> None:
    jobs = [("llama", "tensor_parallel"), ("llama", "tensor_parallel", None, middle)]
    for one, resumed in run_ranks(each, jobs):
        agrees(one, alone["llama"])
        assert one["held"] < 0.6 * alone["llama"]["held"]
        goes_on(resumed, alone["llama"])


def test_training_on_a_mesh_of_two_by_two_is_that_of_one_process_which_goes_on_from_it(
    alone: dict[str, Any], four: list[list[dict[str, Any]]], middle: str
) -> None:
    for one, _ in four:
        agrees(one, alone["llama"])
        assert one["held"] < 0.3 * alone["llama"]["held"]
    goes_on(*run_ranks(train, "llama", "single", None, middle, num_processes=1), alone["llama"])


def goes_on(resumed: dict[str, Any], alone: dict[str, Any]) -> None:
    assert len(resumed["losses"]) == len(alone["losses"]) - 4
    assert difference(resumed["losses"], alone["losses"][4:]) <= 1e-5


def test_training_when_copies_are_divided_averages_over_the_copies(
    alone: dict[str, Any], four: list[list[dict[str, Any]]]
) -> None:
    for _, one in four:
        agrees(one, alone["gpt2"])


def from_nothing(folder: str) -> dict[str, Any]:
    """An empty model, divided, then filled from files; the same made the ordinary way."""
    from nbaccel.core import Accelerator
    from nbaccel.core.offload import init_empty_weights

    found: dict[str, Any] = {}
    for strategy in (TensorParallel(plan=PLAN), FSDP(tensor_parallel=TensorParallel(size=2, plan=PLAN))):
        acc = Accelerator(cpu=True, strategy=strategy)
        with init_empty_weights():
            model = TinyLM(2)
        model, optimizer = acc.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        acc.load_model(model, folder)
        loss = model(torch.arange(12).view(2, 6)).square().mean()
        acc.step(loss, optimizer)
        found[acc.strategy.name] = loss.item(), acc.get_state_dict(model), held_bytes(model, optimizer)
        acc.free_memory()
    return found


def test_empty_model_when_it_is_divided_is_filled_from_files(tmp_path: Any) -> None:
    from nbaccel.core.save_model import save_model
    from nbaccel.core.world import single

    torch.manual_seed(4)
    model = TinyLM(2)
    save_model(model.state_dict(), tmp_path, world=single())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = model(torch.arange(12).view(2, 6)).square().mean()
    loss.backward()
    optimizer.step()
    for found in run_ranks(from_nothing, str(tmp_path)):
        for name, (theirs, state, held) in found.items():
            assert theirs == pytest.approx(loss.item(), rel=1e-5), name
            assert held < sum(p.nbytes for p in model.parameters()), name
            for key, value in model.state_dict().items():
                torch.testing.assert_close(state[key], value, msg=f"{name}: {key}")


def refusals() -> list[str]:
    from nbaccel.core import Accelerator

    said = []

    def refused(strategy: Any, model: torch.nn.Module | None) -> None:
        with pytest.raises(ConfigError) as caught:
            Accelerator(cpu=True, strategy=strategy).prepare(model)
        said.append(str(caught.value))

    import transformers

    odd = transformers.LlamaConfig(
        vocab_size=32, hidden_size=18, intermediate_size=32, num_hidden_layers=1, num_attention_heads=3,
        num_key_value_heads=3,
    )  # fmt: skip
    refused("tensor_parallel", transformers.LlamaForCausalLM(odd))
    refused("tensor_parallel", TinyLM())
    refused(TensorParallel(plan={"blocks.*.upp": "column"}), TinyLM())
    refused(TensorParallel(plan={"blocks.*.norm": "column"}), TinyLM())
    refused(TensorParallel(size=3), None)
    return said


def test_wrong_combinations_when_divided_are_refused_with_what_to_do() -> None:
    words = [
        "3 heads (num_attention_heads); use one of 1, 3",
        "plan={",
        "'blocks.*.upp'",
        "no matrix",
        "a divisor",
    ]
    for said in run_ranks(refusals):
        for text, word in zip(said, words, strict=True):
            assert word in text
