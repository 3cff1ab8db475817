"""Who initialised CUDA, in a real kernel. The CPU build of torch has no `_cuda_init`: a function stands in
for it, and is called from where torch calls it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.conftest import Kernel

pytestmark = pytest.mark.kernel


def test_the_line_that_initialised_cuda_is_named(new_kernel: Callable[..., Kernel]) -> None:
    kernel = new_kernel()
    kernel.ok("import nbaccel, torch; torch._C._cuda_init = lambda: None")
    kernel.ok("x = 1\ndef innocent():\n    torch._C._cuda_init()\n\ninnocent()")
    shown = kernel.ok("print(nbaccel.doctor())").stdout
    assert "an accelerator was opened here, by Cell In[" in shown
    assert "line 3" in shown
    kernel.ok("torch._C._cuda_init()")  # the first one counts
    assert "line 3" in kernel.ok("print(nbaccel.doctor())").stdout
    assert kernel.ok("torch._C._cuda_init.__name__").result == "'<lambda>'"  # nothing is wrapped any more


def test_a_kernel_that_opened_nothing_is_told_so(kernel: Kernel) -> None:
    code = "from nbaccel.notebook import culprit; print(culprit.Tracer(lambda: '', lambda _: None).culprit)"
    assert kernel.ok(code).stdout == "None\n"
