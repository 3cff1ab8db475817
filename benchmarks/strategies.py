"""Sharded training here and elsewhere: the same Llama, the same steps, in turns.

FSDP2 beside Hugging Face accelerate's, ZeRO-3 beside a loop written for DeepSpeed itself, whose sizes of buckets
are those that transformers derives from the model's width.

    python benchmarks/strategies.py                  2 ranks on the CPU
    python benchmarks/strategies.py --device cuda    one rank per GPU, bf16 (FSDP2 only)

Step time is the median of a launch's steps, memory the peak of its fullest rank above what it had before
the model was made: allocated memory on a GPU; on the CPU resident memory, in a launch of its own. Launches
alternate, and so does who goes first; the ratios printed are medians over the rounds: they hold on a busy machine,
single times do not. Both sides must hold equal shards and come to the same loss.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WARM = 3
_LEAN = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
"""Freed memory goes back to the system at once, slowly: what is measured is what is in use."""


def build(device: str) -> Any:
    import transformers

    large = device == "cuda"
    config: Any = transformers.LlamaConfig(
        vocab_size=8192 if large else 1024,
        hidden_size=2048 if large else 320,
        intermediate_size=5632 if large else 864,
        num_hidden_layers=16 if large else 8,
        num_attention_heads=16 if large else 8,
        num_key_value_heads=8 if large else 4,
    )
    return transformers.LlamaForCausalLM(config)


def accelerator(name: str, device: str) -> Any:
    precision = "bf16" if device == "cuda" else "no"
    if name != "accelerate":
        import nbaccel

        strategy: Any = nbaccel.FSDP(wrap="LlamaDecoderLayer")
        if name == "nbaccel zero-3":
            strategy = nbaccel.DeepSpeed(stage=3)
        return nbaccel.Accelerator(strategy=strategy, mixed_precision=precision, cpu=device == "cpu")
    import accelerate

    plugin = accelerate.FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        reshard_after_forward=True,
    )
    acc = accelerate.Accelerator(fsdp_plugin=plugin, mixed_precision=precision, cpu=device == "cpu")
    if device == "cpu":
        # It knows FSDP on accelerators only, and on the CPU takes DDP without a word: its state is told otherwise.
        state: Any = importlib.import_module("accelerate.state")
        state.PartialState._shared_state["distributed_type"] = accelerate.DistributedType.FSDP
        state.AcceleratorState._shared_state["distributed_type"] = accelerate.DistributedType.FSDP
        acc.state.fsdp_plugin = plugin
    return acc


def zero(model: Any, optimizer: Any) -> Any:
    """DeepSpeed's own engine."""
    deepspeed: Any = importlib.import_module("deepspeed")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it is compiled first
    width = model.config.hidden_size
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 1.0,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {
                "stage": 3,
                "reduce_bucket_size": width * width,
                "stage3_prefetch_bucket_size": int(0.9 * width * width),
                "stage3_param_persistence_threshold": 10 * width,
            },
        },
    )
    return engine


class Memory:
    """The peak, in bytes, above what was in use when it was made."""

    def __init__(self, device: str) -> None:
        import torch

        self._cuda = device == "cuda"
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        self._before = self._peak()

    def _peak(self) -> int:
        import torch

        if self._cuda:
            return torch.cuda.max_memory_allocated()
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
        raise OSError("no VmHWM in /proc/self/status")

    def above(self) -> int:
        return self._peak() - self._before


def warm_up(name: str) -> None:
    """Modules that either side imports in its first step are no part of what a model takes."""
    import torch

    for module in (
        "torch._dynamo",
        "torch.distributed.fsdp",
        "torch.distributed.tensor",
        "torch.distributed.checkpoint",
    ):
        importlib.import_module(module)
    if name in ("deepspeed", "nbaccel zero-3"):
        importlib.import_module("deepspeed")
    model = build("cpu")
    model(torch.zeros(1, 4, dtype=torch.int64), labels=torch.zeros(1, 4, dtype=torch.int64)).loss.backward()
    torch.optim.AdamW(model.parameters()).step()


def work(name: str, device: str, steps: int, out: str) -> None:
    """One rank of one launch."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if name == "deepspeed":
        os.environ["DS_ACCELERATOR"] = "cpu"
        dist.init_process_group("gloo")
    else:
        acc = accelerator(name, device)
    torch.manual_seed(0)
    warm_up(name)
    memory = Memory(device)
    model = build(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if name == "deepspeed":
        engine = model = zero(model, optimizer)
    else:
        model, optimizer = acc.prepare(model, optimizer)
    parameters = list(model.parameters())
    held = sum(getattr(p, "ds_tensor", getattr(p, "_local_tensor", p)).numel() for p in parameters)
    size = (8, 1024) if device == "cuda" else (2, 64)
    tokens = torch.randint(1024, size, generator=torch.Generator().manual_seed(1)).to(device)
    times = []
    for _ in range(WARM + steps):
        started = time.perf_counter()
        loss = model(tokens, labels=tokens).loss
        if name == "deepspeed":
            engine.backward(loss)
            engine.step()
        else:
            acc.backward(loss)
            acc.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        last = loss.item()
        times.append(time.perf_counter() - started)
    answer = {"step": statistics.median(times[WARM:]), "memory": memory.above(), "loss": last, "held": held}
    Path(f"{out}{os.environ['RANK']}").write_text(json.dumps(answer))
    dist.destroy_process_group()


def launch(name: str, device: str, ranks: int, steps: int, *, lean: bool = False) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder, "rank"))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command += [str(Path(__file__).resolve()), "--worker", name, "--device", device]
        command += ["--steps", str(steps), "--out", out]
        root = str(Path(__file__).resolve().parent.parent)
        path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p)
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        if lean:
            environment |= _LEAN
        if device == "cpu" and name == "accelerate":
            environment["ACCELERATE_USE_CPU"] = "true"
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        answers = [Path(f"{out}{rank}") for rank in range(ranks)]
        if not all(one.exists() for one in answers):
            raise SystemExit(f"{name} failed:\n{done.stderr[-4000:]}")
        told = [json.loads(one.read_text()) for one in answers]
    return {
        "step": max(one["step"] for one in told),
        "memory": max(one["memory"] for one in told),
        "loss": told[0]["loss"],
        "held": sum(one["held"] for one in told) / ranks,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        work(asked.worker, asked.device, asked.steps, asked.out)
        return
    pairs = [("nbaccel", "accelerate")]
    if asked.device == "cpu" and importlib.util.find_spec("deepspeed"):
        pairs.append(("nbaccel zero-3", "deepspeed"))
    for ours, theirs in pairs:
        compare(ours, theirs, asked)


def compare(ours: str, theirs: str, asked: argparse.Namespace) -> None:
    """Both in turns, each round's times and memory, and the medians of their ratios."""
    ratios: dict[str, list[float]] = {"step": [], "memory": []}
    for number in range(asked.rounds):
        turns = (ours, theirs) if number % 2 == 0 else (theirs, ours)
        told = {name: launch(name, asked.device, asked.ranks, asked.steps) for name in turns}
        check_alike(told[ours], told[theirs])
        if asked.device == "cpu":
            for name, one in told.items():  # in the same turns
                one["memory"] = launch(name, asked.device, asked.ranks, 1, lean=True)["memory"]
        for kind, listed in ratios.items():
            listed.append(told[ours][kind] / told[theirs][kind])
        shown = [
            f"{name} {one['step'] * 1e3:.1f} ms, peak {one['memory'] / 2**20:.0f} MiB, loss {one['loss']:.5f}"
            for name, one in told.items()
        ]
        print(f"round {number}: {'; '.join(shown)}", flush=True)
    for kind, listed in ratios.items():
        print(
            f"{ours}, {kind}: {statistics.median(listed):.3f} of {theirs}'s (each: {[round(r, 3) for r in listed]})",
            flush=True,
        )


def check_alike(one: dict[str, float], other: dict[str, float]) -> None:
    """Raises unless both trained the same, in equal shards."""
    # small parameters that ZeRO keeps whole, and rows that shards are filled up with
    if abs(one["held"] / other["held"] - 1) > 0.05 or abs(one["loss"] - other["loss"]) > 1e-3:
        raise SystemExit(f"these are not the same training: {one}, {other}")


if __name__ == "__main__":
    main()
