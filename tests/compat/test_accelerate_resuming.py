"""accelerate's way to resume (`load_state`, then `skip_first_batches`), side by side with accelerate itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from nbaccel import notebook_launcher

STEPS = 12
"""Of an epoch, on each rank."""
RESUMES = [(5, 0, 5), (5, 0, 0), (12, 1, 0), (14, 1, 2)]
"""Optimizer steps when the checkpoint is saved, then the epoch the script goes on with and the batches it skips."""


def build(library: Any, shuffle: bool, **options: Any) -> tuple[Any, ...]:
    accelerator = library.Accelerator(
        cpu=True, dataloader_config=library.utils.DataLoaderConfiguration(**options)
    )
    samples = torch.arange(2.0 * STEPS * accelerator.num_processes)
    loader = DataLoader(TensorDataset(samples), batch_size=2, shuffle=shuffle)
    model = torch.nn.Linear(1, 1)
    return accelerator, *accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1e-4), loader)


def epoch(
    accelerator: Any, model: Any, optimizer: Any, batches: Any, stop: int = 0, save: str = ""
) -> list[float]:
    """One pass, at most `stop` steps of it, after which it is saved to `save` from within; this rank's samples."""
    seen = []
    for step, (batch,) in enumerate(batches, 1):
        accelerator.backward(model(batch[:, None]).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        seen += batch.tolist()
        if step == stop:
            if save:
                accelerator.save_state(save)
            break
    return seen


def resumed(library: Any, folder: str, saved: int, first: int, skip: int, **options: Any) -> dict[str, Any]:
    """This rank's samples, epoch by epoch: before it is saved, and after it was loaded by a fresh Accelerator."""
    shuffle = options.pop("shuffle", False)
    accelerator, model, optimizer, loader = build(library, shuffle, **options)
    before = []
    for done in range(0, saved, STEPS):
        stop = min(STEPS, saved - done)
        before.append(
            epoch(accelerator, model, optimizer, loader, stop, folder if done + stop == saved else "")
        )
    accelerator, model, optimizer, loader = build(library, shuffle, **options)
    accelerator.load_state(folder)
    active = accelerator.skip_first_batches(loader, skip) if skip else loader
    passes = [active if number == first else loader for number in range(first, 3)]
    return {
        "before": before,
        "after": [epoch(accelerator, model, optimizer, one) for one in passes],
        "length": len(active),
    }


def both(folder: str) -> list[list[Any]]:
    """Ours and theirs for each of RESUMES, for a skipped loader that is read twice, then its own, and for sums."""
    import accelerate

    from nbaccel.compat import accelerate as ours

    found = []
    for library in (ours, accelerate):
        name = f"{folder}/{library.__name__}"
        runs: list[Any] = [resumed(library, f"{name}-{number}", *one) for number, one in enumerate(RESUMES)]
        accelerator, _, _, loader = build(library, False)
        skipped = library.skip_first_batches(accelerator.skip_first_batches(loader, 6), 3)
        passes = [[batch.tolist() for (batch,) in one] for one in (skipped, skipped, loader)]
        mine = torch.tensor([1.0 + accelerator.process_index])
        sums = [library.utils.reduce(mine, "none").item(), accelerator.reduce(mine, "none").item()]
        found.append([*runs, passes, len(skipped), len(loader), sums])
    return found


@pytest.mark.peers
@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2])
def test_script_when_it_resumes_as_accelerate_does_reads_the_same_samples(
    num_processes: int, warm: None, tmp_path: Path
) -> None:
    for ours, theirs in notebook_launcher(
        both, (str(tmp_path),), num_processes, device="cpu", output="none", folder=False
    ):
        assert ours == theirs
        assert [[len(one) // 2 for one in run["after"]] for run in ours[: len(RESUMES)]] == [
            [7, STEPS, STEPS],
            [STEPS, STEPS, STEPS],
            [STEPS, STEPS],
            [10, STEPS],
        ]


@pytest.mark.parametrize(
    ("saved", "stateful", "lengths"), [(5, True, [7, 12]), (12, True, [12, 12]), (5, False, [12, 12])]
)
def test_loader_when_loaded_goes_on_within_the_epoch_if_it_is_stateful(
    saved: int, stateful: bool, lengths: list[int], tmp_path: Path
) -> None:
    import nbaccel.compat.accelerate as ours

    run = resumed(ours, str(tmp_path / "saved"), saved, 1, 0, shuffle=True, use_stateful_dataloader=stateful)
    assert [len(one) // 2 for one in run["after"]] == lengths
    if stateful and saved < STEPS:
        assert sorted(run["before"][0] + run["after"][0]) == list(range(2 * STEPS))


def test_order_of_the_epoch_when_its_first_batches_are_skipped_is_the_one_it_had(tmp_path: Path) -> None:
    import nbaccel.compat.accelerate as ours

    run = resumed(ours, str(tmp_path / "saved"), 5, 0, 5, shuffle=True)
    first, second, third = run["after"]
    assert sorted(run["before"][0] + first) == sorted(second) == list(range(2 * STEPS))
    assert second != third
