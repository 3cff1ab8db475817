"""Saved on four ranks, loaded on two and on one, in each stage; and a save that is cut short."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from ranks import RankFailed, run_ranks
from tiny import VOCABULARY, TinyLM

from nbaccel import DeepSpeed
from tests.conftest import needs

pytestmark = [pytest.mark.timeout(300), needs("deepspeed")]
STAGES = (1, 2, 3)


def train(folder: str, load: bool, cut_short: bool = False) -> dict[int, list[float]]:
    """Four steps in each stage, saved after two; or the last two from what was saved."""
    from nbaccel.core import Accelerator

    found: dict[int, list[float]] = {}
    for stage in STAGES:
        acc = Accelerator(cpu=True, strategy=DeepSpeed(stage=stage), project_dir=f"{folder}/{stage}")
        torch.manual_seed(7)
        model = TinyLM(2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        model, optimizer = acc.prepare(model, optimizer)
        if load:
            acc.load_state()
        for step in range(acc.steps, 4):
            tokens = torch.randint(VOCABULARY, (8, 6), generator=torch.Generator().manual_seed(step))
            own = tokens[acc.process_index :: acc.num_processes]
            with acc.accumulate(model):
                logits = model(own)[:, :-1]
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), own[:, 1:].flatten())
                acc.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            found.setdefault(stage, []).append(acc.reduce(loss.detach(), "mean").item())
            if step == 1 and not load:
                acc.save_state()
        if cut_short:
            # Called when the hidden folder is there, and the others wait for this rank.
            acc.register_save_state_pre_hook(_die if acc.is_last_process else lambda *_: None)
            acc.save_state()
    return found


def _die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[int, list[float]]]:
    folder = str(tmp_path_factory.mktemp("sizes"))
    return folder, run_ranks(train, folder, False, num_processes=4)[0]


@pytest.mark.parametrize("num_processes", [2, 1])
def test_checkpoint_when_loaded_on_fewer_ranks_goes_on(
    num_processes: int, saved: tuple[str, dict[int, list[float]]]
) -> None:
    folder, losses = saved
    for one in run_ranks(train, folder, True, num_processes=num_processes):
        for stage in STAGES:
            assert one[stage] == pytest.approx(losses[stage][2:], abs=1e-5), stage


def test_checkpoint_when_a_rank_dies_in_a_later_save_is_still_the_newest(
    saved: tuple[str, dict[int, list[float]]],
) -> None:
    folder, losses = saved
    with pytest.raises(RankFailed):
        run_ranks(train, folder, True, True, num_processes=2)
    names = [path.name for path in (Path(folder) / "1").iterdir() if not path.name.startswith(".")]
    assert names == ["checkpoint_0"]
    (alone,) = run_ranks(train, folder, True, num_processes=1)
    assert alone[1] == pytest.approx(losses[1][2:], abs=1e-5)
