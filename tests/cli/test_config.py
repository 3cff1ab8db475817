"""`nbaccel config`, and a file's way to the ranks."""

from __future__ import annotations

import io
import json
from pathlib import Path
from textwrap import dedent

import pytest
import yaml

from nbaccel.config import RunConfig
from tests.cli.conftest import Command, Writer, said_by


def test_default_writes_what_is_here_and_the_flags(nbaccel: Command):
    done = nbaccel("config", "--default", "--device", "cpu", "-n", 3, "--set", "keep=2")
    assert done.code == 0, done.err
    assert yaml.safe_load(Path("nbaccel.yaml").read_text()) == {
        "num_processes": 3, "device": "cpu", "mixed_precision": "no", "keep": 2,
    }  # fmt: skip
    again = nbaccel("config", "--default")
    assert again.code == 2
    assert "--force" in again.err
    assert nbaccel("config", "--default", "--force", "--user").code == 0
    nowhere = nbaccel("config", "--default", "--file", "nbaccel.yaml/mine.yaml")
    assert (nowhere.code, "mine.yaml cannot be written: " in nowhere.err) == (2, True)


def test_questions_are_those_that_flags_leave_open(nbaccel: Command, monkeypatch: pytest.MonkeyPatch):
    answers = ["0", "2", "bf16", "4", "1.0", "n", "7", "jsonl", "out", "later", "10min", "", "y"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(answers) + "\n"))
    done = nbaccel("config", "--device", "cpu")
    assert done.code == 0, done.err
    assert "num_processes must be at least 1" in done.out
    assert "'later'" in done.out
    assert yaml.safe_load(Path("nbaccel.yaml").read_text()) == {
        "num_processes": 2, "device": "cpu", "mixed_precision": "bf16", "gradient_accumulation_steps": 4,
        "gradient_clipping": 1.0, "seed": 7, "log_with": ["jsonl"], "project_dir": "out", "save_every": "10min",
        "keep": 3, "resume": "auto",
    }  # fmt: skip


def test_questions_without_a_terminal_write_nothing(nbaccel: Command, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    done = nbaccel("config")
    assert done.code == 2
    assert "--default" in done.err
    assert not Path("nbaccel.yaml").exists()


def test_show_names_the_line_of_each_value(nbaccel: Command):
    Path("nbaccel.yaml").write_text("# a comment\nseed: 3\n")
    done = nbaccel("config", "show", "--set", "keep=2")
    assert done.out.split() == ["file:", str(Path("nbaccel.yaml").resolve()), "seed", "3", "nbaccel.yaml:2",
                                "keep", "2", "--set"]  # fmt: skip
    assert json.loads(nbaccel("config", "show", "--json").out)["seed"] == 3
    Path("nbaccel.yaml").unlink()
    assert "no configuration file" in nbaccel("config", "show").out


def test_validate_and_update_say_what_is_wrong(nbaccel: Command):
    Path("nbaccel.yaml").write_text("device: cpu\nnum_processes: two  # many\n")
    done = nbaccel("config", "validate")
    assert (done.code, "nbaccel.yaml:2" in done.err) == (2, True)
    assert nbaccel("config", "update", "num_processes=2").code == 0
    assert Path("nbaccel.yaml").read_text() == "device: cpu\nnum_processes: 2  # many\n"
    assert "2 rank(s) on cpu" in nbaccel("config", "validate").out
    done = nbaccel("config", "update", "num_procs=2")
    assert (done.code, "unknown option 'num_procs' in the command" in done.err) == (2, True)
    done = nbaccel("config", "update", "num_processes.size=2")
    assert (done.code, "num_processes is 2 and has no options of its own" in done.err) == (2, True)
    assert nbaccel("config", "validate", "nothing.yaml").code == 2
    Path("nbaccel.yaml").write_text(
        "device: cpu\nnum_processes: 2\nstrategy: fsdp\nfsdp: {reshard_after_forward: 4}\n"
    )
    Path("train.py").touch()
    for command in (("config", "validate"), ("launch", "train.py")):
        done = nbaccel(*command)
        assert done.code == 2
        assert (
            "fsdp (from nbaccel.yaml:4): reshard_after_forward is 4, which does not divide the 2" in done.err
        )
    assert "on each of 2 hosts" in nbaccel("config", "validate", "--nnodes", 2).out


def write_as_accelerate_does() -> None:
    """In a rank: what the tests' process has imported, every server it starts imports too."""
    from accelerate.commands.config.config_args import ClusterConfig

    theirs = ClusterConfig(
        compute_environment="LOCAL_MACHINE", distributed_type="MULTI_CPU", mixed_precision="bf16",
        use_cpu=True, debug=False, num_processes=2, machine_rank=0, num_machines=1, rdzv_backend="static",
        same_network=True, main_training_function="main", enable_cpu_affinity=True,
        dynamo_config={"dynamo_backend": "INDUCTOR", "dynamo_mode": "max-autotune"},
    )  # fmt: skip
    theirs.to_yaml_file("theirs.yaml")


def test_import_takes_over_what_accelerate_wrote(clean, nbaccel: Command):
    from nbaccel import notebook_launcher

    notebook_launcher(write_as_accelerate_does, num_processes=1, device="cpu", folder=False)
    done = nbaccel("config", "import", "theirs.yaml")
    assert done.code == 0, done.err
    assert yaml.safe_load(Path("nbaccel.yaml").read_text()) == {
        "num_processes": 2, "device": "cpu", "mixed_precision": "bf16", "compile": "max-autotune",
    }  # fmt: skip
    assert [line for line in done.out.splitlines() if "left out" in line] == [
        "left out: enable_cpu_affinity: True (theirs.yaml:8): not built"
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_NPU\n",
            "is 'MULTI_NPU', which is not known",
        ),
        ("compute_environment: LOCAL_MACHINE\ngpu_ids: all,1\n", "gpu_ids (from theirs.yaml:2) is 'all,1'"),
        (
            "compute_environment: LOCAL_MACHINE\ndynamo_config: inductor\n",
            "theirs.yaml:2) is 'inductor'; accelerate",
        ),
        ("compute_environment: AMAZON_SAGEMAKER\n", "only LOCAL_MACHINE"),
        ("seed: 1\n", "is no configuration file of accelerate's"),
    ],
)
def test_import_refuses_what_cannot_be_taken_over(nbaccel: Command, text: str, words: str):
    Path("theirs.yaml").write_text(text)
    done = nbaccel("config", "import", "theirs.yaml")
    assert done.code == 2
    assert words in done.err
    assert not Path("nbaccel.yaml").exists()


def test_page_of_the_command_line_names_every_key():
    page = (Path(__file__).resolve().parents[2] / "docs" / "cli.md").read_text()
    assert [key for key in sorted(RunConfig.names() - {"sources"}) if f"`{key}`" not in page] == []


IMPORTED: dict[str, tuple[str, dict[str, object], list[str]]] = {
    "fsdp": (
        """
        distributed_type: FSDP
        fsdp_config: {fsdp_version: 2, fsdp_reshard_after_forward: false, fsdp_offload_params: true,
          fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP, fsdp_transformer_layer_cls_to_wrap: "A,B",
          fsdp_state_dict_type: SHARDED_STATE_DICT, fsdp_min_num_params: 0, fsdp_unheard: 1}
        num_processes: 2
        main_process_port: null
        """,
        {"num_processes": 2, "strategy": "fsdp",
         "fsdp": {"reshard_after_forward": False, "wrap": ["A", "B"], "cpu_offload": True}},
        ["left out: fsdp_config.fsdp_unheard: 1 (theirs.yaml:3): there is nothing like it here"],
    ),
    "deepspeed": (
        """
        distributed_type: DEEPSPEED
        deepspeed_config: {zero_stage: 3, offload_optimizer_device: cpu, offload_param_device: none,
          gradient_accumulation_steps: 4, gradient_clipping: auto, zero3_init_flag: true}
        num_processes: 2
        use_cpu: true
        """,
        {"num_processes": 2, "device": "cpu", "strategy": "deepspeed", "gradient_accumulation_steps": 4,
         "deepspeed": {"stage": 3, "offload_optimizer": "cpu"}},
        [],
    ),
    "megatron": (
        "distributed_type: MEGATRON_LM\nmegatron_lm_config: {megatron_lm_tp_degree: 2, megatron_lm_pp_degree: 2}",
        {"strategy": "megatron", "megatron": {"size": 2}},
        ["left out: megatron_lm_config.megatron_lm_pp_degree: 2 (theirs.yaml:3): there is nothing like it here"],
    ),
    "tpu": (
        "distributed_type: XLA\nnum_processes: 8",
        {"device": "tpu"},
        ["left out: num_processes: 8 (theirs.yaml:3): a TPU's runtime takes all chips of the host"],
    ),
    "several machines, float8": (
        """
        distributed_type: MULTI_GPU
        num_machines: 2
        num_processes: 16
        mixed_precision: fp8
        fp8_config: {backend: TE}
        """,
        {"num_processes": 8, "device": "cuda", "mixed_precision": "fp8", "fp8": {"backend": "transformer_engine"}},
        ["num_processes: 16 of 2 machines together (theirs.yaml:4) are 8 on each",
         "left out: num_machines: 2 (theirs.yaml:3): several machines: nbaccel launch --nnodes --rdzv-endpoint"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", IMPORTED)
def test_import_takes_over_strategies_and_devices(nbaccel: Command, what: str):
    text, ours, notes = IMPORTED[what]
    Path("theirs.yaml").write_text("compute_environment: LOCAL_MACHINE\n" + dedent(text).lstrip())
    done = nbaccel("config", "import", "theirs.yaml")
    assert done.code == 0, done.err
    written = Path("nbaccel.yaml").read_text()
    assert yaml.safe_load(written) == ours
    assert done.out.partition(written)[2].splitlines() == notes


TRAIN = """
    from nbaccel import Accelerator
    acc = Accelerator()
    print(acc.num_processes, acc.mixed_precision, acc.gradient_accumulation_steps, acc.config.seed)
"""


@pytest.mark.filterwarnings("ignore:mixed_precision='bf16' is emulated")
def test_file_flags_and_set_reach_the_ranks(clean, nbaccel: Command, script: Writer):
    name = script(TRAIN)
    Path("nbaccel.yaml").write_text("device: cpu\nnum_processes: 2\nmixed_precision: bf16\nseed: 3\n")
    assert said_by(nbaccel("launch", "--no-folder", name).out, "2 bf16 1 3") == {0, 1}
    flags = ("--gradient-accumulation-steps", 4, "--set", "num_processes=1", "--set", "seed=5")
    assert nbaccel("launch", "--no-folder", *flags, name).out.endswith("1 bf16 4 5\n")
    twice = nbaccel("launch", "-n", 1, name)
    assert twice.code == 2
    assert "asked twice: 1 by --num-processes and 2 by nbaccel.yaml:2" in twice.err
    assert "--set" in twice.err
    other = nbaccel("launch", "--config", "none", "--device", "cpu", "-n", 1, "--no-folder", name)
    assert other.out.endswith("1 no 1 None\n")


def test_same_file_serves_the_notebook(clean, nbaccel: Command):
    from nbaccel import notebook_launcher

    def train() -> tuple[int, int | None]:
        from nbaccel import Accelerator

        acc = Accelerator()
        return acc.num_processes, acc.config.seed

    path = Path("mine.yaml")  # "auto" is what the session below is asked
    path.write_text("device: cpu\nnum_processes: 2\nseed: 3\n")
    assert notebook_launcher(train, config=path, folder=False) == [(2, 3)] * 2


def test_same_file_serves_a_session(clean, nbaccel: Command):
    import nbaccel as package

    Path("nbaccel.yaml").write_text("device: cpu\nnum_processes: 2\nseed: 3\n")
    with package.Session(config="auto") as session:
        assert session.run(_seed_of_the_launch) == [3, 3]


def _seed_of_the_launch() -> int | None:
    from nbaccel import Accelerator

    return Accelerator().config.seed
