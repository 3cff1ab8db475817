"""Bringing a layer's weights just before it runs and taking them away after, the next ones on the way meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from nbaccel.core.model.hooks import Hook
from nbaccel.core.nested import leaves, map_tensors
from nbaccel.core.offload.blocks import Block, Buffer, Buffers
from nbaccel.core.offload.direct import DirectReader
from nbaccel.core.offload.units import Order, Unit, begins_again_after_fork
from nbaccel.errors import ConfigError

__all__ = ["Streamer", "answer_on", "compute_on", "return_to_caller"]

_is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # torch 2.6 may not have it


@dataclass(slots=True, eq=False)
class _State:
    """Of a block: who uses it, and the copy that brings or has brought it."""

    users: int = 0
    buffer: Buffer | None = None
    coming: Future[Any] | None = None
    placed: bool = False


@final
class Streamer:
    """Brings blocks to `device`, where they run. Any number of threads may run the model at once.

    Args:
        room: bytes of blocks that may be on the device.
        reader: of weights on a disk that the page cache cannot hold.
    """

    def __init__(
        self, units: Sequence[Unit], device: torch.device, room: int, reader: DirectReader | None = None
    ) -> None:
        self._units, self._device, self._reader, self._room = tuple(units), device, reader, room
        self._order = Order(units)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._begin()
        begins_again_after_fork(self)

    def _begin(self) -> None:
        """With nothing brought and nobody inside."""
        self._brought = 0
        self._states = {block: _State() for unit in self._units for block in unit.blocks}
        self._buffers = Buffers(self._room)
        largest = max((block.num_bytes for block in self._states), default=0)
        self._staging = Buffers(2 * largest)
        self._lock = threading.RLock()
        self._inside = threading.local()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="nbaccel-offload")

    def begin_again(self) -> None:
        """In a forked process, which has neither the thread nor those who held the lock."""
        for block in self._states:
            block.take_away()
        self._begin()

    def hooks(self, unit: Unit) -> list[RemovableHandle]:
        """Attached to the unit's module."""
        return [
            unit.module.register_forward_pre_hook(Hook(lambda module, args: self.enter(unit)), prepend=True),
            # also when the forward raises
            unit.module.register_forward_hook(
                Hook(lambda module, args, output: self.leave(unit, output)), always_call=True
            ),
        ]

    @contextmanager
    def whole_pass(self) -> Iterator[None]:
        """While the model runs; whatever is not left at its end is given back.

        torch calls no hook after a KeyboardInterrupt, nor after anything else that is no Exception.
        """
        stack = self._stack()
        passes: int = getattr(self._inside, "passes", 0)
        # Units inside at the outermost beginning are those of a part that was called by itself, and interrupted.
        before = len(stack) if passes else 0
        self._release_from(before)
        self._inside.passes = passes + 1
        try:
            yield
        finally:
            self._inside.passes = passes
            self._release_from(before)

    def _release_from(self, depth: int) -> None:
        stack = self._stack()
        while len(stack) > depth:
            self._release(stack.pop())

    def enter(self, unit: Unit) -> None:
        """Returns when the unit's weights are there, or will be before what the device is asked to do next."""
        if _is_exporting():
            raise ConfigError("a model with streamed weights cannot be exported; remove_hooks(model) first")
        with self._lock:
            self._order.entered(unit)
            following = self._order.after(unit)
            missed = False
            for block in unit.blocks:
                self._states[block].users += 1
                missed |= self._bring(block, must=True)
            if missed:
                self._forget_all_but(following)
            for later in following:
                for block in later.blocks:
                    self._bring(block, must=False)
            coming = [self._states[block].coming for block in unit.blocks]
        try:
            for future in coming:
                self._wait(future)
        except BaseException:
            self._release(unit)
            raise
        with self._lock:
            for block in unit.blocks:
                state = self._states[block]
                if not state.placed and state.buffer is not None and state.buffer.memory is not None:
                    block.put(state.buffer.memory)
                    state.placed = True
        self._stack().append(unit)

    def leave(self, unit: Unit, output: Any) -> Any:
        """The unit's weights may go once the device has done what it was asked to.

        Returns:
            The output, copied where it is a weight itself, whose memory is about to be used again.
        """
        stack = self._stack()
        if not stack or stack[-1] is not unit:  # `enter` has failed
            return output
        stack.pop()
        buffers = [self._states[block].buffer for block in unit.blocks]
        ours = {
            b.memory.untyped_storage().data_ptr() for b in buffers if b is not None and b.memory is not None
        }

        def is_weight(value: Any) -> bool:
            return isinstance(value, torch.Tensor) and _inside(value).untyped_storage().data_ptr() in ours

        if any(is_weight(value) for _, value in leaves(output)):
            output = map_tensors(lambda value: value.clone() if is_weight(value) else value, output)
        if torch.is_grad_enabled() and any(block.is_used() for block in unit.blocks):
            self._watch_gradients(unit, output)
        self._release(unit)
        return output

    def _watch_gradients(self, unit: Unit, output: Any) -> None:
        """Lets no gradient come back through a unit once anything else was brought, perhaps into its memory.

        torch would say that something has been modified in place; under torch.utils.checkpoint it would say nothing,
        and compute with other weights.
        """
        brought = self._brought

        def refuse(gradient: torch.Tensor) -> None:
            if self._brought != brought:
                raise ConfigError(
                    f"{unit.blocks[0].weights[0].slots[0].name} is streamed: it cannot be trained, and its values are "
                    "gone when a gradient comes back through its layer; remove_hooks(model) first"
                )

        for _, value in leaves(output):
            if isinstance(value, torch.Tensor) and value.grad_fn is not None:
                value.register_hook(refuse)  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Ends the thread; may be called twice."""
        self._worker.shutdown(wait=True, cancel_futures=True)

    def _stack(self) -> list[Unit]:
        if not hasattr(self._inside, "units"):
            self._inside.units = []
        found: list[Unit] = self._inside.units
        return found

    def _wait(self, future: Future[Any] | None) -> None:
        arrived = None if future is None else future.result()
        if arrived is not None:
            torch.cuda.current_stream(self._device).wait_event(arrived)

    def _bring(self, block: Block, *, must: bool) -> bool:
        """Whether the copy had to be begun now."""
        state = self._states[block]
        if state.coming is not None:
            return False
        state.buffer = self._buffers.take(block.num_bytes, must=must)
        if state.buffer is None:
            return False
        self._brought += 1
        state.coming = self._worker.submit(self._copy, block, state.buffer)
        return True

    def _release(self, unit: Unit) -> None:
        with self._lock:
            for block in unit.blocks:
                state = self._states[block]
                state.users -= 1
                if state.buffer is not None and self._stream is not None:
                    done = torch.cuda.Event()  # type: ignore[no-untyped-call]
                    done.record(torch.cuda.current_stream(self._device))
                    state.buffer.left.append(done)
                if not state.users:
                    self._forget(block)

    def _forget_all_but(self, following: Sequence[Unit]) -> None:
        """What was brought for a layer that did not come next."""
        wanted = {block for unit in following for block in unit.blocks}
        for block, state in self._states.items():
            if not state.users and state.coming is not None and state.coming.done() and block not in wanted:
                self._forget(block)

    def _forget(self, block: Block) -> None:
        state = self._states[block]
        if state.placed:
            block.take_away()
        if state.buffer is not None:
            self._buffers.give_back(state.buffer)
        state.buffer, state.coming, state.placed = None, None, False

    def _copy(self, block: Block, buffer: Buffer) -> torch.cuda.Event | None:
        """On the worker's thread. Returns the event after which the block is on the device."""
        if self._stream is None:
            if buffer.memory is None:
                buffer.memory = torch.empty(buffer.num_bytes, dtype=torch.uint8)
            block.fill(buffer.memory)
            return None
        with torch.cuda.stream(self._stream):
            if buffer.memory is None:
                buffer.memory = torch.empty(buffer.num_bytes, dtype=torch.uint8, device=self._device)
            for event in buffer.left:
                self._stream.wait_event(event)
            buffer.left.clear()
            if block.host is not None:
                buffer.memory.copy_(block.host, non_blocking=True)
            else:
                self._copy_staged(block, buffer.memory, self._stream)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record(self._stream)
            return arrived

    def _copy_staged(self, block: Block, memory: torch.Tensor, stream: torch.cuda.Stream) -> None:
        """Through pinned memory, from which the device copies by itself."""
        staging = self._staging.take(block.num_bytes, must=True)
        assert staging is not None
        for event in staging.left:
            event.synchronize()
        staging.left.clear()
        if staging.memory is None:
            staging.memory = torch.empty(block.num_bytes, dtype=torch.uint8, pin_memory=True)
        block.fill(staging.memory, None if self._reader is None else self._reader.fill)
        memory.copy_(staging.memory, non_blocking=True)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record(stream)
        staging.left.append(done)
        self._staging.give_back(staging)


def compute_on(module: nn.Module, device: torch.device) -> RemovableHandle:
    """What `module` is given comes to `device` first."""

    def arrive(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return _moved((args, kwargs), device)

    return module.register_forward_pre_hook(Hook(arrive), prepend=True, with_kwargs=True)


def answer_on(module: nn.Module, device: torch.device) -> RemovableHandle:
    """What `module` gives goes to `device`."""
    return module.register_forward_hook(Hook(lambda module, args, output: _moved(output, device)))


def return_to_caller(model: nn.Module) -> list[RemovableHandle]:
    """The model's output goes to the device its first tensor came from."""
    inside = threading.local()

    def remember(module: nn.Module, args: Any, kwargs: Any) -> None:
        found = (v.device for _, v in leaves((args, kwargs)) if isinstance(v, torch.Tensor))
        inside.device = next(found, None)

    def give_back(module: nn.Module, args: Any, output: Any) -> Any:
        return output if inside.device is None else _moved(output, inside.device)

    return [
        model.register_forward_pre_hook(Hook(remember), prepend=True, with_kwargs=True),
        model.register_forward_hook(Hook(give_back)),
    ]


def _inside(tensor: torch.Tensor) -> torch.Tensor:
    """What torch.func has wrapped, which alone has memory."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def _moved(value: Any, device: torch.device) -> Any:
    """`value` itself when all its tensors are there already: a list may be one the module writes to."""
    tensors = (v for _, v in leaves(value) if isinstance(v, torch.Tensor))
    if all(tensor.device == device for tensor in tensors):
        return value
    return map_tensors(lambda tensor: tensor.to(device), value)
