"""What DeepSpeed wrote itself goes on here, on any number of ranks, and no code in its pickles runs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from torch import nn

from nbaccel import DeepSpeed
from nbaccel.core.load_model import load_module
from nbaccel.core.merge import merge
from nbaccel.core.zero.native import find_native, read_native
from nbaccel.errors import CheckpointError
from tests.conftest import needs

pytestmark = [pytest.mark.timeout(300), needs("deepspeed")]
SAVED, STEPS, STAGES = 3, 6, (2, 3)


class Tied(nn.Module):
    """Odd sizes, so that no piece is whole; a buffer and a parameter that does not learn."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 7)
        self.inner = nn.Linear(7, 7)
        self.norm = nn.LayerNorm(7)
        self.register_buffer("scale", torch.tensor([1.5]))
        self.fixed = nn.Parameter(torch.full((5,), 0.5), requires_grad=False)
        self.head = nn.Linear(7, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.table(tokens)) * self.scale
        return self.head(torch.tanh(self.inner(x)) * self.fixed.sum() + x)


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(11, (8, 6), generator=generator) for _ in range(STEPS)]


def parts() -> tuple[nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    torch.manual_seed(7)
    model = Tied()
    rest = [*model.inner.parameters(), *model.norm.parameters()]
    groups = [{"params": [model.table.weight]}, {"params": rest, "lr": 0.02}]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)


def loss_of(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


class Code:
    """Would make a folder where it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> object:
        return os.makedirs, (self.path, 0o777, True)


def written_by_deepspeed(folder: str) -> dict[int, list[float]]:
    """Trains with DeepSpeed alone, saves in the middle; the losses of the second half, by stage."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    import torch.distributed as dist

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    losses: dict[int, list[float]] = {}
    for stage in STAGES:
        model, optimizer, schedule = parts()
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, lr_scheduler=schedule, config=config, dist_init_required=False
        )
        for number, tokens in enumerate(batches()):
            if number == SAVED:
                engine.save_checkpoint(f"{folder}/{stage}", client_state={"mine": Code(f"{folder}/ran")})
            own = tokens[rank::size]
            loss = loss_of(engine(own), own)
            engine.backward(loss)
            engine.step()
            mean = loss.detach().clone()
            dist.all_reduce(mean)
            losses.setdefault(stage, []).append(mean.item() / size)
    return {stage: found[SAVED:] for stage, found in losses.items()}


def goes_on(folders: list[str], strategy: object) -> list[list[float]]:
    """Loads each, and trains the second half."""
    from nbaccel.core import Accelerator

    found = []
    for folder in folders:
        acc = Accelerator(cpu=True, strategy=strategy)
        model, optimizer, schedule = acc.prepare(*parts())
        loaded = acc.load_state(folder)
        assert (loaded.step, acc.steps) == (SAVED, SAVED)
        assert "rng" in dict(loaded.untouched)
        losses = []
        for tokens in batches()[SAVED:]:
            own = tokens[acc.process_index :: acc.num_processes]
            with acc.accumulate(model):
                loss = loss_of(model(own), own)
                acc.backward(loss)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            losses.append(acc.reduce(loss.detach(), "mean").item())
        found.append(losses)
    return found


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, list[float]]]:
    folder = tmp_path_factory.mktemp("native")
    return folder, run_ranks(written_by_deepspeed, str(folder), num_processes=4)[0]


def close(a: list[float], b: list[float]) -> bool:
    return len(a) == len(b) and max(abs(x - y) for x, y in zip(a, b, strict=True)) <= 1e-5


def test_checkpoint_of_deepspeed_when_loaded_on_fewer_ranks_goes_on_as_there(
    native: tuple[Path, dict[int, list[float]]],
) -> None:
    folder, losses = native
    folders = [str(folder / "2"), str(folder / "3" / "global_step3")]
    (alone,) = run_ranks(goes_on, folders, "single", num_processes=1)
    assert close(alone[0], losses[2]), (alone[0], losses[2])
    assert close(alone[1], losses[3]), (alone[1], losses[3])
    for one in run_ranks(goes_on, folders[:1], DeepSpeed(stage=3), num_processes=2):
        assert close(one[0], losses[2])
    assert not (folder / "ran").exists(), "a pickle's code has run"


def test_merge_when_deepspeed_wrote_it_gives_its_float32_weights(
    native: tuple[Path, dict[int, list[float]]], tmp_path: Path
) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    for stage in STAGES:
        merged = merge(native[0] / str(stage), tmp_path / str(stage))
        assert (merged.step, merged.world_size) == (SAVED, 4)
        model = Tied()
        load_module(model, tmp_path / str(stage), strict=True)
        assert not (native[0] / "ran").exists(), "a pickle's code has run"
        theirs = get_fp32_state_dict_from_zero_checkpoint(str(native[0] / str(stage)))
        (native[0] / "ran").rmdir()  # by DeepSpeed
        for name, value in model.state_dict().items():
            assert torch.equal(value, theirs[name]), name


def test_checkpoint_of_deepspeed_when_a_rank_s_file_is_gone_is_refused(
    native: tuple[Path, dict[int, list[float]]], tmp_path: Path
) -> None:
    source = find_native(native[0] / "3")
    assert source is not None
    for file in source.iterdir():
        if "pp_rank_2" not in file.name:
            os.link(file, tmp_path / file.name)
    with pytest.raises(CheckpointError, match="incomplete: 3 of its 4 ranks' files"):
        read_native(tmp_path)
    (tmp_path / "zero_pp_rank_2_mp_rank_00_optim_states.pt").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"cannot be read as a checkpoint of DeepSpeed|damaged"):
        read_native(tmp_path)
    assert find_native(tmp_path / "no") is None
