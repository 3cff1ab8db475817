"""Libraries that training scripts live with, the real packages on two ranks, all in one launch: datasets, peft,
the Trainer with its dashboard, torchdata, and a saved model opened by others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nbaccel import Accelerator, Run, launch

pytestmark = [pytest.mark.peers, pytest.mark.slow, pytest.mark.timeout(400)]


def everything(folder: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    acc = Accelerator(cpu=True, project_dir=folder)
    found = {"map": mapped(acc), "iterable": streamed(acc), "torchdata": resumed(acc)}
    found["saved"] = saved(acc, folder)
    found["trainer"] = trained(folder)
    return found


def numbers() -> Any:
    import datasets

    return datasets.Dataset.from_dict({"x": list(range(16))})


def mapped(acc: Accelerator) -> tuple[list[int], list[int]]:
    """This rank's samples, and those of all ranks as a metric would see them."""
    from torch.utils.data import DataLoader

    doubled = numbers().map(lambda row: {"x": 2 * row["x"]}, desc="double").with_format("torch")
    loader = acc.prepare(DataLoader(doubled, batch_size=3))
    own: list[int] = []
    seen: list[int] = []
    for batch in loader:
        own += batch["x"].tolist()
        seen += acc.gather_for_metrics(batch["x"]).tolist()
    return own, seen


def streamed(acc: Accelerator) -> tuple[list[int], list[int]]:
    """This rank's samples of an iterable: as prepared, and divided by datasets' own means."""
    from datasets.distributed import split_dataset_by_node
    from torch.utils.data import DataLoader

    whole = numbers().to_iterable_dataset(num_shards=4).with_format("torch")
    prepared = [x for batch in acc.prepare(DataLoader(whole, batch_size=2)) for x in batch["x"].tolist()]
    part = split_dataset_by_node(whole, rank=acc.process_index, world_size=acc.num_processes)
    loader = acc.prepare_data_loader(DataLoader(part, batch_size=2), shard="none")
    return prepared, [x for batch in loader for x in batch["x"].tolist()]


def resumed(acc: Accelerator) -> tuple[list[int], list[int]]:
    """What torchdata's loader gives before its state is taken, and after that state is loaded into another."""
    from torch.utils.data.distributed import DistributedSampler
    from torchdata.stateful_dataloader import StatefulDataLoader

    def loader() -> Any:
        sampler: Any = DistributedSampler(range(12), shuffle=False)  # type: ignore[arg-type]
        return StatefulDataLoader(range(12), batch_size=2, sampler=sampler, num_workers=1)  # type: ignore[arg-type]

    first, second = loader(), loader()
    stream = iter(first)
    before = next(stream).tolist()
    second.load_state_dict(first.state_dict())
    return before, [x for batch in second for x in batch.tolist()]


def tiny() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            vocab_size=32,
            max_position_embeddings=16,
            tie_word_embeddings=True,
        )
    )


def saved(acc: Accelerator, folder: str) -> dict[str, Any]:
    """A model trained for a step and saved by us, opened by transformers, safetensors and torch.export."""
    from safetensors.torch import load_file
    from transformers import LlamaForCausalLM

    model = acc.prepare(tiny())
    optimizer = acc.prepare(torch.optim.SGD(model.parameters(), lr=0.1))
    ids = torch.arange(8).reshape(1, 8) + acc.process_index
    acc.backward(model(input_ids=ids, labels=ids).loss)
    optimizer.step()
    acc.save_model(model, f"{folder}/model")
    inner = acc.unwrap_model(model).eval()
    if not acc.is_main_process:
        return {}
    inner.config.save_pretrained(f"{folder}/model")
    again = LlamaForCausalLM.from_pretrained(f"{folder}/model").eval()
    tensors = load_file(f"{folder}/model/model.safetensors")
    with torch.no_grad():
        expected = inner(input_ids=ids).logits
        same = torch.equal(again(input_ids=ids).logits, expected)
        program = torch.export.export(again, (), {"input_ids": ids, "use_cache": False}, strict=False)
        torch.export.save(program, f"{folder}/model.pt2")
        exported = torch.export.load(f"{folder}/model.pt2").module()(input_ids=ids, use_cache=False)
    weight = "model.layers.0.self_attn.q_proj.weight"
    return {
        "transformers": same,
        "safetensors": torch.equal(tensors[weight], inner.state_dict()[weight]),
        "tied once": sum("embed_tokens" in name or "lm_head" in name for name in tensors),
        "export": float((exported["logits"] - expected).abs().max()),
    }


def trained(folder: str) -> dict[str, Any]:
    """peft's adapters trained by the Trainer on a data set of datasets'."""
    import datasets
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments

    model: Any = get_peft_model(
        tiny(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    frozen = model.base_model.model.lm_head.weight.detach().clone()
    rows = [[(start + at) % 32 for at in range(8)] for start in range(64)]
    samples = datasets.Dataset.from_dict({"input_ids": rows, "labels": rows})
    arguments = TrainingArguments(
        output_dir=f"{folder}/out",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=12,
        learning_rate=0.05,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        use_cpu=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=samples)
    trainer.train()
    adapters = torch.cat([p.detach().flatten() for name, p in model.named_parameters() if "lora_" in name])
    if arguments.process_index == 0:
        model.save_pretrained(f"{folder}/adapter")
    return {
        "world": arguments.world_size,
        "steps": trainer.state.global_step,
        "adapters": adapters,
        "frozen": torch.equal(frozen, model.base_model.model.lm_head.weight),
        "history": [one["loss"] for one in trainer.state.log_history if "loss" in one],
    }


@pytest.fixture(scope="module")
def run(warm: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, list[dict[str, Any]], Path]:
    folder = tmp_path_factory.mktemp("ecosystem")
    variables = {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "cache"),
        "HF_HOME": str(folder / "hf"),
    }
    started = launch(everything, str(folder), num_processes=2, env=variables, stall_after=0)
    return started, list(started.result()), folder


Ran = tuple[Run, list[dict[str, Any]], Path]


def test_map_style_data_set_is_divided_and_each_sample_counted_once(run: Ran) -> None:
    (own, seen), (others, _) = (found["map"] for found in run[1])
    assert sorted(own + others) == [2 * x for x in range(16)]
    assert abs(len(own) - len(others)) <= 1
    assert sorted(seen) == [2 * x for x in range(16)]


def test_bar_of_datasets_is_progress_of_its_rank(run: Ran) -> None:
    for rank in run[0].state.ranks:
        bars = {name: bar for name, bar in rank.progress.items() if "double" in name}
        assert [(bar.step, bar.total) for bar in bars.values()] == [(16, 16)]


def test_iterable_is_divided_by_us_or_by_its_own_shards(run: Ran) -> None:
    (prepared, native), (other_prepared, other_native) = (found["iterable"] for found in run[1])
    assert sorted(prepared + other_prepared) == list(range(16))
    assert sorted(native + other_native) == list(range(16))
    assert set(native) in ({0, 1, 2, 3, 8, 9, 10, 11}, {0, 1, 2, 3, 4, 5, 6, 7})  # whole shards of four


def test_torchdata_loader_goes_on_where_its_state_was_taken(run: Ran) -> None:
    assert [found["torchdata"] for found in run[1]] == [
        ([0, 2], [4, 6, 8, 10]),
        ([1, 3], [5, 7, 9, 11]),
    ]


def test_saved_model_is_opened_by_transformers_safetensors_and_export(run: Ran) -> None:
    found = run[1][0]["saved"]
    assert found.pop("export") < 1e-5
    assert found == {"transformers": True, "safetensors": True, "tied once": 1}


def test_trainer_with_adapters_is_synchronised_and_learns(run: Ran) -> None:
    one, other = (found["trainer"] for found in run[1])
    assert (one["world"], one["steps"], other["steps"]) == (2, 12, 12)
    assert torch.equal(one["adapters"], other["adapters"])
    assert one["frozen"]
    assert one["history"][-1] < one["history"][0]
    assert (run[2] / "adapter" / "adapter_model.safetensors").is_file()


def test_trainer_reaches_the_dashboard_by_itself(run: Ran) -> None:
    state, history = run[0].state, run[1][0]["trainer"]["history"]
    for rank in state.ranks:
        bar = rank.progress["train"]
        assert (bar.step, bar.total, bar.unit) == (12, 12, "step")
    points = state.ranks[0].curves["loss"].all_points()
    assert [step for step, _ in points] == list(range(1, 13))
    assert [value for _, value in points] == pytest.approx(history, rel=1e-3)
    assert "train_runtime" not in state.ranks[0].curves
    assert run[0].folder is not None
    events = (run[0].folder / "events.jsonl").read_text().splitlines()
    parts = [line for line in events if '"name": "train"' in line and '"times"' in line]
    assert parts
    assert all(name in "".join(parts) for name in ("data", "forward", "backward", "optimizer"))
