"""The commands that look: runs, logs, launch --from, env, doctor, estimate, merge, test, completion."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import Command, Outcome, Writer, said_by


@pytest.fixture
def runs_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty state folder of this test's own."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "nbaccel" / "runs"


def launch(nbaccel: Command, *arguments: object) -> Outcome:
    return nbaccel("launch", "--device", "cpu", "-n", 2, *arguments)


def test_runs_and_logs_tell_what_was_launched(clean, runs_root: Path, nbaccel: Command, script: Writer):
    assert "no runs" in nbaccel("runs").out
    launch(nbaccel, "--name", "good", script("import os; print('rank', os.environ['RANK'])"))
    launch(nbaccel, "--name", "bad", script("print('before')\nraise ValueError('boom')", "bad.py"))
    listed = nbaccel("runs").out.splitlines()
    assert len(listed) == 3
    assert "bad" in listed[1]
    assert "failed rank" in listed[1]
    assert "ValueError: boom" in listed[1]
    assert listed[2].split()[-1] == "done"
    good = json.loads(nbaccel("runs", "--json").out)[1]
    assert (good["name"], good["state"]) == ("good", "done")
    assert nbaccel("logs", good["run"]).out == "[rank 0] rank 0\n[rank 1] rank 1\n"
    assert nbaccel("logs", "good", "-r", 1).out == "rank 1\n"
    assert nbaccel("logs", "good", "-f").out == "[rank 0] rank 0\n[rank 1] rank 1\n"
    assert "before" in nbaccel("logs").out
    assert nbaccel("logs", "nothing").code == 2
    assert "that of [0, 1]" in nbaccel("logs", "good", "-r", 7).err


def test_run_is_launched_again_as_it_was(clean, runs_root: Path, nbaccel: Command, script: Writer):
    text = "import sys\nfrom nbaccel import Accelerator\nprint(sys.argv[1:], Accelerator().config.seed)"
    asked = ("--output", "all", "--max-time", "2m", "--name", "mine", "--env", "TOKEN=secret")
    launch(nbaccel, "--seed", 5, *asked, script(text), "--lr", "3")
    again = nbaccel("launch", "--from", "last")
    assert said_by(again.out, "['--lr', '3'] 5") == {0, 1}, again.err
    assert "[rank 0] ['--lr', '3'] 5\n" in again.out  # output=all, as before: nothing is folded
    assert "--env TOKEN the values are not kept" in again.err
    (*_, newest) = sorted(runs_root.iterdir())
    facts = json.loads((newest / "run.json").read_text())
    assert (facts["name"], facts["command"]["options"]["max_time"]) == ("mine", "2m")
    assert "secret" not in (newest / "run.json").read_text()
    other = nbaccel(
        "launch", "--from", "mine", "--output", "auto", "--set", "seed=6", "--set", "num_processes=1"
    )
    assert "['--lr', '3'] 6" in other.out
    script(text + "\nprint('new')")
    changed = nbaccel("launch", "--from", "last")
    assert "has changed since" in changed.err
    assert nbaccel("launch", "--from", "last", "--seed", 7).code == 2  # asked twice
    assert nbaccel("launch", "--from", "nothing").code == 2

    for damaged in ({"target": "train.py"}, {**facts["command"], "arguments": 3}):
        (newest / "run.json").write_text(json.dumps({**facts, "command": damaged}))
        refused = nbaccel("launch", "--from", newest)
        assert refused.code == 2
        assert "run.json is damaged" in refused.err
    (newest / "run.json").write_text(json.dumps({**facts, "cwd": "/nowhere"}))
    assert "was started in /nowhere, which cannot be gone to" in nbaccel("launch", "--from", newest).err

    from nbaccel import notebook_launcher

    notebook_launcher(os.getpid, num_processes=1, device="cpu")
    assert "no script to run again" in nbaccel("launch", "--from", "last").err


def test_env_tells_versions_and_no_secrets(nbaccel: Command, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    done = nbaccel("env")
    assert done.code == 0
    facts = json.loads(nbaccel("env", "--json").out)
    import torch

    assert facts["packages"]["torch"] == torch.__version__
    assert facts["variables"]["NCCL_DEBUG"] == "INFO"
    assert facts["jupyter kernels"]
    for secret in ("hf_secret", os.uname().nodename):
        assert secret not in done.out


def test_doctor_looks_and_changes_nothing(nbaccel: Command, runs_root: Path):
    done = nbaccel("doctor")
    assert "run folders" in done.out
    assert done.code in (0, 1)
    runs_root.parent.mkdir(parents=True, exist_ok=True)
    runs_root.rmdir()
    runs_root.write_text("a file where the folder should be")
    done = nbaccel("doctor")
    assert done.code == 1
    assert "✗ run folders" in done.out


def test_selftest_checks_numbers_on_two_ranks(clean, nbaccel: Command, monkeypatch: pytest.MonkeyPatch):
    done = nbaccel("test", "--device", "cpu")
    assert done.code == 0, done.out
    assert done.out.count("✓") == 5
    assert "everything agrees" in done.out
    from nbaccel.cli import selftest

    monkeypatch.setattr(selftest, "_EXACT", -1.0)  # no two numbers are as near as that
    wrong = nbaccel("test", "--device", "cpu")
    assert wrong.code == 1
    assert "✗ the losses are those of 1 rank" in wrong.out
    refused = nbaccel("test", "--device", "tpu")
    assert refused.code == 1
    assert "TPU" in refused.out


def test_estimate_and_merge_speak_of_what_they_did(clean, nbaccel: Command, script: Writer, tmp_path: Path):
    done = nbaccel("estimate", "torch.nn:Transformer", "-n", 4)
    assert "44,140,544 parameters" in done.out
    assert all(f"\n {name}  " in done.out for name in ("ddp", "zero-2", "fsdp"))
    rows = json.loads(nbaccel("estimate", "torch.nn:Transformer", "--json").out)
    alone = rows["training"][0]
    assert alone["weights"] + alone["gradients"] + alone["optimizer"] == 16 * 44_140_544
    assert nbaccel("estimate", "nothing").code == 2
    name = script("""
        import torch
        from nbaccel import Accelerator
        acc = Accelerator(project_dir="out")
        acc.prepare(torch.nn.Linear(3, 3))
        acc.save_state()
    """)
    assert launch(nbaccel, "--no-folder", name).code == 0
    merged = nbaccel("merge", "out", "model")
    assert "saved by 2 rank(s), 2 tensors" in merged.out
    assert Path("model/model.safetensors").exists()
    assert nbaccel("merge", "nothing", "model").code == 2


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_printed_for_each_shell(nbaccel: Command, shell: str):
    assert "_NBACCEL_COMPLETE" in nbaccel("completion", shell).out


def test_completion_knows_commands_options_and_keys():
    def complete(*words: str) -> str:
        variables = {"_NBACCEL_COMPLETE": "bash_complete", "COMP_WORDS": " ".join(words)}
        variables |= {"COMP_CWORD": str(len(words) - 1)}
        code = "from nbaccel.cli.main import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stdout

    assert "launch" in complete("nbaccel", "la")
    assert "--num-processes" in complete("nbaccel", "launch", "--num")
    assert "gradient_clipping=" in complete("nbaccel", "launch", "--set", "gradient_c")
