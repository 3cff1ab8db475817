"""Sharded training here and elsewhere: the same Llama, the same steps, in turns.

FSDP2 beside Hugging Face accelerate's, ZeRO-3 beside a loop written for DeepSpeed itself, whose sizes of buckets
are those that transformers derives from the model's width.

    python benchmarks/strategies.py                  2 ranks on the CPU
    python benchmarks/strategies.py --device cuda    one rank per GPU, bf16 (FSDP2 only)

Time: both train in the same ranks, a step of one and a step of the other, each first every second time; the ratio is
the median over these pairs, so that whatever else the machine does touches both alike. The processor time of a rank's
step is shown too, which that hardly touches. Then one step of each is looked at for its collectives.

Memory: each in a launch of its own, after it has rehearsed with a tiny model (imports, thread pools and buffers of the
library are then there), above what was in use before the model was made: allocated memory on a GPU, resident memory on
the CPU. The peak of preparing and that of training are two figures.

Both sides must hold equal shards and come to the same loss.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WARM = 4
"""Steps that are not timed: in the first ones ranks are compared, and the order noted in which parameters are used."""
_LEAN = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
"""Freed memory goes back to the system at once, slowly: what is measured is what is in use."""
PHASES = ("forward", "backward", "update")
"""The update is clipping, the optimizer's step and zero_grad."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """A model that one of the contenders has prepared."""

    step: Callable[[Callable[[str], None]], float]
    """A whole step, which tells the end of each phase; its loss."""
    held: int
    """Numbers of the parameters on this rank."""


def build(device: str, *, tiny: bool = False) -> Any:
    import transformers

    large = device == "cuda"
    config: Any = transformers.LlamaConfig(
        vocab_size=1024 if tiny or not large else 8192,
        hidden_size=32 if tiny else 2048 if large else 320,
        intermediate_size=64 if tiny else 5632 if large else 864,
        num_hidden_layers=2 if tiny else 16 if large else 8,
        num_attention_heads=16 if large else 8,
        num_key_value_heads=8 if large else 4,
    )
    return transformers.LlamaForCausalLM(config)


def prepare(name: str, device: str, *, tiny: bool = False) -> Training:
    """The model in the hands of a contender. The same values everywhere."""
    import torch

    torch.manual_seed(0)
    model = build(device, tiny=tiny)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    size = (8, 1024) if device == "cuda" and not tiny else (2, 64)
    tokens = torch.randint(1024, size, generator=torch.Generator().manual_seed(1)).to(device)
    make = with_deepspeed if name == "deepspeed" else with_accelerator
    return make(name, device, model, optimizer, tokens)


def with_accelerator(name: str, device: str, model: Any, optimizer: Any, tokens: Any) -> Training:
    """The loop that nbaccel and accelerate have in common."""
    acc = accelerator(name, device)
    model, optimizer = acc.prepare(model, optimizer)
    parameters = list(model.parameters())

    def step(mark: Callable[[str], None]) -> float:
        loss = model(tokens, labels=tokens).loss
        mark("forward")
        acc.backward(loss)
        mark("backward")
        acc.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mark("update")
        return float(loss.item())

    return Training(step=step, held=held(parameters))


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


def with_deepspeed(name: str, device: str, model: Any, optimizer: Any, tokens: Any) -> Training:
    """DeepSpeed's own engine and loop; `engine.step` clips and clears the gradients."""
    deepspeed: Any = importlib.import_module("deepspeed")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it is compiled first
    width = model.config.hidden_size
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        dist_init_required=False,
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

    def step(mark: Callable[[str], None]) -> float:
        loss = engine(tokens, labels=tokens).loss
        mark("forward")
        engine.backward(loss)
        mark("backward")
        engine.step()
        mark("update")
        return float(loss.item())

    return Training(step=step, held=held(list(engine.parameters())))


def held(parameters: Sequence[Any]) -> int:
    return sum(getattr(p, "ds_tensor", getattr(p, "_local_tensor", p)).numel() for p in parameters)


# A rank ------------------------------------------------------------------------------------------------


def times(names: Sequence[str], device: str, steps: int) -> dict[str, dict[str, Any]]:
    """A step of each in turns: of each contender the seconds of every step, the median of every phase, the last loss,
    and what its collectives moved in one more step."""
    import torch.distributed as dist

    trainings = {name: prepare(name, device) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    processor: dict[str, list[float]] = {name: [] for name in names}
    phases: dict[str, dict[str, list[float]]] = {name: {one: [] for one in PHASES} for name in names}
    loss = {}
    for number in range(WARM + steps):
        for name in names if number % 2 else reversed(names):
            dist.barrier()
            marks = [time.perf_counter()]
            worked = time.process_time()

            def mark(phase: str, marks: list[float] = marks) -> None:
                marks.append(time.perf_counter())

            loss[name] = trainings[name].step(mark)
            if number < WARM:
                continue
            seconds[name].append(time.perf_counter() - marks[0])
            processor[name].append(time.process_time() - worked)
            for phase, began, ended in zip(PHASES, marks, marks[1:], strict=False):
                phases[name][phase].append(ended - began)
    return {
        name: {
            "seconds": seconds[name],
            "processor": statistics.median(processor[name]),
            "phases": {phase: statistics.median(listed) for phase, listed in phases[name].items()},
            "loss": loss[name],
            "held": trainings[name].held,
            "collectives": collectives(trainings[name]),
        }
        for name in names
    }


def collectives(training: Training) -> dict[str, list[int]]:
    """How often each kind is called in a step, and the numbers in its largest tensor, added up."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        training.step(lambda phase: None)
    found: dict[str, list[int]] = {}
    for event in seen.events():
        if event.name.startswith("c10d::") and event.name != "c10d::barrier":
            shapes = [shape for shape in event.input_shapes if shape and isinstance(shape[0], int)]
            count = found.setdefault(event.name.removeprefix("c10d::").strip("_"), [0, 0])
            count[0] += 1
            count[1] += max((torch.Size(shape).numel() for shape in shapes), default=0)
    return found


class Memory:
    """The peak, in bytes, above what was in use when it was made."""

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"
        self._before = 0
        self.begin()
        self._before = self.peak()

    def begin(self) -> None:
        """A new peak."""
        import torch

        gc.collect()
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        import torch

        if self._cuda:
            return torch.cuda.max_memory_allocated() - self._before
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024 - self._before
        raise OSError("no VmHWM in /proc/self/status")


def memory(name: str, device: str) -> dict[str, int]:
    """Bytes: the peaks of preparing and of training, and what stays between two steps."""
    training = prepare(name, device, tiny=True)
    for _ in range(WARM):
        training.step(lambda phase: None)
    del training
    seen = Memory(device)
    training = prepare(name, device)
    found = {"preparing": seen.peak()}
    seen.begin()
    for _ in range(WARM):
        training.step(lambda phase: None)
    found["training"] = seen.peak()
    seen.begin()
    return {**found, "between steps": seen.peak()}


def work(asked: argparse.Namespace) -> None:
    """One rank of one launch."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if asked.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
        dist.init_process_group("gloo")
    answer: Any
    if asked.memory:
        answer = memory(asked.worker, asked.device)
    else:
        answer = times(asked.worker.split(","), asked.device, asked.steps)
    Path(f"{asked.out}{os.environ['RANK']}").write_text(json.dumps(answer))
    dist.barrier()
    dist.destroy_process_group()


# The comparison ----------------------------------------------------------------------------------------


def launch(worker: str, asked: argparse.Namespace, *options: str) -> list[Any]:
    """What each rank answers."""
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder, "rank"))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={asked.ranks}", str(Path(__file__).resolve()), "--worker", worker]
        command += ["--device", asked.device, "--steps", str(asked.steps), "--out", out, *options]
        root = str(Path(__file__).resolve().parent.parent)
        path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p)
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        if asked.device == "cpu":
            environment["ACCELERATE_USE_CPU"] = "true"
            environment |= _LEAN if "--memory" in options else {}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        answers = [Path(f"{out}{rank}") for rank in range(asked.ranks)]
        if not all(one.exists() for one in answers):
            raise SystemExit(f"{worker} failed:\n{done.stderr[-4000:]}")
        return [json.loads(one.read_text()) for one in answers]


def compare(ours: str, theirs: str, asked: argparse.Namespace) -> None:
    """Rounds of both, and the medians of their ratios."""
    ratios: dict[str, list[float]] = {}
    for number in range(asked.rounds):
        turns = (ours, theirs) if number % 2 == 0 else (theirs, ours)
        ranks = launch(",".join(turns), asked)
        told = {name: [rank[name] for rank in ranks] for name in turns}
        check_alike(told[ours], told[theirs])
        steps = {
            name: [max(one) for one in zip(*(r["seconds"] for r in told[name]), strict=True)]
            for name in turns
        }
        pairs = [one / other for one, other in zip(steps[ours], steps[theirs], strict=True)]
        ratios.setdefault("step", []).append(statistics.median(pairs))
        busy = {name: max(r["processor"] for r in told[name]) for name in turns}
        ratios.setdefault("processor time", []).append(busy[ours] / busy[theirs])
        used = {name: launch(name, asked, "--memory") for name in turns}
        most = {name: {kind: max(r[kind] for r in used[name]) for kind in used[name][0]} for name in turns}
        for kind in ("training", "preparing"):
            ratios.setdefault(f"peak of {kind}", []).append(most[ours][kind] / most[theirs][kind])
        for name in turns:
            if number == 0:
                print(f"{name}: {describe(told[name][0]['collectives'])}", flush=True)
            print(f"round {number}, {name}: {figures(steps[name], told[name][0], most[name])}", flush=True)
    for kind, listed in ratios.items():
        each = ", ".join(f"{ratio:.3f}" for ratio in listed)
        print(f"{ours}, {kind}: {statistics.median(listed):.3f} of {theirs}'s (each: {each})", flush=True)


def check_alike(one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> None:
    """Raises unless both trained the same, in equal shards."""
    held = [sum(rank["held"] for rank in ranks) for ranks in (one, other)]
    # small parameters that ZeRO keeps whole, and rows that shards are filled up with
    if abs(held[0] / held[1] - 1) > 0.05 or abs(one[0]["loss"] - other[0]["loss"]) > 1e-3:
        raise SystemExit(f"these are not the same training: {one}, {other}")


def describe(collectives: Mapping[str, Sequence[int]]) -> str:
    each = (f"{calls} {kind} of {moved / 1e6:.1f} M" for kind, (calls, moved) in sorted(collectives.items()))
    return f"a step's collectives: {', '.join(each)} numbers"


def figures(steps: Sequence[float], rank: Mapping[str, Any], used: Mapping[str, int]) -> str:
    phases = ", ".join(f"{phase} {seconds * 1e3:.1f}" for phase, seconds in rank["phases"].items())
    held = ", ".join(f"{kind} {count / 2**20:.1f}" for kind, count in used.items())
    return (
        f"{statistics.median(steps) * 1e3:.1f} ms a step ({phases}; processor {rank['processor'] * 1e3:.1f}); "
        f"MiB: {held}; loss {rank['loss']:.5f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20, help="pairs of steps in a round")
    parser.add_argument("--only", choices=("fsdp", "zero"), help="one of the two comparisons")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        work(asked)
        return
    pairs = {"fsdp": ("nbaccel", "accelerate")}
    if asked.device == "cpu" and importlib.util.find_spec("deepspeed"):
        pairs["zero"] = ("nbaccel zero-3", "deepspeed")
    for kind, (ours, theirs) in pairs.items():
        if asked.only in (None, kind):
            compare(ours, theirs, asked)


if __name__ == "__main__":
    main()
