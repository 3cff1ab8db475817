"""What several commands take: options that are RunConfig's keys, and the texts users type for their values."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import click

__all__ = ["config_options", "environment_pairs", "read_devices"]

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
    click.option("--device", metavar="KIND", help="auto, cpu, cuda, xpu or mps."),
    click.option("--devices", callback=read_devices, metavar="LIST", help="Accelerators: 4,5 or free."),
    click.option("--mixed-precision", metavar="KIND", help="no, fp16, bf16 or auto."),
    click.option("--strategy", metavar="NAME", help="How the model is spread: ddp or single."),
    click.option("--gradient-accumulation-steps", type=int, help="Micro-steps per optimizer step."),
    click.option("--seed", type=int, help="Seed of every generator."),
    click.option("--project-dir", metavar="DIR", help="Where checkpoints and tracker files go."),
    click.option("--resume", metavar="auto|DIR", help="Go on from the newest checkpoint, or from this one."),
    click.option("--start-method", metavar="KIND", help="fork (default on Linux) or spawn."),
)


def config_options(command: F) -> F:
    """The options that are RunConfig's keys, added to a command."""
    for option in reversed(_CONFIG):
        command = option(command)
    return command
