"""DeepSpeed's inference engine on real ranks: the plain model's outputs and tokens; what it cannot do, by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from ranks import run_ranks
from torch import nn

from tests.conftest import needs

pytestmark = [needs("deepspeed"), needs("transformers")]


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=101,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


TOKENS = torch.randint(1, 101, (2, 7), generator=torch.Generator().manual_seed(1))


@dataclass(kw_only=True)
class Answered:
    logits: torch.Tensor
    tokens: list[list[int]]
    held: int
    """Numbers of parameters on this rank."""
    training: bool
    dtype: torch.dtype


def plain() -> tuple[torch.Tensor, list[list[int]], int]:
    model = llama().eval()
    with torch.no_grad():
        logits = model(TOKENS).logits
    tokens = model.generate(TOKENS, max_new_tokens=8, do_sample=False).tolist()
    return logits, tokens, sum(p.numel() for p in model.parameters())


def answer(tensor_parallel: int, dtype: torch.dtype | None = None) -> Answered:
    from nbaccel.core import Accelerator

    acc = Accelerator(cpu=True)
    engine: Any = acc.prepare_inference(llama(), tensor_parallel=tensor_parallel, dtype=dtype)
    with torch.no_grad():
        logits = engine(TOKENS).logits
    tokens = engine.generate(TOKENS, max_new_tokens=8, do_sample=False).tolist()
    held = sum(p.numel() for p in engine.parameters())
    return Answered(
        logits=logits,
        tokens=tokens,
        held=held,
        training=engine.module.training,
        dtype=next(engine.parameters()).dtype,
    )


def test_outputs_when_the_engine_holds_the_whole_model_are_the_plain_models() -> None:
    logits, tokens, held = plain()
    (one,) = run_ranks(answer, 1, num_processes=1)
    assert torch.equal(one.logits, logits)
    assert one.tokens == tokens
    assert (one.held, one.training, one.dtype) == (held, False, torch.float32)


def test_outputs_when_two_ranks_share_the_layers_are_the_plain_models() -> None:
    logits, tokens, held = plain()
    for one in run_ranks(answer, 2, num_processes=2):
        torch.testing.assert_close(one.logits, logits, atol=1e-5, rtol=1e-5)
        assert one.tokens == tokens
        assert one.held < 0.75 * held


def refusals() -> dict[str, str]:
    """What is refused, on each rank."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from nbaccel.core import Accelerator
    from nbaccel.errors import ConfigError

    acc = Accelerator(cpu=True)

    def asked(model: nn.Module, **options: Any) -> str:
        try:
            acc.prepare_inference(model, **options)
        except ConfigError as error:
            return str(error)
        return "was taken"

    mixed = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).bfloat16())
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11))
    return {
        "kernels": asked(nn.Linear(2, 2), kernel_inject=True),
        "graphs": asked(nn.Linear(2, 2), enable_cuda_graph=True),
        "ranks": asked(llama(), tensor_parallel=3),
        "type": asked(nn.Linear(2, 2).double()),
        "mixed": asked(mixed),
        "meta": asked(nn.Linear(2, 2, device="meta")),
        "gpt2": asked(gpt2, tensor_parallel=2),
        "own": asked(nn.Sequential(nn.Linear(2, 2)), tensor_parallel=2),
    }


def test_what_the_engine_cannot_do_is_refused_by_name() -> None:
    for found in run_ranks(refusals, num_processes=2):
        assert "kernel_inject=...) needs DeepSpeed's CUDA kernels" in found["kernels"]
        assert "enable_cuda_graph=...) needs DeepSpeed's CUDA kernels" in found["graphs"]
        assert "tensor_parallel is 3 and there are 2 ranks" in found["ranks"]
        assert "does not compute in torch.float64 on cpu" in found["type"]
        assert "torch.bfloat16, torch.float32: give dtype=" in found["mixed"]
        assert "weight has no values" in found["meta"]
        assert "cannot divide a GPT2LMHeadModel" in found["gpt2"]
        assert "strategy=TensorParallel" in found["own"]
