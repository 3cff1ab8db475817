"""`nbaccel launch` on real ranks: arguments, exit codes, reports, what it runs."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

import pytest

from tests.cli.conftest import Command, Writer, said_by
from tests.conftest import gone, named, wait_until

CPU = ("launch", "--device", "cpu", "-n", 2)
ECHO = """
    import os, sys
    here = sys.path[0] == os.getcwd()
    print(os.environ["RANK"], os.environ["WORLD_SIZE"], __name__, os.path.basename(__file__), here, sys.argv[1:])
"""


def write_notebook(*cells: str, may_raise: Collection[int] = ()) -> None:
    """t.ipynb; those of the numbers `may_raise` are tagged so."""
    document = {
        "cells": [
            {
                "cell_type": "code",
                "source": cell.splitlines(True),
                "metadata": {"tags": ["raises-exception"]} if number in may_raise else {},
            }
            for number, cell in enumerate(cells, 1)
        ]
    }
    Path("t.ipynb").write_text(json.dumps(document))


def test_script_gets_its_own_arguments_when_they_look_like_ours(clean, nbaccel: Command, script: Writer):
    own = ["--num-processes", "9", "-n", "3", "--help", "--start", "--", "-m", "--set", "x=1"]
    done = nbaccel(*CPU, "--no-folder", script(ECHO), *own)
    assert done.code == 0, done.err
    assert f"[rank 0] 0 2 __main__ train.py True {own}" in done.out
    assert f"[rank 1] 1 2 __main__ train.py True {own}" in done.out


def test_script_is_compiled_as_python_would(clean, nbaccel: Command, script: Writer):
    text = "def f(x: int): pass\nassert f.__annotations__ == {'x': int}, f.__annotations__\nprint('as written')\n"
    write_notebook(text)
    for name in (script(text), "t.ipynb"):
        done = nbaccel(*CPU, "--no-folder", name)
        assert said_by(done.out, "as written") == {0, 1}, done.err


def test_module_runs_as_main_when_asked_with_m(clean, nbaccel: Command, script: Writer):
    Path("pkg").mkdir()
    script("v = 5", "pkg/x.py")
    script("", "pkg/__init__.py")
    script(
        "import sys; from . import x; print(__name__, __package__, __spec__.name, x.v, sys.argv[1:])",
        "pkg/__main__.py",
    )
    done = nbaccel(*CPU, "--no-folder", "-m", "pkg", "-m", "--lr=3")
    assert said_by(done.out, "__main__ pkg pkg.__main__ 5 ['-m', '--lr=3']") == {0, 1}, done.err
    assert nbaccel(*CPU, "-m", "pgk").code == 2


def test_notebook_runs_as_a_script_and_its_own_launch_runs_in_place(clean, nbaccel: Command):
    cells = [
        "from __future__ import annotations\n%matplotlib inline\nimport os, sys\n!ls",
        "%%bash\nls",
        "import asyncio\nqueue = asyncio.Queue()\nawait queue.put(3)",
        "three = await queue.get()\n!echo",
        "import enum\nfrom nbaccel import notebook_launcher\n"
        "class Size(enum.Enum):\n    A4 = 210, 297\n    def __init__(self, *both):\n        self.width = both[0]\n"
        "def f(later: Later = None):\n    assert Size.A4.width == 210\n    return os.environ['RANK']",
        "print(notebook_launcher(f, num_processes=2), sys.argv[1:], three)\n"
        "import multiprocessing\nworker = multiprocessing.get_context('spawn').Process(target=f)\n"
        "worker.start()\nworker.join()\nprint('the spawned worker left with', worker.exitcode)",
        "if os.environ['RANK'] == '1':\n    1 / 0",
    ]
    write_notebook(*cells)
    done = nbaccel(*CPU, "--no-folder", "t.ipynb", "--own")
    assert done.code == 1
    assert {"[rank 0] ['0'] ['--own'] 3", "[rank 1] ['1'] ['--own'] 3"} <= set(done.out.splitlines())
    assert said_by(done.out, "the spawned worker left with 0") == {0, 1}, done.err
    assert 'File "t.ipynb, cell 7", line 2' in done.err
    assert "    1 / 0\nZeroDivisionError" in done.err
    said = ("1: %matplotlib inline", "1: !ls", "2: %%bash", "4: !echo")
    assert "".join(f"\n  t.ipynb, cell {line}" for line in said) in done.err


def test_notebook_goes_on_after_a_cell_that_may_raise(clean, nbaccel: Command):
    write_notebook(
        "from nbaccel import Accelerator\nacc = Accelerator()\nacc.wait_for_everyone()",
        "raise ValueError('on all ranks')",
        "acc.wait_for_everyone()\n%time x = f'in {acc.num_processes}'\nprint('together', x)",
        "if acc.process_index == 1:\n    raise ValueError('on one rank')\nacc.wait_for_everyone()",
        "acc = Accelerator()\nacc.wait_for_everyone()\nprint('together again', acc.num_processes)",
        "await acc.nothing()",
        may_raise=(2, 4, 6),
    )
    done = nbaccel(*CPU, "--no-folder", "t.ipynb")
    assert done.code == 0, done.err
    assert said_by(done.err, "ValueError: on all ranks") == {0, 1}
    assert said_by(done.out, "together in 2") == {0, 1}
    assert said_by(done.err, "ValueError: on one rank") == {1}
    assert said_by(done.err, "the ranks left t.ipynb, cell 4 at different places") == {0, 1}
    assert said_by(done.out, "together again 2") == {0, 1}
    assert said_by(done.err, "cell 6 may raise, by its tag: the notebook goes on") == {0, 1}
    assert "nbaccel/rank/" not in done.err


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        ("import sys; sys.exit(7 if os.environ['RANK'] == '1' else 0)", 7, "SystemExit: 7"),
        ("import sys; sys.exit()", 0, ""),
        ("import sys; sys.exit('no data')", 1, "SystemExit: no data"),
        ("raise ValueError('boom')", 1, "ranks 0-1 of 2 failed: ValueError: boom"),
        ("os._exit(5)", 5, "exit code 5"),
        ("os._exit(0)", 1, "ended without a result, exit code 0"),
        ("import signal; os.kill(os.getpid(), signal.SIGKILL)", 137, "SIGKILL"),
        ("import time; print('in', flush=True); time.sleep(30)", 124, "max_time=1 s"),
    ],
)
def test_exit_code_is_the_documented_one(
    clean, nbaccel: Command, script: Writer, body: str, code: int, words: str
):
    limit = 1 if code == 124 else 120
    done = nbaccel(*CPU, "--no-folder", "--max-time", limit, "--grace", "0.2", script(f"import os\n{body}"))
    assert done.code == code, done.err
    assert words in done.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian.py"], "there is no file trian.py; there is train.py"),
        (["train"], "-m train"),
        (["."], "is a folder"),
        (["bad.py"], "SyntaxError"),
        (["bad.ipynb"], "not a notebook"),
        (["shell.ipynb"], "shell.ipynb, cell 1, line 2: 'files = !ls' takes a value from IPython"),
        (["--num-proceses", "2", "train.py"], "--num-processes"),
        (["-n", "two", "train.py"], "'two'"),
        (["-n", "0", "train.py"], "num_processes (from --num-processes) must be at least 1"),
        (["--mixed-precision", "bf17", "train.py"], "Did you mean 'bf16'"),
        (["--strategy", "fspd", "train.py"], "Did you mean 'fsdp'"),
        (["--output", "loud", "train.py"], "output is 'loud'"),
        (["--max-time", "soon", "train.py"], "max_time is 'soon'"),
        (["--env", "NAME", "train.py"], "NAME=VALUE"),
        (["--devices", "a,b", "train.py"], "give indices"),
        ([], "Missing argument 'SCRIPT'"),
    ],
)
def test_bad_input_is_refused_before_any_process_starts(
    nbaccel: Command, script: Writer, arguments: list[str], words: str
):
    script("print('ran')")
    script("def", "bad.py")
    script("[]", "bad.ipynb")
    script('{"cells": [{"cell_type": "code", "source": "print(\'ran\')\\nfiles = !ls"}]}', "shell.ipynb")
    done = nbaccel("launch", "--device", "cpu", *arguments)
    assert done.code == 2
    assert words in done.err
    assert "ran" not in done.out


def test_deleted_working_folder_is_said(
    nbaccel: Command, script: Writer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    name = Path(script("print('ran')")).resolve()
    file = Path(script("seed: 1", "mine.yaml")).resolve()
    folder = tmp_path / "deleted"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    for arguments in (
        ("launch", name),
        ("config", "show"),
        ("config", "validate", file),
        ("config", "--default"),
    ):
        done = nbaccel(*arguments)
        assert done.code == 2
        assert "the folder this process is in has been deleted" in done.err


def test_unknown_command_names_the_nearest_one(nbaccel: Command):
    assert "Did you mean 'launch'?" in nbaccel("lunch").err
    assert "nbaccel launch x.py" in nbaccel("x.py").err


def test_run_folder_says_what_ran(clean, nbaccel: Command, script: Writer, tmp_path: Path):
    done = nbaccel(*CPU, "--folder", tmp_path / "runs", "--name", "mine", script("print('hello')"), "--a")
    assert done.code == 0
    (folder,) = (tmp_path / "runs").iterdir()
    facts = json.loads((folder / "run.json").read_text())
    assert facts["name"] == "mine"
    assert facts["function"] == str(Path("train.py").resolve())
    assert facts["source"] == "print('hello')"
    asked = json.loads((folder / "config.json").read_text())
    assert (asked["device"], asked["num_processes"]) == ("cpu", 2)
    assert asked["sources"]["num_processes"] == "--num-processes"
    assert (folder / "rank-1.log").read_text() == "hello\n"
    assert json.loads((folder / "result.json").read_text())["state"] == "done"


def test_script_in_loader_workers_finds_its_own_names(clean, nbaccel: Command, script: Writer):
    body = """
        import os
        from dataclasses import dataclass
        from torch.utils.data import DataLoader, Dataset
        @dataclass
        class Item:
            x: int
        class Data(Dataset):
            def __len__(self): return 4
            def __getitem__(self, i): return Item(i)
        def same(items): return items
        if __name__ == "__main__":
            # a worker that is spawned imports torch anew: one rank has it
            for kind in ("fork", "spawn") if os.environ["RANK"] == "0" else ("fork",):
                loader = DataLoader(Data(), num_workers=1, multiprocessing_context=kind, collate_fn=same)
                print(kind, [type(item[0]) is Item for item in loader])
    """
    done = nbaccel(*CPU, "--no-folder", script(body))
    assert done.code == 0, done.err
    assert said_by(done.out, "fork [True, True, True, True]") == {0, 1}
    assert said_by(done.out, "spawn [True, True, True, True]") == {0}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "nbaccel", *map(str, arguments)]


def test_script_runs_in_place_when_torchrun_started_it(nbaccel: Command, script: Writer):
    name = script("""
        import os, sys
        from nbaccel import Accelerator
        acc = Accelerator()
        print(f"rank {acc.process_index} of {acc.num_processes} {acc.mixed_precision} {sys.argv[1:]}")
        sys.exit(3 if acc.process_index else 0)
    """)
    ours = ["-m", "nbaccel", "launch", "--device", "cpu", "--mixed-precision", "bf16", name, "--lr", "1"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *ours]
    done = subprocess.run(torchrun, capture_output=True, text=True, timeout=100, check=False)
    assert "rank 0 of 2 bf16 ['--lr', '1']" in done.stdout, done.stderr
    assert "rank 1 of 2 bf16 ['--lr', '1']" in done.stdout
    assert "exitcode: 3" in done.stderr or "exitcode  : 3" in done.stderr


def test_output_goes_on_when_a_character_has_no_code_and_the_run_when_its_reader_leaves(
    clean, nbaccel: Command, script: Writer, tmp_path: Path
):
    name = script("""
        import os, sys, time
        print("caf\\xe9 \\u2192", flush=True)
        while not os.path.exists("left"):
            time.sleep(0.05)
        print("unread", flush=True)
        print("on stderr", file=sys.stderr)
    """)
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "XDG_STATE_HOME": str(tmp_path / "state")}
    process = subprocess.Popen(
        command(*CPU, "--output", "all", name),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    lines = {process.stdout.readline() for _ in range(2)}
    process.stdout.close()
    assert lines == {f"[rank {rank}] caf\\xe9 \\u2192\n" for rank in (0, 1)}
    Path("left").touch()
    assert process.stderr is not None
    with process.stderr:
        said = process.stderr.read()
    assert process.wait(60) == 0, said
    assert said.count("standard output cannot be written any more (whoever read it has left)") == 1
    assert said_by(said, "on stderr") == {0, 1}
    logs = subprocess.run(command("logs"), env=environment, capture_output=True, text=True, check=False)
    assert logs.stdout.startswith("[rank 0] caf\\xe9 \\u2192\n[rank 0] unread\n"), logs.stderr


def test_help_needs_no_torch():
    code = (
        "import sys\nfrom nbaccel.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'rich', 'yaml', 'numpy', 'IPython') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")
    assert "launch" in done.stdout


def test_terminal_shows_a_live_table_and_ctrl_c_ends_it_and_leaves_nothing_behind(
    nbaccel: Command, script: Writer
):
    name = script("""
        import subprocess, time, torch
        from torch.utils.data import DataLoader, TensorDataset
        from nbaccel import Accelerator
        child = subprocess.Popen(["sleep", "600"])
        print("child", child.pid, flush=True)
        acc = Accelerator()
        for x in acc.prepare(DataLoader(TensorDataset(torch.arange(6000)), batch_size=1)):
            time.sleep(0.1)
            print("batch", flush=True)
    """)
    pid, fd = pty.fork()
    if pid == 0:
        os.environ["TERM"] = "xterm"
        os.execv(sys.executable, command(*CPU, "--no-folder", name))
    try:
        seen = b""
        while not all(words in seen for words in (b"/3000 epoch 0", b"batch/s", b"] batch\r\n")):
            seen += os.read(fd, 65536)
        assert b"2 ranks on cpu" in seen
        children = [int(found) for found in re.findall(rb"child (\d+)\r\n", seen)]
        below = [*named(pid, "nb-server"), *named(pid, "nb-rank-0"), *children]
        assert len(below) == 4
        os.write(fd, b"\x03")
        while data := _read(fd):
            seen += data
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130
        assert b"nbaccel: stopped: " in seen
        assert re.search(rb"train\.py:\d+", seen)
        wait_until(lambda: gone(below), 30, "the end of everything below the command")
    finally:
        os.close(fd)


def _read(fd: int) -> bytes:
    try:
        return os.read(fd, 65536)
    except OSError:  # Linux's way to say that the terminal's other end is closed
        return b""
