"""One kernel for all tests of this folder: a kernel and its warm server take as long as many of these tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import Kernel, warm_kernel


@pytest.fixture(scope="session")
def kernel(tmp_path_factory: pytest.TempPathFactory, state_home: None) -> Iterator[Kernel]:
    """A test leaves it as it was."""
    yield from warm_kernel(tmp_path_factory.mktemp("kernel"))
