"""What was asked of a run: one frozen value that the launch, YAML, the CLI and the training core share.

None means "not asked". Whoever honours an option reads it here; whoever is asked for something else
than what stands here gets a ConfigError naming both places. Travels to the ranks as JSON in the
environment variable `RUN_CONFIG_VARIABLE`. This module reads no environment itself.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from nbaccel.checks import did_you_mean, which_there_are
from nbaccel.errors import ConfigError
from nbaccel.fp8 import FP8Options
from nbaccel.parallel import (
    FSDP,
    ContextParallel,
    DDPOptions,
    DeepSpeed,
    Megatron,
    Pipeline,
    TensorParallel,
    named,
    read_options,
)

__all__ = [
    "RUN_CONFIG_VARIABLE",
    "Device",
    "Precision",
    "RunConfig",
    "TrackerName",
    "combine",
    "duration_seconds",
]

RUN_CONFIG_VARIABLE = "NBACCEL_RUN_CONFIG"

Device = Literal["auto", "cpu", "cuda", "xpu", "mps", "tpu"]
TpuRuntime = Literal["torch_xla", "torch_tpu"]
Precision = Literal["no", "fp16", "bf16", "auto", "fp8"]
StartMethod = Literal["fork", "spawn"]
TrackerName = Literal["jsonl", "csv", "tensorboard", "wandb", "mlflow", "comet_ml", "trackio", "aim", "all"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "device": get_args(Device),
    "mixed_precision": get_args(Precision),
    "start_method": get_args(StartMethod),
    "tpu_runtime": get_args(TpuRuntime),
    "returns": ("all", "rank0", "none"),
    "output": ("auto", "all", "rank0", "none"),
    "strategy": (
        *("auto", "single", "ddp", "xla", "fsdp", "tensor_parallel", "context_parallel", "pipeline"),
        *("deepspeed", "megatron"),
    ),
    "log_with": get_args(TrackerName),
    "loss_weighting": ("samples", "equal"),
    "scheduler_steps": ("one", "per_rank"),
    "shard": ("interleaved", "contiguous", "node", "none"),
    "check_collectives": ("sampled", "always", "never"),
}
_FLAGS = (
    "step_scheduler_with_optimizer",
    "split_batches",
    "even_batches",
    "dispatch_batches",
    "per_sample_seed",
    "verify",
    "xla_spmd",
)
_OPTIONS: dict[str, type] = {
    "ddp": DDPOptions,
    "fsdp": FSDP,
    "tensor_parallel": TensorParallel,
    "deepspeed": DeepSpeed,
    "context_parallel": ContextParallel,
    "pipeline": Pipeline,
    "megatron": Megatron,
    "fp8": FP8Options,
}
_COMPILE_MODES = ("default", "lite", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
_MOST_SEED = 2**63
"""Torch's generators take no larger one."""
_MOST_SECONDS = 1e9
"""Some thirty years; a `timedelta` holds no more than a hundred times that."""
_TEXTS = ("project_dir", "stop_after", "resume")
# Known from elsewhere under another name.
_ELSEWHERE: dict[str, dict[str, str]] = {
    "strategy": {"megatron_lm": "here it is 'megatron', or Megatron(size=…)"},
    "device": dict.fromkeys(("gpu", "nvidia", "rocm"), "here it is 'cuda', on AMD's too"),
    "mixed_precision": {
        **dict.fromkeys(("fp32", "float32", "32"), "here it is 'no'"),
        **dict.fromkeys(("float16", "half", "16"), "here it is 'fp16'"),
    },
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """The options of a run. Every field is None unless somebody asked for it.

    Raises:
        ConfigError: a value that can never be honoured; the message names where it was asked.
    """

    num_processes: int | None = None
    """Ranks on this host."""
    device: Device | None = None
    """Kind of device the ranks compute on; "auto" is the accelerators present, else the CPU."""
    devices: tuple[int, ...] | Literal["free"] | None = None
    """Indices of the accelerators to use, in rank order; "free" takes the least used ones."""
    tpu_runtime: TpuRuntime | None = None
    """What drives TPU chips."""
    xla_spmd: bool | None = None
    """One process computes on all TPU chips, its arrays sharded over them."""
    start_method: StartMethod | None = None
    """How ranks come to be: forked from a warm clean process, or spawned fresh."""
    mixed_precision: Precision | None = None
    """The numbers the model computes in."""
    fp8: Mapping[str, Any] | None = None
    """Options of mixed_precision "fp8", by the names of `FP8Options`."""
    strategy: str | None = None
    """How the model is spread over the ranks."""
    collective_timeout: float | None = None
    """Seconds a collective may take before it fails."""
    gradient_accumulation_steps: int | None = None
    """Micro-steps per optimizer step."""
    gradient_clipping: float | None = None
    """Largest norm of the gradients; `Accelerator.step` clips to it, `clip_grad_norm_` takes it when given none."""
    loss_weighting: Literal["samples", "equal"] | None = None
    """Whether micro-steps and ranks count by their samples or alike."""
    scheduler_steps: Literal["one", "per_rank"] | None = None
    """Scheduler steps per optimizer step."""
    step_scheduler_with_optimizer: bool | None = None
    """False when the loop steps the scheduler on its own account."""
    split_batches: bool | None = None
    """The loaders' batch size is that of all ranks together."""
    even_batches: bool | None = None
    """Fill the last batches with repeated samples."""
    dispatch_batches: bool | None = None
    """Rank 0 reads for all ranks."""
    shard: Literal["interleaved", "contiguous", "node", "none"] | None = None
    """Which samples are whose."""
    per_sample_seed: bool | None = None
    """Seed each sample's random numbers, so that augmentation resumes too."""
    ddp: Mapping[str, Any] | None = None
    """Options of the strategy "ddp", by the names of `DDPOptions`."""
    fsdp: Mapping[str, Any] | None = None
    """Options of the strategy "fsdp", by the names of `FSDP`."""
    deepspeed: Mapping[str, Any] | None = None
    """Options of the strategy "deepspeed", by the names of `DeepSpeed`."""
    tensor_parallel: Mapping[str, Any] | None = None
    """Options of tensor parallelism, by the names of `TensorParallel`: alone or with "fsdp"."""
    context_parallel: Mapping[str, Any] | None = None
    """Options of context parallelism, by the names of `ContextParallel`: alone or with "fsdp"."""
    pipeline: Mapping[str, Any] | None = None
    """Options of the strategy "pipeline", by the names of `Pipeline`."""
    megatron: Mapping[str, Any] | None = None
    """Options of the strategy "megatron", by the names of `Megatron`."""
    check_collectives: Literal["sampled", "always", "never"] | None = None
    """How often the ranks' arguments to collectives are compared."""
    seed: int | None = None
    """Seed of every generator; None leaves them as a fresh process has them."""
    compile: bool | str | None = None
    """Compile prepared models: True, or a mode of `torch.compile`."""
    log_with: tuple[str, ...] | None = None
    """Trackers to start."""
    project_dir: str | None = None
    """Where checkpoints and tracker files go."""
    save_every: int | str | None = None
    """Save a checkpoint every so many optimizer steps (int) or so much time ("15min")."""
    stop_after: str | None = None
    """Stop all ranks, saved, after this time ("11h30m")."""
    resume: Literal["auto"] | str | None = None
    """Go on from the newest complete checkpoint ("auto") or from this folder."""
    max_restarts: int | None = None
    """How many times a run is started again after a rank failed."""
    keep: int | None = None
    """How many complete checkpoints to keep."""
    verify: bool | None = None
    """Trust checks in the first steps."""
    sources: Mapping[str, str] = field(default_factory=dict, compare=False)
    """Where each value was asked, by option name; for messages."""

    def __post_init__(self) -> None:
        for name in ("num_processes", "gradient_accumulation_steps", "keep"):
            self._require_positive_int(name)
        for name, choices in _CHOICES.items():
            value = getattr(self, name, None)
            for one in value if name == "log_with" and isinstance(value, tuple) else (value,):
                if one is not None:
                    self._require_choice(name, one, choices)
        is_seed = isinstance(self.seed, int) and not isinstance(self.seed, bool)
        self._require("seed", is_seed and 0 <= (self.seed or 0) < _MOST_SEED, "an int from 0 to 2**63 - 1")
        if self.collective_timeout is not None:
            _require_seconds(self._where("collective_timeout"), self.collective_timeout)
        self._check_types()
        for name in ("save_every", "stop_after"):
            value = getattr(self, name)
            if isinstance(value, str):
                seconds = duration_seconds(value, what=self._where(name))
                self._require(name, name == "stop_after" or seconds > 0, "a time above 0")

    def _check_types(self) -> None:
        for name in _FLAGS:
            self._require(name, isinstance(getattr(self, name), bool), "true or false")
        for name in _TEXTS:
            value = getattr(self, name)
            wanted = "a time, as in '11h30m'" if name == "stop_after" else "text, and not empty"
            self._require(name, isinstance(value, str) and bool(value.strip()), wanted)
        self._require(
            "compile",
            isinstance(self.compile, bool) or self.compile in _COMPILE_MODES,
            f"true, false or a mode of torch.compile: {', '.join(map(repr, _COMPILE_MODES))}",
        )
        for name, kind in _OPTIONS.items():
            options = getattr(self, name)
            example = "{bucket_cap_mb: 50}" if name == "ddp" else "{size: 2}"
            self._require(name, isinstance(options, Mapping), f"options by name, as in {example}")
            if options is not None:
                read_options(kind, options, self._where(name))
        every, clip, listed = self.save_every, self.gradient_clipping, self.devices
        is_time = isinstance(every, str)
        self._require("save_every", is_time or _is_count(every), "steps (an int from 1) or a time ('15min')")
        is_norm = isinstance(clip, (int, float)) and not isinstance(clip, bool) and clip > 0
        self._require("gradient_clipping", is_norm, "a number above 0")
        indices = isinstance(listed, (tuple, list)) and all(type(one) is int for one in listed)
        self._require("max_restarts", _is_count(self.max_restarts, 0), "an int, 0 or more")
        self._require(
            "devices", indices or listed == "free", "indices ([4, 5]) or 'free'; how many is num_processes"
        )

    def _require(self, name: str, fits: bool, wanted: str) -> None:
        value = getattr(self, name)
        if value is not None and not fits:
            raise ConfigError(f"{self._where(name)} is {value!r}; it must be {wanted}")

    def _where(self, name: str) -> str:
        place = self.sources.get(name)
        return f"{name} (from {place})" if place else name

    def _require_positive_int(self, name: str) -> None:
        value = getattr(self, name)
        if value is None:
            return
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"{self._where(name)} must be an int, not {value!r}")
        if value < 1:
            raise ConfigError(f"{self._where(name)} must be at least 1, not {value}")

    def _require_choice(self, name: str, value: object, choices: tuple[str, ...]) -> None:
        elsewhere, word = _ELSEWHERE.get(name, {}), str(value).lower()
        if word in elsewhere:
            raise ConfigError(f"{self._where(name)} is {value!r}: {elsewhere[word]}")
        if value not in choices:
            allowed, hint = ", ".join(map(repr, choices)), did_you_mean(word, choices)
            raise ConfigError(f"{self._where(name)} is {value!r}; it must be one of {allowed}.{hint}")

    def to_json(self) -> str:
        """One line of JSON with what was asked, for the environment variable and the run folder."""
        values = {
            f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) not in (None, {})
        }
        return json.dumps(values, sort_keys=True, default=_refuse_code)

    @classmethod
    def names(cls) -> frozenset[str]:
        """The names of all options."""
        return frozenset(f.name for f in fields(cls))

    @classmethod
    def from_json(cls, text: str) -> RunConfig:
        """The value `to_json` wrote."""
        return cls.from_mapping(json.loads(text))

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], *, place: str = "") -> RunConfig:
        """A RunConfig from plain values; an unknown key is an error with the nearest name."""
        known = cls.names()
        values = {**values, **_expanded(values, place)}
        for key in values:
            if key not in known:
                hint = which_there_are(key, known - {"sources"})
                raise ConfigError(f"unknown option {key!r}{f' in {place}' if place else ''}{hint}")
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        if isinstance(plain.get("collective_timeout"), str):
            plain["collective_timeout"] = duration_seconds(
                plain["collective_timeout"], what="collective_timeout"
            )
        if isinstance(plain.get("log_with"), str):
            plain["log_with"] = (plain["log_with"],)
        if place and "sources" not in plain:
            plain["sources"] = {k: place for k, v in plain.items() if v is not None}
        return cls(**plain)

    def require(self, name: str, value: Any, *, place: str) -> Any:
        """The value in force for option `name` when `place` asks for `value` (None: does not ask).

        Raises:
            ConfigError: it was already asked with another value.
        """
        return getattr(combine(self, RunConfig.from_mapping({name: value}, place=place)), name)


def combine(*configs: RunConfig) -> RunConfig:
    """What all of them asked together.

    Raises:
        ConfigError: two ask for different values of one option; the message names both places.
    """
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for config in configs:
        for f in dataclasses.fields(RunConfig):
            value = getattr(config, f.name)
            if f.name == "sources" or value is None:
                continue
            place = config.sources.get(f.name, "an unnamed place")
            if f.name in values and values[f.name] != value:
                raise ConfigError(
                    f"{f.name} is asked twice: {values[f.name]!r} by {sources[f.name]} and {value!r} by {place}. "
                    "Ask for it in one place."
                )
            if f.name not in values:
                values[f.name], sources[f.name] = value, place
    return RunConfig(**values, sources=sources)


def _expanded(values: Mapping[str, Any], place: str) -> dict[str, Any]:
    """The keys that stand for a strategy given as an object."""
    found = named(values.get("strategy"), f"strategy (from {place})" if place else "strategy")
    twice = [key for key in found if key != "strategy" and values.get(key) is not None]
    if twice:
        raise ConfigError(
            f"{twice[0]} is asked twice{f' by {place}' if place else ''}: as an option and within strategy="
        )
    return found


def _refuse_code(value: object) -> Any:
    raise ConfigError(
        f"{value!r} cannot be asked of a launch, which sends names and numbers; give it to Accelerator(strategy=…)"
    )


_UNITS = {"d": 86400.0, "h": 3600.0, "min": 60.0, "m": 60.0, "s": 1.0}


def duration_seconds(text: str | float, *, what: str = "duration") -> float:
    """Seconds in "15min", "11h30m", "90s" or a plain number of seconds.

    Raises:
        ConfigError: not a duration.
    """
    import re

    if isinstance(text, (int, float)) and not isinstance(text, bool):
        _require_seconds(what, text)
        return float(text)
    if re.fullmatch(r"\d+(\.\d+)?", str(text).strip()):
        _require_seconds(what, float(text))
        return float(text)
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*(d|h|min|m|s)", str(text))
    if not parts or re.sub(r"(\d+(?:\.\d+)?)\s*(d|h|min|m|s)\s*", "", str(text)).strip():
        raise ConfigError(f"{what} is {text!r}: write it like '90s', '15min' or '11h30m'")
    return sum(float(number) * _UNITS[unit] for number, unit in parts)


def _is_count(value: object, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _require_seconds(what: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= _MOST_SECONDS:
        raise ConfigError(f"{what} must be a number of seconds above 0, not {value!r}")
