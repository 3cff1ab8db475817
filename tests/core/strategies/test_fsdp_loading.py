"""FSDP2: models that no rank ever holds as a whole, from nothing to files; what is exchanged and when."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from tiny import VOCABULARY, TinyLM

from nbaccel import FSDP
from nbaccel.errors import CheckpointError, ConfigError

pytestmark = pytest.mark.timeout(300)
MIB = 1 << 20


class Peak:
    """The largest anonymous memory of this process while entered, above what it was, in bytes."""

    def __enter__(self) -> Peak:
        import threading

        self._before, self.above, self._done = self._now(), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.001):
            self.above = max(self.above, self._now() - self._before)

    @staticmethod
    def _now() -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                return int(line.split()[1]) * 1024
        raise OSError("no RssAnon")


def build(empty: bool, width: int, blocks: int) -> TinyLM:
    from nbaccel.core.offload import init_empty_weights

    if not empty:
        return TinyLM(blocks, width)
    with init_empty_weights():
        return TinyLM(blocks, width)


def load_large(folder: str) -> tuple[int, int, float, list[str]]:
    """96 MiB of weights in 24 blocks."""
    from nbaccel.core import Accelerator

    acc = Accelerator(cpu=True, strategy="fsdp")
    acc.prepare(TinyLM(1))  # whatever takes memory once
    model = build(True, 512, 24)
    with Peak() as peak:
        model = acc.prepare(model)
        acc.load_model(model, folder)
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    total = sum(float(p.detach().full_tensor().double().sum()) for p in model.parameters())
    return peak.above, whole, total, [name for name, p in model.named_parameters() if p.is_meta]


def test_model_when_built_empty_is_loaded_without_ever_being_whole(tmp_path: Path) -> None:
    from nbaccel.core.save_model import save_model
    from nbaccel.core.world import single

    torch.manual_seed(3)
    model = TinyLM(24, 512)
    save_model(model.state_dict(), tmp_path, world=single(), max_shard_size="20MB")
    expected = sum(float(p.detach().double().sum()) for p in model.parameters())
    for above, whole, total, left in run_ranks(load_large, str(tmp_path)):
        assert whole > 90 * MIB
        # its half, and a block or two in the making
        assert above < 0.5 * whole + 12 * MIB, above / MIB
        assert total == pytest.approx(expected)
        assert left == []


def all_ways(folder: str) -> dict[str, Any]:
    """Empty or not, the same values; saved, loaded; gradients exchanged once per window; generation."""
    from torch.distributed.tensor.debug import CommDebugMode

    from nbaccel.core import Accelerator

    acc = Accelerator(cpu=True, strategy=FSDP(wrap="Block"), gradient_accumulation_steps=3)
    found: dict[str, Any] = {}
    for empty in (False, True):
        torch.manual_seed(5 if empty else 5 + acc.process_index)
        model = build(empty, 16, 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        model, optimizer = acc.prepare(model, optimizer)
        found[f"state {empty}"] = acc.get_state_dict(model)
    found["files"] = [path.name for path in acc.save_model(model, folder)]
    batch = torch.randint(VOCABULARY, (2, 6))
    found["reduced"] = []
    for _ in range(6):
        with CommDebugMode() as seen, acc.accumulate(model):
            acc.step(model(batch).square().mean(), optimizer)
        counts = {str(op): count for op, count in seen.get_comm_counts().items()}
        found["reduced"].append(sum(n for op, n in counts.items() if "reduce_scatter" in op))
    found["moved"] = acc.get_state_dict(model)["embedding.weight"]
    acc.load_model(model, folder)
    found["again"] = acc.get_state_dict(model)
    model.eval()
    with torch.no_grad():
        tokens = torch.ones(1, 1, dtype=torch.int64)
        for _ in range(5):
            tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], 1)
    found["generated"] = tokens.tolist()
    found["sharded"] = {type(v).__name__ for v in acc.get_state_dict(model, unwrap=False).values()}
    try:
        acc.load_model(acc.prepare(TinyLM(3)), folder)
    except CheckpointError as error:
        found["refused"] = str(error)
    return found


def test_state_when_sharded_is_that_of_rank_zero_and_travels_through_files(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    ranks = run_ranks(all_ways, str(tmp_path))
    torch.manual_seed(5)
    plain = TinyLM(2).state_dict()
    written = load_file(tmp_path / "model.safetensors")
    for found in ranks:
        assert found["state False"].keys() == plain.keys()
        for name, value in plain.items():
            assert torch.equal(found["state False"][name], value), name
            assert torch.equal(found["again"][name], found["state True"][name]), name
            if name in written:
                assert torch.equal(written[name], found["state True"][name]), name
        assert not torch.equal(found["moved"], found["state True"]["embedding.weight"])
        assert found["reduced"] == [0, 0, 3, 0, 0, 3]  # two blocks and the rest
        assert found["generated"] == ranks[0]["generated"]
        assert found["sharded"] == {"DTensor"}
        assert "blocks.2.down.bias" in found["refused"]
    assert ranks[0]["files"] == ["model.safetensors"]
    assert set(plain) - set(written) == {"head.weight"}


def refusals() -> list[str]:
    from nbaccel.core import Accelerator

    said = []

    def refused(do: Any) -> None:
        with pytest.raises(ConfigError) as caught:
            do()
        said.append(str(caught.value))

    refused(lambda: Accelerator(cpu=True, strategy="fsdp", mixed_precision="fp16"))
    refused(lambda: Accelerator(cpu=True, strategy=FSDP(sharding="hybrid_shard", shard_size=3)))
    acc = Accelerator(cpu=True, strategy=FSDP(wrap="Blok"))
    refused(lambda: acc.prepare(TinyLM()))
    acc = Accelerator(cpu=True, strategy=FSDP(wrap=lambda m: isinstance(m, torch.nn.ModuleList)))
    refused(lambda: acc.prepare(TinyLM()))
    acc = Accelerator(cpu=True, strategy="fsdp")
    model = TinyLM()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2, dtype=torch.int64)).sum().backward()
    optimizer.step()
    refused(lambda: acc.prepare(model, optimizer))
    refused(lambda: acc.join_uneven_inputs([model]).__enter__())
    return said


def test_wrong_combinations_when_sharded_are_refused_with_what_to_do() -> None:
    words = [
        "use 'bf16'",
        "choose a divisor",
        "its classes are",
        "never called",
        "load_state",
        "strategy 'ddp'",
    ]
    for said in run_ranks(refusals):
        assert len(said) == len(words)
        for text, word in zip(said, words, strict=True):
            assert word in text
