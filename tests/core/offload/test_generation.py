from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nbaccel import init_empty_weights, load_checkpoint_and_dispatch

transformers: Any = pytest.importorskip("transformers")


@pytest.mark.parametrize("dtype", [None, torch.float64], ids=["mapped", "brought"])
def test_generation_with_a_cache_writes_what_it_writes_in_memory(
    dtype: torch.dtype | None, tmp_path: Path
) -> None:
    sizes = {"n_embd": 16, "n_layer": 3, "n_head": 2, "vocab_size": 60, "n_positions": 32}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=None)
    torch.manual_seed(0)
    plain = transformers.GPT2LMHeadModel(config).eval()
    plain.save_pretrained(tmp_path)
    with init_empty_weights():
        empty = transformers.GPT2LMHeadModel(config).eval()
    streamed = load_checkpoint_and_dispatch(empty, tmp_path, {"": "disk"}, dtype=dtype)
    prompt = torch.tensor([[1, 2, 3], [4, 5, 6]])
    given = {
        "attention_mask": torch.ones_like(prompt),
        "max_new_tokens": 12,
        "do_sample": False,
        "pad_token_id": 0,
    }
    wanted = plain.to(dtype).generate(prompt, **given)
    assert torch.equal(streamed.generate(prompt, **given), wanted)
    assert torch.equal(streamed.generate(prompt, **given, use_cache=False), wanted)
    assert len(set(wanted[0].tolist())) > 3, "not one token again and again"
