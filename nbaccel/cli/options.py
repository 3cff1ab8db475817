"""What several commands take: options that are RunConfig's keys, the file, and texts users type for values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, replace
from typing import Any, TypeVar

import click

from nbaccel.config import RunConfig, combine
from nbaccel.errors import ConfigError

__all__ = ["config_options", "configuration", "environment_pairs", "file_options", "read_devices"]

F = TypeVar("F", bound=Callable[..., Any])


def read_devices(ctx: click.Context, param: click.Parameter, value: str | None) -> Any:
    """`--devices 4,5` or `--devices free`."""
    if value is None or value == "free":
        return value
    try:
        return [int(part) for part in value.split(",")]
    except ValueError:
        raise click.BadParameter(f"{value!r}: give indices, as in 4,5, or free") from None


def environment_pairs(ctx: click.Context, param: click.Parameter, value: Iterable[str]) -> dict[str, str]:
    """`--env NAME=VALUE`, any number of times."""
    pairs = {}
    for text in value:
        name, equals, content = text.partition("=")
        if not equals or not name:
            raise click.BadParameter(f"{text!r}: write NAME=VALUE")
        pairs[name] = content
    return pairs


# The parameters' names are RunConfig's keys; what has none of its own here is asked with --set.
_CONFIG = (
    click.option("-n", "--num-processes", type=int, help="Ranks; otherwise one per accelerator or core."),
    click.option("--device", metavar="KIND", help="auto, cpu, cuda, xpu, mps or tpu."),
    click.option("--devices", callback=read_devices, metavar="LIST", help="Accelerators: 4,5 or free."),
    click.option("--mixed-precision", metavar="KIND", help="no, fp16, bf16, fp8 or auto."),
    click.option("--strategy", metavar="NAME", help="How the model is spread: ddp, fsdp, …"),
    click.option("--gradient-accumulation-steps", type=int, help="Micro-steps per optimizer step."),
    click.option("--seed", type=int, help="Seed of every generator."),
    click.option("--project-dir", metavar="DIR", help="Where checkpoints and tracker files go."),
    click.option("--resume", metavar="auto|DIR", help="Go on from the newest checkpoint, or from this one."),
    click.option("--max-restarts", type=int, help="Start again this often after a rank failed."),
    click.option("--start-method", metavar="KIND", help="fork (default on Linux) or spawn."),
)


def _complete_key(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """For the shell: RunConfig's keys."""
    return sorted(f"{key}=" for key in RunConfig.names() - {"sources"} if key.startswith(incomplete))


_FILE = (
    click.option("--config", "config_file", metavar="FILE", help="A YAML file, or none; otherwise searched."),
    click.option(
        "--set",
        "assignments",
        multiple=True,
        shell_complete=_complete_key,
        metavar="KEY=VALUE",
        help="Any key of the configuration, over all.",
    ),
)


def file_options(command: F) -> F:
    """`--config` and `--set`, added to a command; `configuration` takes their values."""
    for option in reversed(_FILE):
        command = option(command)
    return command


def configuration(
    config_file: str | None,
    flags: Mapping[str, Any],
    assignments: Iterable[str],
    earlier: RunConfig | None = None,
) -> RunConfig:
    """What the file in force and the command's own options ask together, and over both what `--set` says.

    Args:
        config_file: the file that was named; "none" for none; None to search.
        flags: RunConfig's keys; None is not asked.
        earlier: what a run asked that is to be run again; it stands for the file, unless one is named.

    Raises:
        ConfigError: something is wrong, or asked twice with different values.
    """
    from nbaccel.session import configfile

    assignments = list(assignments)
    decided = {configfile.assignment(text)[0] for text in assignments}
    asked = [
        RunConfig.from_mapping({key: value}, place=f"--{key.replace('_', '-')}")
        for key, value in flags.items()
        if value is not None
    ]
    path = None if config_file == "none" else configfile.find_file(config_file)
    if earlier is not None:
        kept = {f.name: getattr(earlier, f.name) for f in fields(earlier) if f.name not in decided}
        asked.append(RunConfig(**kept))
    if path is not None and (earlier is None or config_file is not None):
        found = configfile.read_file(path)
        kept = {key: value for key, value in found.values.items() if key not in decided}
        asked.append(replace(found, values=kept).config())
    try:
        together = combine(*asked)
    except ConfigError as error:
        raise ConfigError(f"{error} --set key=value goes over all.") from error
    return configfile.override(together, assignments)


def config_options(command: F) -> F:
    """The options that are RunConfig's keys, added to a command."""
    for option in reversed(_CONFIG):
        command = option(command)
    return command
