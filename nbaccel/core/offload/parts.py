"""A model cut into the parts that are placed one by one: what each holds, and what it costs to run."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from nbaccel.core.model import composed
from nbaccel.errors import ConfigError

__all__ = ["Cost", "Part", "group_tied", "human", "listed", "parts_of"]

# These use their children's weights without calling the children.
_WHOLE = (nn.MultiheadAttention, nn.RNNBase, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
_TABLES = (nn.Embedding, nn.EmbeddingBag)
_LISTS = (nn.ParameterList, nn.ParameterDict)
_CONVOLUTIONS = (nn.modules.conv._ConvNd,)
_POSITIONS = 256
"""Of a convolution's output per sample, where no batch tells: ResNet-50 has 174 on average, VGG-16 a thousand."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What a part holds and takes to run; parts that are alike share one."""

    num_bytes: int
    """Of its parameters, those of an earlier part left out."""
    buffer_bytes: int
    flops: float
    """Per token: a row of a matrix product; a sample, of which a convolution sees many positions."""
    rows: int
    """Of an embedding table, of which a forward pass reads one per token; 0 for anything else."""
    read_always: int
    """Bytes of its parameters that every forward pass reads: all but tables of embeddings and experts inside."""
    read_per_token: int
    """Bytes of the tables' rows, and of the experts that a token is given to."""


@dataclass(slots=True, eq=False)  # not frozen: thousands are made, and that takes thrice as long
class Part:
    """A module that is never divided, or the tensors that a divided module has of its own.

    Parts that share a parameter are placed together; the first of them counts its bytes.
    """

    name: str
    """The module's name; for a divided module's own tensors, the name of the module that uses them."""
    own: bool
    """Whether these are a divided module's own tensors, present while that module runs."""
    module: nn.Module
    owners: Sequence[tuple[str, nn.Module]]
    """Whose tensors these are, with their names; empty: the module itself."""
    cost: Cost
    ties: tuple[int, ...] = ()
    """Ids of parameters it shares with other parts."""

    @property
    def parameters(self) -> Iterator[tuple[nn.Module, str, str, nn.Parameter]]:
        """(owner, attribute, full name, parameter) of each, ties included."""
        for path, owner in self.owners or ((self.name, self.module),):
            for key, parameter in owner._parameters.items():
                if parameter is not None:
                    yield owner, key, f"{path}.{key}" if path else key, parameter

    @property
    def buffers(self) -> Iterator[tuple[nn.Module, str, str, torch.Tensor]]:
        """The same of its buffers."""
        for path, owner in self.owners or ((self.name, self.module),):
            for key, buffer in owner._buffers.items():
                if buffer is not None:
                    yield owner, key, f"{path}.{key}" if path else key, buffer

    @property
    def keys(self) -> tuple[str, ...]:
        """What a device map calls it: the module, or each of the tensors."""
        if not self.own:
            return (self.name,)
        return (*(full for _, _, full, _ in self.parameters), *(full for _, _, full, _ in self.buffers))

    @property
    def shares(self) -> dict[str, float]:
        """How much of it each of its keys has."""
        sizes = {full: t.nbytes for tensors in (self.parameters, self.buffers) for _, _, full, t in tensors}
        total = sum(sizes.values())
        return {key: sizes[key] / total if self.own and total else 1 / len(self.keys) for key in self.keys}


def parts_of(
    model: nn.Module,
    *,
    no_split: Collection[str | type] | None = None,
    dtype: torch.dtype | None = None,
    special_dtypes: Mapping[str, torch.dtype] | None = None,
    divided: Collection[str] = (),
) -> list[Part]:
    """The model's parts, in the order of registration. Linear in the number of modules.

    Args:
        no_split: classes never to be divided, or their names; None: those the model names itself in
            `_no_split_modules`, as Hugging Face's do.
        dtype: what floating-point parameters will be held in; None: as they are.
        special_dtypes: the same, for single parameters by name.
        divided: names of modules or tensors that a device map places by themselves: what is above them
            is divided whatever its class.

    Raises:
        ConfigError: `no_split` holds what is no class.
    """
    classes = frozenset(_own_no_split(model) if no_split is None else _names_of(no_split))
    above = {name[:dot] for name in divided for dot, letter in enumerate(name) if letter == "."}
    walk = _Walk(classes, dtype, special_dtypes or {}, above, _Experts.of(model))
    parts = walk.parts(model)
    if no_split is not None and classes and not any(walk.has(name) for name in classes):
        warnings.warn(
            f"no_split_module_classes names {listed(sorted(classes))}, and this {type(model).__name__} has no module "
            "of such a class",
            UserWarning,
            stacklevel=4,
        )
    return parts


def _names_of(classes: Collection[str | type]) -> Iterator[str]:
    for one in [classes] if isinstance(classes, (str, type)) else classes:
        if not isinstance(one, (str, type)):
            raise ConfigError(f"no_split_module_classes holds {one!r}: give classes, or their names")
        yield one if isinstance(one, str) else one.__name__


def _own_no_split(model: nn.Module) -> Collection[str]:
    named = getattr(model, "_no_split_modules", None)
    return named if isinstance(named, (list, tuple, set, frozenset)) else ()


@dataclass(frozen=True, slots=True)
class _Class:
    """What is the same for all modules of one class."""

    called: bool
    """Whether its forward is called."""
    whole: bool
    table: bool
    positions: int
    """How often its weights are used per token."""
    looks_ahead: bool
    """Whether it looks at the weights of its first layer before it calls it."""

    @classmethod
    def of(cls, found: type[nn.Module]) -> _Class:
        if issubclass(found, torch.jit.ScriptModule):
            raise ConfigError("a ScriptModule cannot be placed: its weights are used where no hook sees it")
        if issubclass(found, nn.modules.lazy.LazyModuleMixin):
            raise ConfigError(f"a {found.__name__} has no shape yet: call the model once before it is placed")
        return cls(
            found.forward is not nn.Module.forward and not issubclass(found, _LISTS),
            issubclass(found, _WHOLE),
            issubclass(found, _TABLES),
            _POSITIONS if issubclass(found, _CONVOLUTIONS) else 1,
            issubclass(found, nn.TransformerEncoder),
        )


@dataclass(frozen=True, slots=True)
class _Experts:
    """Of a mixture of experts, as Hugging Face's configurations describe it."""

    num: int
    share: float
    """Of the experts' weights that a token needs."""

    @classmethod
    def of(cls, model: nn.Module) -> _Experts | None:
        config = getattr(model, "config", None)
        config = getattr(config, "text_config", None) or config
        used = getattr(config, "num_experts_per_tok", None)
        named = (
            getattr(config, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts")
        )
        num = next((found for found in named if isinstance(found, int)), 0)
        return cls(num, used / num) if isinstance(used, int) and 0 < used < num else None

    def have(self, path: str, parameter: nn.Parameter) -> bool:
        """Whether a parameter of the module at `path` is one expert's, or holds all experts, one after the other."""
        return ".experts." in path or (parameter.dim() > 2 and len(parameter) == self.num)


class _Itemsizes(dict[torch.dtype, int]):
    """Bytes of an element by its present type."""

    def __init__(self, wanted: torch.dtype | None) -> None:
        self._wanted = wanted

    def __missing__(self, dtype: torch.dtype) -> int:
        kept = dtype if self._wanted is None or not dtype.is_floating_point else self._wanted
        self[dtype] = kept.itemsize
        return kept.itemsize


class _Walk:
    """Visits each module once. Written for speed: a device map of thousands of modules takes milliseconds."""

    def __init__(
        self,
        no_split: frozenset[str],
        dtype: torch.dtype | None,
        special: Mapping[str, torch.dtype],
        divided: Collection[str],
        experts: _Experts | None,
    ) -> None:
        self._no_split, self._special, self._divided, self._experts = no_split, special, divided, experts
        self._itemsizes = _Itemsizes(dtype)
        self._classes: dict[type[nn.Module], _Class] = {}
        self._modules: set[int] = set()
        self._users: dict[int, int] = {}
        """Index of the last part that uses a parameter, by the parameter's id."""
        self._ties: dict[int, list[int]] = {}
        """Indices of all parts that use a parameter, where there are several."""
        self._costs: dict[tuple[float, ...], Cost] = {}
        self._found: list[Part] = []

    def parts(self, model: nn.Module) -> list[Part]:
        self._visit("", model, "", model)
        for identity, indices in self._ties.items():
            for index in indices:
                self._found[index].ties += (identity,)
        return self._found

    def has(self, name: str) -> bool:
        """Whether a module of a class of that name has been visited."""
        return any(found.__name__ == name for found in self._classes)

    def _visit(self, name: str, module: nn.Module, caller_name: str, caller: nn.Module) -> None:
        """`caller` is the nearest module above, or this one, whose forward is called."""
        identity = id(module)
        if identity in self._modules:
            return
        self._modules.add(identity)
        kind = self._kind(module)
        if kind.called or not name:
            caller_name, caller = name, module
        children = module._modules
        if kind.called and not children:
            self._add(name, False, module, (), ((name, module, kind),))
            return
        kept = type(module).__name__ in self._no_split and name not in self._divided
        if kind.called and (kept or kind.whole):
            below = list(_tensors(name, module))
            self._add(name, False, module, below, [(path, one, self._kind(one)) for path, one in below])
            self._modules.update(id(one) for _, one in below)
            return
        if module._parameters or module._buffers:
            self._add(caller_name, True, caller, [(name, module)], ((name, module, kind),))
        prefix = f"{name}." if name else ""
        if kind.looks_ahead:
            self._add_first_layer(name, prefix, module)
        for key, child in children.items():
            if child is not None:
                self._visit(prefix + key, child, caller_name, caller)

    def _add_first_layer(self, name: str, prefix: str, encoder: nn.Module) -> None:
        """That of a TransformerEncoder is there while the encoder runs: it chooses its kernels by its weights."""
        first = next(iter(encoder.layers), None)  # type: ignore[arg-type]  # a ModuleList
        if isinstance(first, nn.TransformerEncoderLayer) and id(first) not in self._modules:
            below = list(_tensors(f"{prefix}layers.0", first))
            self._add(name, True, encoder, below, [(path, one, self._kind(one)) for path, one in below])
            self._modules.update(id(one) for _, one in below)

    def _kind(self, module: nn.Module) -> _Class:
        found = self._classes.get(type(module))
        if found is None:
            found = self._classes[type(module)] = _Class.of(type(module))
        return found

    def _add(
        self,
        name: str,
        own: bool,
        module: nn.Module,
        owners: Sequence[tuple[str, nn.Module]],
        holders: Iterable[tuple[str, nn.Module, _Class]],
    ) -> None:
        users, itemsizes, special, experts = self._users, self._itemsizes, self._special, self._experts
        index = len(self._found)
        num_bytes = buffer_bytes = always = per_token = rows = 0
        flops = 0.0
        has_any = False
        for path, owner, kind in holders:
            if kind.table and not own and owner is module:
                rows = int(owner.num_embeddings)  # type: ignore[arg-type]
            for key, parameter in owner._parameters.items():
                if parameter is None:
                    continue
                has_any = True
                identity = id(parameter)
                last = users.get(identity)
                if last == index:
                    continue
                users[identity] = index
                count = parameter.numel()
                size = 0
                if last is not None:
                    self._ties.setdefault(identity, [last]).append(index)
                elif special:
                    size = count * self._itemsize(f"{path}.{key}" if path else key, parameter.dtype)
                elif type(parameter) is not nn.Parameter and composed.is_composed(parameter):
                    size = sum(part.nbytes for _, part in composed.parts_of(parameter))
                else:
                    size = count * itemsizes[parameter.dtype]
                num_bytes += size
                if kind.table and count:
                    per_token += size // int(owner.num_embeddings)  # type: ignore[arg-type]
                    continue
                share = 1.0
                if experts is not None and experts.have(path, parameter):
                    share = experts.share
                    per_token += int(size * share)
                else:
                    always += size
                if not rows and parameter.dim() > 1:
                    flops += 2 * count * kind.positions * share
            for key, buffer in owner._buffers.items():
                if buffer is not None:
                    has_any = True
                    converted = key not in owner._non_persistent_buffers_set
                    itemsize = itemsizes[buffer.dtype] if converted else buffer.element_size()
                    buffer_bytes += buffer.numel() * itemsize
        if has_any:
            numbers = (num_bytes, buffer_bytes, flops, rows, always, per_token)
            cost = self._costs.get(numbers)
            if cost is None:
                cost = self._costs[numbers] = Cost(*numbers)
            self._found.append(Part(name, own, module, owners, cost))

    def _itemsize(self, name: str, dtype: torch.dtype) -> int:
        wanted = self._special.get(name)
        return wanted.itemsize if wanted is not None and dtype.is_floating_point else self._itemsizes[dtype]


def _tensors(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The module and those below it, with their names."""
    yield from ((f"{name}.{key}" if name and key else name or key, m) for key, m in module.named_modules())


def group_tied(parts: Sequence[Part]) -> Sequence[Sequence[int]]:
    """Indices of the parts that have to lie in one place, each group at its first part's turn."""
    if not any(part.ties for part in parts):
        # not lists, which would wake the garbage collector
        return [range(index, index + 1) for index in range(len(parts))]
    first: dict[int, int] = {}
    above = list(range(len(parts)))

    def find(index: int) -> int:
        while above[index] != index:
            index = above[index]
        return index

    for index, part in enumerate(parts):
        for tie in part.ties:
            other, mine = find(first.setdefault(tie, index)), find(index)
            above[max(other, mine)] = min(other, mine)
    groups: dict[int, list[int]] = {}
    for index, higher in enumerate(above):
        groups.setdefault(index if higher == index else find(index), []).append(index)
    return list(groups.values())


def listed(names: Sequence[str], most: int = 6) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def human(num_bytes: float) -> str:
    """ "12.3 MB": powers of ten, as limits are given."""
    size = abs(num_bytes)
    power = 0 if size < 1 else min(4, int(math.log10(size) // 3))
    unit = ("B", "KB", "MB", "GB", "TB")[power]
    return f"{num_bytes / 1000**power:.{0 if power == 0 else 1}f} {unit}"
