"""One rank: saving, loading, and everything that may go wrong with the disk in between."""

from __future__ import annotations

import contextlib
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training import Counter, Training, same

from nbaccel.core.checkpoint import Checkpoints, Contents, ModelState, OptimizerState, next_folder
from nbaccel.core.checkpoint.faults import Crash, FaultyFileSystem
from nbaccel.core.checkpoint.filesystem import LocalFileSystem
from nbaccel.core.checkpoint.find import hidden_name, remove_leftovers
from nbaccel.core.world import single
from nbaccel.errors import CheckpointError, ConfigError


@pytest.fixture
def checkpoints() -> Iterator[Checkpoints]:
    made = Checkpoints(world=single())
    yield made
    made.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "nbaccel-checkpoint"]


def on(filesystem: FaultyFileSystem) -> Checkpoints:
    return Checkpoints(world=single(), filesystem=filesystem)


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("asynchronous", [False, True])
def test_training_goes_on_bit_for_bit_when_loaded(
    tmp_path: Path, checkpoints: Checkpoints, asynchronous: bool
) -> None:
    straight = Training(single())
    straight.steps(3)
    checkpoints.save(tmp_path / "c", straight.contents, step=3, asynchronous=asynchronous)
    straight.steps(4)
    checkpoints.wait()
    resumed = Training(single(), seed=1)
    loaded = checkpoints.load(tmp_path / "c", resumed.contents)
    assert (loaded.step, loaded.world_size, loaded.untouched) == (3, 1, ())
    resumed.steps(4)
    assert same(resumed.numbers(), straight.numbers())


def test_saving_before_the_first_step_changes_nothing(tmp_path: Path, checkpoints: Checkpoints) -> None:
    saved, plain = Training(single()), Training(single())
    checkpoints.save(tmp_path / "c", saved.contents, step=0)
    resumed = Training(single(), seed=1)
    resumed.steps(1)
    checkpoints.load(tmp_path / "c", resumed.contents)
    for training in (saved, plain, resumed):
        training.steps(2)
    assert same(saved.numbers(), plain.numbers())
    assert same(resumed.numbers(), plain.numbers())


def test_loaded_optimizers_share_no_memory(tmp_path: Path, checkpoints: Checkpoints) -> None:
    training = Training(single())
    training.steps(1)
    checkpoints.save(tmp_path / "c", training.contents, step=1)
    a, b = Training(single(), seed=1), Training(single(), seed=2)
    checkpoints.load(tmp_path / "c", a.contents)
    checkpoints.load(tmp_path / "c", b.contents)
    before = b.numbers()
    a.steps(2)
    assert same(b.numbers(), before)


def test_background_save_holds_the_moment_it_was_asked_for(tmp_path: Path, checkpoints: Checkpoints) -> None:
    training = Training(single())
    training.counter.value = {"seen": torch.zeros(3)}
    contents = replace(training.contents, sharded={}, shared={"counter": training.counter})
    for step in range(3):
        checkpoints.save(tmp_path / "c", contents, step=step, asynchronous=True)
        training.counter.value["seen"] += 1
    checkpoints.wait()
    checkpoints.load(tmp_path / "c", contents)
    assert training.counter.value["seen"].tolist() == [2, 2, 2]


def test_buffers_are_reused_from_the_second_background_save_on(
    tmp_path: Path, checkpoints: Checkpoints
) -> None:
    training = Training(single())
    training.steps(1)
    seen = []
    for step in range(3):
        checkpoints.save(tmp_path / "c", training.contents, step=step, asynchronous=True)
        assert checkpoints._buffer is not None
        seen.append(checkpoints._buffer._memory.data_ptr())
    training.bare.append(torch.nn.Linear(8, 2))  # other tensors: another plan and another buffer
    checkpoints.save(tmp_path / "c", training.contents, step=4, asynchronous=True)
    checkpoints.wait()
    assert len(set(seen)) == 1
    Training(single())
    other = Training(single(), seed=3)
    other.bare.append(torch.nn.Linear(8, 2))
    checkpoints.load(tmp_path / "c", other.contents)
    assert torch.equal(other.bare[3].weight, training.bare[3].weight)


def test_tied_parameter_is_saved_once_and_stays_tied(tmp_path: Path, checkpoints: Checkpoints) -> None:
    training = Training(single(), tied=True)
    training.steps(2)
    checkpoints.save(tmp_path / "c", training.contents, step=2)
    index = (tmp_path / "c" / "index.json").read_text()
    assert '"aliases": {"model/4.weight": "model/3.weight"}' in index
    resumed = Training(single(), seed=1, tied=True)
    checkpoints.load(tmp_path / "c", resumed.contents)
    assert resumed.bare[4].weight is resumed.bare[3].weight
    assert same(resumed.numbers(), training.numbers())
    untied = Training(single(), seed=1, tied=True)
    untied.bare[4].weight = torch.nn.Parameter(torch.zeros(8, 8))
    model_only = Contents(sharded={"model": untied.contents.sharded["model"]})
    checkpoints.load(tmp_path / "c", model_only, strict=False)
    assert torch.equal(untied.bare[4].weight, training.bare[3].weight)


OPERATIONS = 60


@pytest.mark.parametrize("power_cut", [False, True], ids=["crash", "power cut"])
@pytest.mark.parametrize("replacing", [False, True], ids=["numbered", "same folder"])
@pytest.mark.parametrize(("atomic", "syncs"), [(True, True), (False, False)], ids=["posix", "fuse"])
def test_crash_at_any_operation_leaves_a_complete_state(
    tmp_path: Path, atomic: bool, syncs: bool, replacing: bool, power_cut: bool
) -> None:
    if power_cut and not syncs:
        pytest.skip("a file system that cannot sync promises nothing after a power cut")
    old, new = Training(single()), Training(single())
    old.steps(1)
    new.steps(2)
    outcomes = set()
    for crash_at in range(OPERATIONS):
        folder = tmp_path / str(crash_at)
        on(FaultyFileSystem()).save(folder / "c_0", old.contents, step=1)
        if replacing:
            (folder / "c_0" / "tokenizer.json").write_text("mine")
        target = folder / ("c_0" if replacing else "c_1")
        filesystem = FaultyFileSystem(crash_at=crash_at, atomic_rename=atomic, syncs_folders=syncs)
        finished = True
        try:
            on(filesystem).save(target, new.contents, step=2, keep=1)
        except Crash:
            finished = False
            if power_cut:
                filesystem.power_cut()
        back = Training(single(), seed=9)
        reader = Checkpoints(world=single())
        if replacing:
            step = reader.load(target, back.contents).step
            [kept] = folder.rglob("tokenizer.json")
            assert kept.read_text() == "mine"
        else:
            found = reader.newest_complete(folder).path
            assert found is not None, (crash_at, filesystem.log)
            step = reader.load(found, back.contents, verify=False).step
        assert step in (1, 2)
        assert same(back.numbers(), (old if step == 1 else new).numbers()), (crash_at, filesystem.log)
        outcomes.add((finished, step))
        if finished:
            assert step == 2
            break
    else:
        pytest.fail("OPERATIONS is too small to reach the end of a save")
    assert outcomes >= {(False, 1), (True, 2)}


def test_files_and_folders_are_synced_before_they_count(tmp_path: Path) -> None:
    filesystem = FaultyFileSystem()
    training = Training(single())
    training.steps(1)
    on(filesystem).save(tmp_path / "c", training.contents, step=1)
    log = filesystem.log
    created = [entry.split()[1] for entry in log if entry.startswith("create")]
    renamed = next(i for i, entry in enumerate(log) if entry.startswith("rename .c.partial"))
    for name in created:
        assert log.index(f"sync_file {name}") < renamed, name
    partial = log[renamed].split()[1]
    assert f"sync_folder {partial}" in log[:renamed]
    assert log[renamed + 1] == f"sync_folder {tmp_path.name}"


@pytest.mark.parametrize("hides_full", [False, True], ids=["seen before", "met while writing"])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_full_disk_is_an_error_and_the_old_checkpoint_stays(
    tmp_path: Path, hides_full: bool, asynchronous: bool
) -> None:
    training = Training(single(), width=2000)
    training.steps(1)
    old = training.numbers()
    on(FaultyFileSystem()).save(tmp_path / "c_0", training.contents, step=1)
    training.steps(1)
    full = on(FaultyFileSystem(capacity=200_000, hides_full=hides_full))
    message = "No space left" if hides_full else "not enough space"
    with pytest.raises(CheckpointError, match=message) as caught:  # noqa: PT012 - either line may say it
        full.save(tmp_path / "c_1", training.contents, step=2, keep=1, asynchronous=asynchronous)
        full.wait()
    assert "arlier checkpoints are untouched" in str(caught.value)
    assert visible(tmp_path) == ["c_0"]
    back = Training(single(), seed=1, width=2000)
    reader = Checkpoints(world=single())
    reader.load(tmp_path / "c_0", back.contents)
    assert same(back.numbers(), old)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 8 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", place], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting needs root")
    yield place
    subprocess.run(["umount", place], check=True)


def test_really_full_disk_is_an_error_and_the_old_checkpoint_stays(
    small_disk: Path, checkpoints: Checkpoints
) -> None:
    small, large = Training(single()), Training(single(), width=200_000)
    checkpoints.save(small_disk / "c_0", small.contents, step=1)
    with pytest.raises(CheckpointError, match="not enough space"):
        checkpoints.save(small_disk / "c_1", large.contents, step=2)
    fill = (small_disk / "fill").open("wb", buffering=0)
    with fill, contextlib.suppress(OSError):
        while fill.write(b"x" * 4096):
            pass

    class Optimist:
        """Says there is space, as a quota does that free space knows nothing of."""

        def __getattr__(self, name: str) -> Any:
            return getattr(LocalFileSystem(), name)

        def free_bytes(self, path: Path) -> int:
            return 2**40

    with pytest.raises(CheckpointError, match="No space left on device"):
        Checkpoints(world=single(), filesystem=Optimist()).save(small_disk / "c_2", small.contents, step=2)
    assert visible(small_disk) == ["c_0", "fill"]
    checkpoints.load(small_disk / "c_0", Training(single(), seed=1).contents)


def test_background_failure_is_raised_by_the_next_save_once(tmp_path: Path) -> None:
    training = Training(single(), width=2000)
    full = on(FaultyFileSystem(capacity=50_000, hides_full=True))
    full.save(tmp_path / "c", training.contents, step=1, asynchronous=True)
    with pytest.raises(CheckpointError, match="No space left"):
        full.save(tmp_path / "d", Contents(), step=1)
    full.wait()
    full.close()


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "truncated":
        data = data[:-1]
    else:
        data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["truncated", "flipped"])
@pytest.mark.parametrize(
    "name",
    [
        "manifest.json",
        "index.json",
        "shards-00000.safetensors",
        "shared.json",
        "rank-00000.json",
        "extra.txt",
    ],
)
def test_damaged_file_is_refused_by_name_and_the_one_before_is_taken(
    tmp_path: Path, checkpoints: Checkpoints, name: str, how: str
) -> None:
    training = Training(single())
    training.steps(1)
    contents = replace(training.contents, before=(lambda folder: (folder / "extra.txt").write_text("hello"),))  # type: ignore[arg-type,return-value]
    for number in range(2):
        checkpoints.save(tmp_path / f"c_{number}", contents, step=number)
    damage(tmp_path / "c_1" / name, how)
    if name == "manifest.json" and how == "truncated":
        (tmp_path / "c_1" / name).write_bytes((tmp_path / "c_1" / name).read_bytes()[:-5])
    back = Training(single(), seed=5)
    before = back.numbers()
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        checkpoints.load(tmp_path / "c_1", back.contents)
    assert same(back.numbers(), before)
    found = checkpoints.newest_complete(tmp_path)
    assert found.path == tmp_path / "c_0"
    assert [path.name for path, _ in found.skipped] == ["c_1"]
    assert name in found.skipped[0][1]


def test_another_models_checkpoint_is_refused_with_the_differing_keys(
    tmp_path: Path, checkpoints: Checkpoints
) -> None:
    checkpoints.save(tmp_path / "c", Training(single()).contents, step=1)
    other = Training(single())
    other.bare[2] = torch.nn.Linear(16, 8, bias=False)
    other.bare.append(torch.nn.Linear(1, 1))
    with pytest.raises(CheckpointError) as caught:
        checkpoints.load(tmp_path / "c", other.contents)
    text = str(caught.value)
    assert "missing in the checkpoint: 3.bias, 3.weight" in text
    assert "only in the checkpoint: 2.bias" in text
    with pytest.raises(
        CheckpointError, match=r"0\.weight is \(16, 8\) in the checkpoint and \(5, 8\) in the model"
    ):
        checkpoints.load(tmp_path / "c", Training(single(), width=5).contents)


def test_other_things_than_were_saved_are_named(tmp_path: Path, checkpoints: Checkpoints) -> None:
    training = Training(single())
    checkpoints.save(tmp_path / "c", training.contents, step=1)
    more = replace(training.contents, shared={"scheduler": training.scheduler, "ema": Counter()})
    with pytest.raises(
        CheckpointError, match="missing in the checkpoint: ema; only in the checkpoint: counter"
    ):
        checkpoints.load(tmp_path / "c", more)
    loaded = checkpoints.load(tmp_path / "c", more, strict=False)
    assert loaded.untouched == (("ema", "the checkpoint has none"),)
    fewer = replace(training.contents, shared={"scheduler": training.scheduler}, later=("coun",))
    assert checkpoints.load(tmp_path / "c", fewer).later == {"counter": training.counter.state_dict()}


def test_keep_prunes_the_oldest_of_the_same_numbering_only(tmp_path: Path, checkpoints: Checkpoints) -> None:
    training = Training(single())
    checkpoints.save(tmp_path / "best", training.contents, step=0)
    for number in range(4):
        folder = next_folder(tmp_path, LocalFileSystem())
        assert folder.name == f"checkpoint_{number}"
        checkpoints.save(folder, training.contents, step=number, keep=2)
    assert visible(tmp_path) == ["best", "checkpoint_2", "checkpoint_3"]
    with pytest.raises(ConfigError, match="keep=0"):
        checkpoints.save(tmp_path / "c", training.contents, step=1, keep=0)


def test_unfinished_ones_do_not_count_for_keep(tmp_path: Path, checkpoints: Checkpoints) -> None:
    training = Training(single())
    for number in range(3):
        checkpoints.save(tmp_path / f"c_{number}", training.contents, step=number)
    damage(tmp_path / "c_2" / "index.json", "truncated")
    checkpoints.save(tmp_path / "c_3", training.contents, step=3, keep=2)
    assert visible(tmp_path) == ["c_1", "c_2", "c_3"]


def test_folder_of_somebody_else_is_never_replaced(tmp_path: Path, checkpoints: Checkpoints) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("...")
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        checkpoints.save(tmp_path / "mine", Training(single()).contents, step=1)
    assert visible(tmp_path) == ["mine"]
    assert visible(tmp_path / "mine") == ["thesis.tex"]


def test_what_others_put_into_a_checkpoint_stays_when_it_is_saved_again(
    tmp_path: Path, checkpoints: Checkpoints
) -> None:
    training = Training(single())
    target = tmp_path / "out"

    def hook(folder: Path) -> None:
        (folder / "adapter").mkdir()
        (folder / "adapter" / "weights").write_text(f"at {number}")

    contents = replace(training.contents, before=(hook,))
    for number in range(3):
        checkpoints.save(target, contents, step=number)
        if number == 0:
            (target / "tokenizer.json").write_text("mine")
            (target / "shared_notes.txt").touch()
            (target / "notes").mkdir()
            (target / "adapter" / "readme").write_text("mine too")
            checkpoints.save(target / "checkpoint_0", contents, step=number)
        (target / "tokenizer.json").write_text(f"mine {number}")  # no checksum is kept of it
    assert (target / "tokenizer.json").read_text() == "mine 2"
    assert {"notes", "shared_notes.txt"} < set(visible(target))
    assert (target / "adapter" / "weights").read_text() == "at 2"
    assert (target / "adapter" / "readme").read_text() == "mine too"
    assert checkpoints.load(target, training.contents).step == 2
    assert checkpoints.load(target / "checkpoint_0", training.contents).step == 0
    assert visible(tmp_path) == ["out"]


def test_what_others_put_into_a_checkpoint_is_found_when_its_writer_died(
    tmp_path: Path, checkpoints: Checkpoints
) -> None:
    training = Training(single())
    checkpoints.save(tmp_path / "out", training.contents, step=0)
    (tmp_path / "out" / "tokenizer.json").write_text("mine")
    name = hidden_name(tmp_path / "out", "old", "ab").name
    left = tmp_path / name.replace(f"-{name.split('-')[-2]}-", "-99999999-")
    (tmp_path / "out").rename(left)
    checkpoints.save(tmp_path / "other", training.contents, step=1)
    assert visible(tmp_path) == [left.name, "other"]
    checkpoints.save(tmp_path / "out", training.contents, step=1)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "mine"
    assert visible(tmp_path) == ["other", "out"]


def test_leftovers_of_dead_writers_are_removed_and_live_ones_kept(tmp_path: Path) -> None:
    live = hidden_name(tmp_path / "c", "partial", "ab")
    dead = live.with_name(live.name.replace(f"-{live.name.split('-')[-2]}-", "-99999999-"))
    elsewhere = live.with_name(".c.partial-00000000-1-ab")
    for path in (live, dead, elsewhere):
        path.mkdir()
    (dead / "manifest.json").touch()
    assert remove_leftovers(tmp_path, LocalFileSystem(), complete=False) == []
    assert remove_leftovers(tmp_path, LocalFileSystem(), complete=True) == [dead]
    assert remove_leftovers(tmp_path, LocalFileSystem(), complete=False, age=-1.0) == [elsewhere]
    assert visible(tmp_path) == [live.name]


def test_failing_hook_or_state_dict_fails_the_save_and_leaves_nothing(
    tmp_path: Path, checkpoints: Checkpoints
) -> None:
    def hook(folder: Path) -> None:
        raise RuntimeError("no licence")

    with pytest.raises(CheckpointError, match="rank 0: RuntimeError: no licence"):
        checkpoints.save(tmp_path / "c", Contents(before=(hook,)), step=1)
    assert visible(tmp_path) == []


class Opaque:
    executed = False

    def __reduce__(self) -> Any:
        return (_execute, ())


def _execute() -> Opaque:
    Opaque.executed = True
    return Opaque()


def test_pickled_code_runs_only_when_allowed(tmp_path: Path, checkpoints: Checkpoints) -> None:
    contents = Contents(shared={"mine": Counter(Opaque())})
    with pytest.warns(UserWarning, match=r"mine\.value is a .*Opaque.*allow_pickle=True"):
        checkpoints.save(tmp_path / "c", contents, step=1)
    with pytest.raises(CheckpointError, match="'mine' can only be read by unpickling"):
        checkpoints.load(tmp_path / "c", contents)
    assert not Opaque.executed
    checkpoints.load(tmp_path / "c", contents, allow_pickle=True)
    assert Opaque.executed


def test_nothing_there_is_said(tmp_path: Path, checkpoints: Checkpoints) -> None:
    with pytest.raises(CheckpointError, match="is not there"):
        checkpoints.load(tmp_path / "c", Contents())
    assert checkpoints.newest_complete(tmp_path / "none").path is None


def test_meta_tensor_is_refused_by_name(tmp_path: Path, checkpoints: Checkpoints) -> None:
    training = Training(single())
    training.bare[0].to("meta")
    with pytest.raises(CheckpointError, match=r"model: 0\.weight is on the meta device"):
        checkpoints.save(tmp_path / "c", training.contents, step=1)


def test_close_may_be_called_twice(checkpoints: Checkpoints) -> None:
    checkpoints.close()
    checkpoints.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("asynchronous", [False, True])
def test_device_state_is_saved_as_it_was_and_comes_back(tmp_path: Path, asynchronous: bool) -> None:
    checkpoints = Checkpoints(world=single("cuda:0"))
    model = torch.nn.Linear(1000, 1000, device="cuda")
    optimizer = torch.optim.AdamW(model.parameters())
    contents = Contents(sharded={"model": ModelState(model), "optimizer": OptimizerState(optimizer, [model])})
    for step in range(3):
        model(torch.ones(4, 1000, device="cuda")).sum().backward()
        optimizer.step()
        wanted = {name: value.clone() for name, value in model.state_dict().items()}
        checkpoints.save(tmp_path / "c", contents, step=step, asynchronous=asynchronous)
        with torch.no_grad():
            model.weight.zero_()
        checkpoints.load(tmp_path / "c", contents)
        assert same(dict(model.state_dict()), wanted)
    assert optimizer.state[model.weight]["exp_avg"].is_cuda
    checkpoints.close()
