"""Puts `ranks` of the folder above and `tiny` of this one on the path; one training every other is compared with."""

from __future__ import annotations

import pytest
from ranks import run_ranks
from tiny import Job, Trained, train


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trained, str]:
    """The training in one process, and the checkpoint of its middle."""
    folder = str(tmp_path_factory.mktemp("alone") / "middle")
    return run_ranks(train, Job(strategy="single", save=folder), num_processes=1)[0], folder
