"""What the ranks of these tests have imported before they are forked: seconds less for each of them."""

from __future__ import annotations

import contextlib
import os
import sys

import cloudpickle  # noqa: F401

import nbaccel.core.accelerator  # noqa: F401

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # it would look for a GPU while it is imported
sys.modules["mlflow"] = None  # type: ignore[assignment]  # DeepSpeed's autotuner imports it, with its thread
with contextlib.suppress(ImportError):
    # the last module that its `initialize` imports, which compiles: all of torch._inductor
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
del sys.modules["mlflow"]
with contextlib.suppress(ImportError):
    import transformers.models.gpt2.modeling_gpt2
    import transformers.models.llama.modeling_llama  # noqa: F401
