"""One kernel for all tests of this folder: a kernel and its warm server take as long as many of these tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import Kernel


@pytest.fixture(scope="session")
def kernel(tmp_path_factory: pytest.TempPathFactory, state_home: None) -> Iterator[Kernel]:
    """nbaccel's two functions imported and the server warm; a test leaves it so."""
    started = Kernel(tmp_path_factory.mktemp("kernel"))
    started.ok("from nbaccel import notebook_launcher, launch")
    started.ok("notebook_launcher(lambda: None, num_processes=2)", timeout=120)
    yield started
    started.close()
