"""torch.compile under FSDP2: the same numbers."""

from __future__ import annotations

import pytest
from ranks import run_ranks
from tiny import VOCABULARY, TinyLM

from nbaccel import FSDP

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]


def both_ways() -> dict[str, list[float]]:
    """Losses of three steps, eager and compiled, and what was compiled."""
    import torch
    from torch._dynamo.utils import counters

    from nbaccel.core import Accelerator

    found: dict[str, list[float]] = {}
    for kind, compiled in (("eager", None), ("compiled", True)):
        acc = Accelerator(cpu=True, strategy=FSDP(wrap="Block"), compile=compiled)
        torch.manual_seed(2)
        model = TinyLM(2)
        model, optimizer = acc.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.05))
        generator = torch.Generator().manual_seed(acc.process_index)
        found[kind] = []
        for _ in range(3):
            tokens = torch.randint(VOCABULARY, (4, 6), generator=generator)
            loss = model(tokens).square().mean()
            acc.step(loss, optimizer, clip=0.5)
            found[kind].append(loss.item())
        found[f"{kind} graphs"] = [counters["stats"]["unique_graphs"]]
        acc.free_memory()
    return found


def test_training_when_compiled_has_the_losses_of_the_eager_model() -> None:
    for found in run_ranks(both_ways, deadline=250):
        # relative: losses begin at 40, and compiled kernels round otherwise in the seventh digit
        assert found["compiled"] == pytest.approx(found["eager"], rel=1e-5)
        assert found["eager graphs"] == [0]
        assert found["compiled graphs"][0] > 0
