"""accelerate's plugins for spreading and compiling models, turned into `strategy=` and `compile=`.

Options that are not listed here do not exist: the `TypeError` names them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from nbaccel.errors import ConfigError
from nbaccel.parallel import FSDP, SHARDING_OF_ACCELERATE, DeepSpeed, TensorParallel

__all__ = [
    "DeepSpeedPlugin",
    "FullyShardedDataParallelPlugin",
    "TorchDynamoPlugin",
    "TorchTensorParallelPlugin",
]


@dataclass
class FullyShardedDataParallelPlugin:
    """Sharding by FSDP; both versions become PyTorch's FSDP2."""

    fsdp_version: int | None = None
    sharding_strategy: Any = None
    reshard_after_forward: Any = None
    auto_wrap_policy: str | Callable[..., Any] | None = None
    transformer_cls_names_to_wrap: Sequence[str] | None = None
    min_num_params: int | None = None
    cpu_offload: Any = None
    activation_checkpointing: bool = False
    forward_prefetch: bool = False
    backward_prefetch: Any = None
    """FSDP2 gathers one block ahead by itself."""
    state_dict_type: Any = None
    """Checkpoints have one form here, which every strategy reads."""
    use_orig_params: bool | None = None
    """Always so in FSDP2."""
    sync_module_states: bool | None = None
    """Always so here: rank 0's parameters are everybody's."""
    limit_all_gathers: bool = True
    """Always so in FSDP2."""
    cpu_ram_efficient_loading: bool | None = None
    """Models are built empty with `init_empty_weights` here, and filled by `load_model`."""

    def strategy(self) -> FSDP:
        """The same as nbaccel has it.

        Raises:
            ConfigError: it has no counterpart.
        """
        reshard = self.reshard_after_forward
        asked = self.sharding_strategy if not isinstance(reshard, str) else reshard
        name = str(getattr(asked, "name", asked)).upper()
        if asked is not None and name not in SHARDING_OF_ACCELERATE:
            raise ConfigError(
                f"sharding_strategy={asked!r} has no counterpart; there are {', '.join(SHARDING_OF_ACCELERATE)}"
            )
        return FSDP(
            sharding=SHARDING_OF_ACCELERATE.get(name, "full_shard"),
            wrap=self._wrap(),
            reshard_after_forward=reshard if isinstance(reshard, (bool, int)) else None,
            cpu_offload=bool(getattr(self.cpu_offload, "offload_params", self.cpu_offload)),
            activation_checkpointing=self.activation_checkpointing,
            forward_prefetch=int(self.forward_prefetch),
        )

    def _wrap(self) -> Any:
        policy = str(self.auto_wrap_policy or "").lower()
        if callable(self.auto_wrap_policy):
            raise ConfigError(
                "auto_wrap_policy as a function: give strategy=FSDP(wrap=a function of a module)"
            )
        if policy == "no_wrap":
            return "none"
        if policy == "size_based_wrap" or (not policy and self.min_num_params):
            return self.min_num_params or 100_000_000
        names = self.transformer_cls_names_to_wrap
        if isinstance(names, str):
            names = [name.strip() for name in names.split(",")]
        return list(names) if names else "auto"


@dataclass
class DeepSpeedPlugin:
    """DeepSpeed's ZeRO."""

    hf_ds_config: Any = None
    gradient_accumulation_steps: int | str | None = None
    gradient_clipping: float | str | None = None
    zero_stage: int | None = None
    offload_optimizer_device: str | None = None
    offload_param_device: str | None = None
    offload_optimizer_nvme_path: str | None = None
    offload_param_nvme_path: str | None = None
    zero3_init_flag: bool | None = None
    """Models are built empty with `init_empty_weights` here."""
    zero3_save_16bit_model: bool | None = None
    """`save_model` writes whole weights under every strategy."""

    def strategy(self) -> DeepSpeed:
        """The same as nbaccel has it."""
        config = getattr(self.hf_ds_config, "config", self.hf_ds_config)
        stage = self.zero_stage if self.zero_stage is not None else None if config is not None else 2
        given: dict[str, Any] = {
            "stage": stage,
            "config": config,
            "offload_optimizer": _place(self.offload_optimizer_device),
            "offload_param": _place(self.offload_param_device),
            "nvme_path": self.offload_optimizer_nvme_path or self.offload_param_nvme_path,
        }
        return DeepSpeed(**{name: value for name, value in given.items() if value is not None})

    def number(self, name: str) -> Any:
        """An option that is a number; None for "auto" and where it was not given."""
        value = getattr(self, name)
        return None if value == "auto" else value


def _place(device: str | None) -> str | None:
    return None if device in (None, "none") else device


@dataclass
class TorchTensorParallelPlugin:
    """Tensor parallelism."""

    tp_size: int = 1

    def strategy(self) -> TensorParallel:
        """The same as nbaccel has it."""
        return TensorParallel(size=self.tp_size)


@dataclass
class TorchDynamoPlugin:
    """torch.compile with inductor."""

    backend: Any = None
    mode: str | None = None
    fullgraph: bool | None = None
    dynamic: bool | None = None
    options: Any = None
    disable: bool = False
    use_regional_compilation: bool | None = None
    """Always so here where blocks repeat in an nn.Sequential."""

    def compile(self) -> bool | str | None:
        """What `Accelerator(compile=...)` takes.

        Raises:
            ConfigError: another backend, or options that are not passed on.
        """
        backend = str(getattr(self.backend, "value", self.backend) or "no").lower()
        if self.disable or backend == "no":
            return None
        if backend != "inductor" or self.fullgraph or self.dynamic is not None or self.options:
            raise ConfigError(
                "TorchDynamoPlugin: nbaccel compiles with inductor, by a mode; for other backends, fullgraph, dynamic "
                "or options call torch.compile on the model yourself"
            )
        return self.mode or True
