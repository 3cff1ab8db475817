"""What accelerate's scripts ask Hugging Face's hub for, made small and laid where the libraries look first: folders
of these names in the working folder."""

from __future__ import annotations

import json
from pathlib import Path

__all__ = ["MODEL", "make_hub", "variables"]

MODEL = "hf-internal-testing/mrpc-bert-base-cased"
"""The name of the model and of its tokenizer."""
_WORDS = ("a", "cat", "dog", "is", "not", "the", "same", "as", "an", "other", "one", "two", "three")
_SIZES = {"train": 128, "validation": 40}
_METRIC = """
import datasets
import evaluate


class Glue(evaluate.Metric):
    def _info(self):
        numbers = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=numbers)

    def _compute(self, predictions, references):
        pairs = list(zip(predictions, references))
        both = sum(a == b == 1 for a, b in pairs)
        ones = sum(predictions) + sum(references)
        return {"accuracy": sum(a == b for a, b in pairs) / len(pairs), "f1": 2 * both / ones if ones else 0.0}
"""


def make_hub(folder: Path) -> None:
    """A two-class BERT of random weights with a tokenizer, GLUE's MRPC with short sentences, and its metric."""
    data = folder / "nyu-mll" / "glue"
    data.mkdir(parents=True)
    files = "\n".join(f"  - split: {split}\n    path: {split}.jsonl" for split in _SIZES)
    (data / "README.md").write_text(f"---\nconfigs:\n- config_name: mrpc\n  data_files:\n{files}\n---\n")
    for split, size in _SIZES.items():
        (data / f"{split}.jsonl").write_text("".join(f"{json.dumps(_row(at))}\n" for at in range(size)))
    (folder / "glue").mkdir()
    (folder / "glue" / "glue.py").write_text(_METRIC)
    _make_model(folder / MODEL)


def variables(folder: Path) -> dict[str, str]:
    """Environment in which nothing is looked for elsewhere."""
    return {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home"), "TOKENIZERS_PARALLELISM": "false"}


def _row(at: int) -> dict[str, object]:
    first = [_WORDS[(at * step) % len(_WORDS)] for step in range(2, 4 + at % 5)]
    second = first if at % 3 else first[::-1]
    return {"idx": at, "sentence1": " ".join(first), "sentence2": " ".join(second), "label": int(at % 3 > 0)}


def _make_model(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    words = {word: at for at, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", *_WORDS))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", words["[CLS]"]), ("[SEP]", words["[SEP]"])],
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=128
    )
    fast.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    fast.save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=128,
        num_labels=2,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
