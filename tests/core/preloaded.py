"""What the ranks of these tests have imported before they are forked: seconds less for each of them."""

from __future__ import annotations

import contextlib
import gc
import os
import sys

import cloudpickle  # noqa: F401
import pytest  # noqa: F401

import nbaccel.core.accelerator
import nbaccel.core.strategies.deepspeed
import nbaccel.core.strategies.fsdp
import nbaccel.core.strategies.tensor_parallel  # noqa: F401

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # it would look for a GPU while it is imported
sys.modules["mlflow"] = None  # type: ignore[assignment]  # DeepSpeed's autotuner imports it, with its thread
with contextlib.suppress(ImportError):
    import deepspeed.runtime.superoffload.superoffload_stage3

    # the last module that its `initialize` imports, which compiles: all of torch._inductor
    import deepspeed.runtime.zero.muon.muon_optimizer

    # Read for the first time, it asks a compiler what it has; every rank would.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
del sys.modules["mlflow"]
with contextlib.suppress(ImportError):
    import transformers.models.gpt2.modeling_gpt2
    import transformers.models.llama.modeling_llama  # noqa: F401

gc.freeze()  # a rank that looks through all of this for garbage copies it too
