"""What to do about a batch norm that gets one sample, told with torch's error."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, final

from torch import nn
from torch.utils.hooks import RemovableHandle

from nbaccel.core.data import ShardedLoader

__all__ = ["ThinBatches"]

_WORDS = "Expected more than 1 value per channel"
_NOTE = (
    "The last batch of an epoch is divided over the ranks, and leaves one sample, or one that only keeps the step like "
    "the others', to some of them; a batch norm cannot train on that. Give the DataLoader drop_last=True, or "
    "Accelerator or prepare_data_loader even_batches=True."
)


@final
class ThinBatches:
    """Adds to the error of models with batch norms, in passes whose last batch has one sample on a rank."""

    def __init__(self) -> None:
        self._hooks: dict[ShardedLoader, list[RemovableHandle]] = {}

    def began(self, loader: ShardedLoader, models: Sequence[nn.Module]) -> None:
        """A pass begins."""
        if loader.ends_thin:
            self.ended(loader)
            self._hooks[loader] = [
                # A compiled call would have to be compiled again, with the hook in it.
                model.register_forward_hook(_explain, always_call=True)
                for model in models
                if model._compiled_call_impl is None and _trains_norms(model)
            ]

    def ended(self, loader: ShardedLoader) -> None:
        """The pass is over."""
        for hook in self._hooks.pop(loader, ()):
            hook.remove()


def _trains_norms(model: nn.Module) -> bool:
    return any(isinstance(one, nn.modules.batchnorm._BatchNorm) for one in model.modules())


# A function of the module, so that a copy or a pickle of the model made within a pass works without the loop.
def _explain(module: nn.Module, args: Any, output: Any) -> None:
    error = sys.exc_info()[1]
    if isinstance(error, ValueError) and _WORDS in str(error) and _NOTE not in str(error):
        # Into the message: exceptions have notes from Python 3.11 on only.
        error.args = (f"{error}. {_NOTE}",)
