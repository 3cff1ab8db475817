"""Configuration files: found in order, read with their lines, refused by key and line, changed in place."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbaccel.config import RunConfig
from nbaccel.errors import ConfigError
from nbaccel.session import configfile


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project with an empty user folder."""
    project = tmp_path / "project"
    (project / "sub").mkdir(parents=True)
    (project / ".git").mkdir()
    monkeypatch.chdir(project)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return project


def write(path: Path | str, text: str) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_values_are_read_as_yaml_one_point_two(here: Path):
    text = (
        "mixed_precision: no\nsave_every: 15min\ngradient_clipping: 1e-1\ndevices: [4, 5]\nlog_with: jsonl\n"
        "stop_after: 11h30m\nddp: {bucket_cap_mb: 50}\ncompile: max-autotune\nverify: false\nseed:\n"
    )
    config = configfile.read_file(write("nbaccel.yaml", text)).config()
    assert config == RunConfig(
        mixed_precision="no",
        save_every="15min",
        gradient_clipping=0.1,
        devices=(4, 5),
        log_with=("jsonl",),
        stop_after="11h30m",
        ddp={"bucket_cap_mb": 50},
        compile="max-autotune",
        verify=False,
    )
    assert config.sources["stop_after"] == "nbaccel.yaml:6"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("num_procesess: 2", "unknown option 'num_procesess' in x.yaml:1; did you mean 'num_processes'?"),
        (
            "seed: 1\nmixed_precision: bf17",
            "mixed_precision (from x.yaml:2) is 'bf17'; it must be one of 'no'",
        ),
        ("num_processes: two", "num_processes (from x.yaml:1) must be an int, not 'two'"),
        ("verify: yes", "verify (from x.yaml:1) is 'yes'; it must be true or false"),
        ("gradient_clipping: -1", "gradient_clipping (from x.yaml:1) is -1; it must be a number above 0"),
        ("save_every: soon", "save_every (from x.yaml:1) is 'soon'"),
        ("save_every: 0", "save_every (from x.yaml:1) is 0; it must be steps"),
        ("devices: all", "devices (from x.yaml:1) is 'all'; it must be indices"),
        (
            "ddp: {bucket_cap: 3}",
            "ddp (from x.yaml:1) has no option 'bucket_cap'; did you mean 'bucket_cap_mb'?",
        ),
        ("\nfsdp: {rap: 1}", "fsdp (from x.yaml:2) has no option 'rap'; did you mean 'wrap'?"),
        (
            "fsdp: {sharding: full}",
            "fsdp (from x.yaml:1): sharding is 'full'; it must be one of 'full_shard'",
        ),
        ("ddp: {bucket_cap_mb: abc}", "ddp (from x.yaml:1): bucket_cap_mb is 'abc'; it must be a number"),
        ("ddp: {bucket_cap_mb: -5}", "bucket_cap_mb is -5; it must be a number, 0 or more"),
        (
            "ddp: {find_unused_parameters: maybe}",
            "find_unused_parameters is 'maybe'; it must be true or false",
        ),
        ("ddp: {comm_hook: fp17}", "comm_hook is 'fp17'; it must be one of 'fp16', 'bf16', 'power_sgd'. Did"),
        ("ddp: {power_sgd_rank: 0}", "power_sgd_rank is 0; it must be an int of at least 1"),
        ("ddp: 3", "ddp (from x.yaml:1) is 3; it must be options by name, as in {bucket_cap_mb: 50}"),
        ("fsdp: {reshard_after_forward: half}", "is 'half'; it must be true or false or an int"),
        ("fsdp: {tensor_parallel: {size: 2}}", "in YAML, the key tensor_parallel beside this one"),
        ("deepspeed: {overlap_comm: 3}", "overlap_comm is 3; it must be true or false"),
        ("deepspeed: {stage: true}", "stage is True; it must be 0, 1, 2, 3 or 'auto'"),
        ("pipeline: {split: [1, 2]}", "split is [1, 2]; it must be a list of names"),
        (
            "seed: 1\nstrategy: {name: fsdp, reshard: 3}",
            "strategy (from x.yaml:2) is {'name': 'fsdp', 'reshard': 3}; it must be a name, with the options beside it",
        ),
        ("strategy: [fsdp]", "strategy (from x.yaml:1) is ['fsdp']; it must be a name"),
        ("tensor_parallel: {size: -1}", "tensor_parallel (from x.yaml:1): size is -1"),
        (
            "fp8: {recipe: colwise}",
            "fp8 (from x.yaml:1): recipe is 'colwise'; it must be one of 'tensorwise'",
        ),
        ("fp8: {skip: 3}", "fp8 (from x.yaml:1): skip is 3; it must be a list of names"),
        ("device: [cpu]", "device (from x.yaml:1) is ('cpu',); it must be one of 'auto', 'cpu'"),
        ("devices: [true]", "devices (from x.yaml:1) is (True,); it must be indices"),
        ("max_restarts: false", "max_restarts (from x.yaml:1) is False; it must be an int, 0 or more"),
        ("seed: -1", "seed (from x.yaml:1) is -1; it must be an int from 0 to 2**63 - 1"),
        ("project_dir: ''", "project_dir (from x.yaml:1) is ''; it must be text, and not empty"),
        ("stop_after: 90", "stop_after (from x.yaml:1) is 90; it must be a time, as in '11h30m'"),
        (
            "collective_timeout: 1e400",
            "collective_timeout (from x.yaml:1) must be a number of seconds above 0",
        ),
        ("ddp: {bucket_cap_mb: 1e400}", "bucket_cap_mb is inf; it must be a number"),
        (
            "tensor_parallel: {plan: {a: 1}}",
            "tensor_parallel (from x.yaml:1): the style of 'a' is 1; it must be one of 'column'",
        ),
        ("seed: 1\n\nseed: 2", "x.yaml: seed stands twice, in line 1 and in line 3"),
        ("a: [1\nb: 2", "x.yaml:2 is not YAML"),
        ("- a\n- b", "x.yaml holds no keys"),
        ("seed: 1\n? [a]\n: 2", "x.yaml:2 has a key that is no word"),
        ("seed: !!python/object/apply:os.system [ls]", "x.yaml:1 is not YAML"),
    ],
)
def test_bad_file_is_refused_with_key_value_and_line(text: str, words: str):
    with pytest.raises(ConfigError) as refused:
        configfile.read_file(write("x.yaml", text)).config()
    assert words in str(refused.value)


def test_all_problems_are_told_at_once():
    path = write("x.yaml", "num_processes: two\nseed: x\n")
    with pytest.raises(ConfigError, match=r"x\.yaml:1[\s\S]*x\.yaml:2"):
        configfile.read_file(path).config()


def test_search_takes_the_project_before_the_user_and_the_named_before_both(
    here: Path, monkeypatch: pytest.MonkeyPatch
):
    assert configfile.find_file() is None
    own = write(configfile.user_file(), "seed: 1")
    assert configfile.find_file() == own
    toml = write("pyproject.toml", '[project]\nname = "x"\n')
    assert configfile.find_file() == own
    toml.write_text("[tool.nbaccel]\nseed = 2\nddp.static_graph = true\n[tool.ruff]\nseed = 4\n")
    assert configfile.find_file() == here / "pyproject.toml"
    assert configfile.load_config("auto") == RunConfig(seed=2, ddp={"static_graph": True})
    toml.unlink()
    write("nbaccel.yaml", "seed: 3")
    monkeypatch.chdir(here / "sub")
    assert configfile.load_config("auto").seed == 3
    named = write("other.yaml", "seed: 5")
    assert configfile.load_config(named).seed == 5
    with pytest.raises(ConfigError, match=r"no configuration file nothing\.yaml"):
        configfile.find_file("nothing.yaml")


def test_search_stops_where_the_project_ends(here: Path):
    write(here.parent / "nbaccel.yaml", "seed: 3")
    assert configfile.find_file() is None


def test_two_files_in_one_project_are_refused():
    write("nbaccel.yaml", "seed: 3")
    write("pyproject.toml", "[tool.nbaccel]\nseed = 2\n")
    with pytest.raises(ConfigError, match="keep one of them"):
        configfile.find_file()


def test_toml_lines_are_told():
    path = write("pyproject.toml", "[tool.x]\nseed = 1\n\n[tool.nbaccel]\n# here\nsede = 2\n")
    with pytest.raises(ConfigError, match=r"'sede' in pyproject\.toml:6; did you mean 'seed'"):
        configfile.read_file(path).config()


def test_change_keeps_comments_and_the_rest():
    text = "# ours\nseed: 1  # lucky\nddp:\n  bucket_cap_mb: 25  # MB\n\nkeep: 3\n"
    path = write("nbaccel.yaml", text)
    changed = configfile.change(path, {"seed": 2, "keep": None, "resume": "auto", "verify": True})
    assert (
        changed == "# ours\nseed: 2  # lucky\nddp:\n  bucket_cap_mb: 25  # MB\n\nresume: auto\nverify: true\n"
    )
    path.write_text(configfile.change(path, {"ddp": {"bucket_cap_mb": 50}}))
    assert configfile.read_file(path).config() == RunConfig(seed=1, ddp={"bucket_cap_mb": 50}, keep=3)


def test_override_goes_over_what_was_asked():
    asked = RunConfig.from_mapping({"seed": 1, "ddp": {"static_graph": True}}, place="x.yaml")
    new = configfile.override(asked, ["seed=2", "ddp.bucket_cap_mb=50", "mixed_precision=no"])
    assert (new.seed, new.mixed_precision) == (2, "no")
    assert new.ddp == {"static_graph": True, "bucket_cap_mb": 50}
    assert new.sources["seed"] == "--set"
    assert configfile.override(new, ["seed=null"]).seed is None
    for text in ("seed", "=1", "sede=1", "seed=[1"):
        with pytest.raises(ConfigError):
            configfile.override(asked, [text])


def test_what_is_dumped_reads_as_it_was():
    values = {"mixed_precision": "no", "devices": (1, 2), "seed": 3, "resume": "auto"}
    path = write("x.yaml", configfile.dump(values))
    assert configfile.read_file(path).config() == RunConfig(**values)


def test_who_asked_cannot_be_asked():
    with pytest.raises(ConfigError, match="unknown option 'sources"):
        configfile.read_file(write("x.yaml", "sources: {seed: me}")).config()
    with pytest.raises(ConfigError, match="unknown option 'sources"):
        configfile.override(RunConfig(), ["sources=1"])
