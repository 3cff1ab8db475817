"""What stands in for a `forward` looks like it to callers that read its signature."""

from __future__ import annotations

import inspect

import pytest
import torch
from ranks import run_ranks
from torch import nn

from nbaccel.core import Accelerator
from nbaccel.core.model.recompute import recompute_in_backward
from tests.conftest import needs


class Reader(nn.Module):
    def forward(self, tokens: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Reads."""
        return tokens.float()


@pytest.mark.filterwarnings("ignore:mixed_precision='bf16' is emulated")
def test_forward_when_wrapped_has_its_signature_and_name():
    plain, wrapped = Reader(), Reader()
    recompute_in_backward(wrapped)
    assert inspect.signature(wrapped.forward) == inspect.signature(plain.forward)
    prepared = Accelerator(cpu=True, mixed_precision="bf16", measure=True).prepare(wrapped)
    assert "forward" in vars(prepared)
    assert inspect.signature(prepared.forward) == inspect.signature(plain.forward)
    assert inspect.getfullargspec(prepared.forward).args == ["tokens", "attention_mask"]
    assert (prepared.forward.__name__, prepared.forward.__doc__) == ("forward", "Reads.")


def _generated(how: str) -> list[list[int]]:
    """What a model writes after inputs that are filled on the left: as it is, and prepared."""
    import transformers

    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "vocab_size": 64}
    if how == "given":
        config = transformers.GPT2Config(**sizes, n_positions=16, bos_token_id=None, eos_token_id=None)
        model = transformers.GPT2LMHeadModel(config).eval()
        nn.init.normal_(model.transformer.wpe.weight)
    else:
        config = transformers.LlamaConfig(**sizes, intermediate_size=16, bos_token_id=None, eos_token_id=None)
        model = transformers.LlamaForCausalLM(config).eval()
    tokens = torch.tensor([[0, 0, 0, 3], [4, 5, 6, 7]])
    options = {"attention_mask": (tokens != 0).long()} if how == "given" else {}
    found = []
    for _ in range(2):
        found.append(model.generate(tokens, max_new_tokens=6, do_sample=False, pad_token_id=0, **options))
        model = Accelerator(cpu=True, mixed_precision="no", measure=True).prepare(model)
    return [tokens[0].tolist() for tokens in found]


@needs("transformers")
@pytest.mark.parametrize("how", ["given", "inferred"])
def test_generate_when_the_inputs_are_padded_heeds_the_mask(how):
    ((plain, prepared),) = run_ranks(_generated, how, num_processes=1)
    assert prepared == plain
