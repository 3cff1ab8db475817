"""What FSDP2 gathers together, what apart and when: tied parameters, embeddings. Its numbers: test_same_numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import run_ranks
from tiny import VOCABULARY, Block, Job, TinyLM, Trained, difference, train
from torch import nn

from nbaccel import FSDP, TensorParallel

pytestmark = pytest.mark.timeout(300)


def quietly(job: Job) -> tuple[Trained, list[str]]:
    import warnings

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        return train(job), [str(one.message) for one in said]


def test_tied_parameters_when_each_is_in_a_block_of_its_own_stay_one(alone: tuple[Trained, str]) -> None:
    options = FSDP(wrap=lambda module: type(module).__name__ in ("Embedding", "Linear"))
    ranks = run_ranks(quietly, Job(strategy=options))
    for one, _ in ranks:
        assert difference(one.losses, alone[0].losses) <= 1e-5
        assert max(difference(one.weights[n], alone[0].weights[n]) for n in alone[0].weights) <= 2e-4
        assert one.tied
    assert any("2 of 6 blocks share parameters" in text for text in ranks[0][1])


def llama(strategy: Any, words: int, tied: bool) -> dict[str, Any]:
    """Three steps of a model of Hugging Face, and which parameters are whole between forward and backward."""
    import transformers
    from torch.distributed.tensor import DTensor

    from nbaccel.core import Accelerator

    acc = Accelerator(cpu=True, strategy=strategy)
    torch.manual_seed(3)
    config: Any = transformers.LlamaConfig(
        vocab_size=words, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=16, tie_word_embeddings=tied,
    )  # fmt: skip
    model: Any = transformers.LlamaForCausalLM(config)
    model, optimizer = acc.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    tokens = torch.randint(words, (4, 8), generator=torch.Generator().manual_seed(1))
    found: dict[str, Any] = {"losses": []}
    for _ in range(3):
        loss = model(tokens, labels=tokens).loss
        found["whole"] = {n for n, p in model.named_parameters() if not isinstance(p, DTensor)}
        acc.step(loss, optimizer, clip=1.0)
        found["losses"].append(loss.item())
    return found


def of_all_kinds(strategy: Any, by_name: Any) -> list[dict[str, Any]]:
    kinds = [llama(strategy, words, tied) for words, tied in ((400, False), (400, True), (30, False))]
    return [*kinds, llama(by_name, 400, False)]


def test_embeddings_when_not_small_beside_a_block_are_gathered_apart() -> None:
    (alone,) = run_ranks(of_all_kinds, "single", "single", num_processes=1)
    for ranks in run_ranks(of_all_kinds, "fsdp", FSDP(wrap="LlamaDecoderLayer")):
        for one, expected in zip(ranks, alone, strict=True):
            assert difference(one["losses"], expected["losses"]) <= 1e-5
        large, tied, small, by_name = (one["whole"] for one in ranks)
        assert large == {"model.norm.weight", "lm_head.weight"}  # what backward wants first
        assert tied == {"model.norm.weight", "model.embed_tokens.weight"}
        assert small == {"model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"}
        assert by_name == large


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    block = [nn.Sequential(nn.Conv1d(4, 4, 3, padding=1), nn.BatchNorm1d(4), nn.ReLU()) for _ in range(2)]
    return nn.Sequential(*block, nn.BatchNorm1d(4, affine=False), nn.Flatten(), nn.Linear(20, 2))


def normalised(strategy: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    from nbaccel.core import Accelerator

    acc = Accelerator(cpu=True, strategy=strategy, mixed_precision="bf16")
    net = convolutions()
    model, optimizer = acc.prepare(net, torch.optim.SGD(net.parameters(), lr=0.05))
    inputs = torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(2))
    losses = []
    for _ in range(3):
        loss = model(inputs).float().square().mean()
        acc.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, acc.get_state_dict(model)


@pytest.mark.filterwarnings("ignore:mixed_precision='bf16' is emulated")
def test_batch_norms_when_the_rest_is_bf16_compute_in_float32() -> None:
    ((losses, alone),) = run_ranks(normalised, "single", num_processes=1)
    for theirs, state in run_ranks(normalised, "fsdp"):
        assert theirs == pytest.approx(losses, abs=5e-3)
        for name, value in alone.items():
            assert state[name].dtype == value.dtype, name
            assert (state[name] - value).abs().max() <= 2e-2, name


def encoder(strategy: Any) -> list[float]:
    """Losses of a model whose attention reads the parameters of a layer that it never calls."""
    from nbaccel.core import Accelerator

    acc = Accelerator(cpu=True, strategy=strategy)
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    net = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(8, 2))
    model, optimizer = acc.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1))
    losses = []
    for _ in range(2):
        loss = model(torch.ones(3, 4, 8)).square().mean()
        acc.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_blocks_by_size_when_attention_reads_its_layers_are_around_it() -> None:
    (alone,) = run_ranks(encoder, "single", num_processes=1)
    for losses in run_ranks(encoder, FSDP(wrap=50)):
        assert losses == pytest.approx(alone, abs=1e-5)


class Adapted(nn.Module):
    """As an adapter around a model: `generate` calls the model in it and never itself."""

    def __init__(self) -> None:
        super().__init__()
        self.base = TinyLM()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.base(tokens)

    @torch.no_grad()
    def generate(self, tokens: torch.Tensor) -> list[list[int]]:
        for _ in range(4):
            tokens = torch.cat([tokens, self.base(tokens)[:, -1:].argmax(-1)], 1)
        return tokens.tolist()


def back_to_the_best(strategy: Any) -> tuple[list[float], list[list[list[int]]]]:
    """Losses and texts of a model that is set back to the weights of an earlier step, whole and in a part."""
    from nbaccel.core import Accelerator

    acc = Accelerator(cpu=True, strategy=strategy)
    torch.manual_seed(5)
    model: Any = Adapted()
    model, optimizer = acc.prepare(model, torch.optim.SGD(model.parameters(), lr=0.5))
    inner = acc.unwrap_model(model)
    tokens = torch.randint(VOCABULARY, (4, 6), generator=torch.Generator().manual_seed(1))
    texts, losses, best = [inner.generate(tokens)], [], {}
    for step in range(6):
        loss = nn.functional.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        if step == 3:  # gathered for a backward as it is
            inner.load_state_dict(best)
            continue
        if step == 4:
            inner.base.load_state_dict({name.removeprefix("base."): one for name, one in best.items()})
            continue
        acc.step(loss, optimizer)
        losses.append(loss.item())
        if step == 1:
            best = {name: one.clone() for name, one in acc.get_state_dict(model).items()}
    inner.load_state_dict(inner.state_dict())
    return losses, [*texts, inner.generate(tokens)]


def all_back_to_the_best(strategies: list[Any]) -> list[tuple[list[float], list[list[list[int]]]]]:
    return [back_to_the_best(strategy) for strategy in strategies]


def test_whole_weights_are_taken_and_generate_gathers_whatever_it_calls() -> None:
    ((losses, texts),) = run_ranks(back_to_the_best, "single", num_processes=1)
    divided = TensorParallel(plan={"base.blocks.*.up": "column", "base.blocks.*.down": "row"})
    strategies = [FSDP(wrap=Block), FSDP(wrap=[Block, "Embedding"], tensor_parallel=divided), divided]
    for told in run_ranks(all_back_to_the_best, strategies):
        for theirs, written in told:
            assert theirs == pytest.approx(losses, abs=1e-5)
            assert written == texts
