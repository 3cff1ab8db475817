"""`nbaccel config`: a configuration file from questions, defaults or flags; shown, checked, changed, imported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from nbaccel.cli.options import config_options, configuration, file_options
from nbaccel.config import RunConfig, combine
from nbaccel.errors import ConfigError
from nbaccel.layout import require_layout
from nbaccel.session import configfile

__all__ = ["config"]


@click.group(invoke_without_command=True)
@config_options
@click.option(
    "--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Any key of the configuration."
)
@click.option("--default", "defaults", is_flag=True, help="Ask nothing: what is found here, and the flags.")
@click.option("--user", is_flag=True, help="Write the user's own file instead of the project's.")
@click.option("--file", "target", type=click.Path(path_type=Path), help="Write this file.")
@click.option("--force", is_flag=True, help="Replace a file that is there.")
@click.pass_context
def config(
    ctx: click.Context,
    /,
    assignments: tuple[str, ...],
    defaults: bool,
    user: bool,
    target: Path | None,
    force: bool,
    **keys: Any,
) -> None:
    """Write a configuration file: nbaccel.yaml in this folder, unless told otherwise.

    Without --default it asks, with what this machine has as the answers to choose from; what a flag
    or --set says is not asked.
    """
    if ctx.invoked_subcommand is not None:
        return
    configfile.working_folder()  # refused before anything is asked
    path = target or (configfile.user_file() if user else Path(configfile.PROJECT_FILE))
    if path.exists() and not force:
        raise ConfigError(
            f"{path} is there already: add --force to replace it, or change it with config update"
        )
    given = configuration("none", keys, assignments)
    if not defaults:
        from nbaccel.cli.questions import ask

        given = combine(given, ask(given))
    else:
        from nbaccel.cli.questions import suggestions

        found = {key: value for key, value in suggestions().items() if getattr(given, key) is None}
        given = combine(given, RunConfig.from_mapping(found, place="what this machine has"))
    configfile.write(path, configfile.dump(_asked(given)))
    click.echo(f"{path} written:")
    click.echo(configfile.dump(_asked(given)), nl=False)


@config.command()
@file_options
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def show(config_file: str | None, assignments: tuple[str, ...], as_json: bool) -> None:
    """Show the configuration in force here, and where each value was asked."""
    path = configfile.find_file(config_file)
    found = configuration(config_file, {}, assignments)
    if as_json:
        click.echo(json.dumps({"file": str(path) if path else None, **json.loads(found.to_json())}, indent=2))
        return
    click.echo(f"file: {path}" if path else "no configuration file: neither the project nor the user has one")
    values = _asked(found)
    width = max((len(key) for key in values), default=0)
    for key, value in values.items():
        text = configfile.dump({key: value}).partition(":")[2].strip().replace("\n", " ")
        click.echo(f"  {key:<{width}}  {text:<20}  {found.sources.get(key, '')}")


@config.command()
@click.argument("file", required=False)
@click.option("--nnodes", type=click.IntRange(1), default=1, show_default=True, help="Hosts like this one.")
def validate(file: str | None, nnodes: int) -> None:
    """Check a file: its keys, their values, and whether this machine can do what it asks."""
    path = configfile.find_file(file)
    if path is None:
        raise ConfigError("there is no configuration file to check")
    found = configfile.read_file(path).config()
    from nbaccel.session.environment import probe
    from nbaccel.session.resolve import resolve

    plan = resolve(found, probe())
    if plan.device != "tpu":
        require_layout(found, plan.num_processes * nnodes, plan.num_processes)
    each = f"{plan.num_processes} rank(s) on {plan.device}, {plan.threads} thread(s) each"
    click.echo(f"{path} is good: {each}{f', on each of {nnodes} hosts' if nnodes > 1 else ''}")
    for note in plan.notes:
        click.echo(f"  {note}")


@config.command()
@click.argument("assignments", nargs=-1, required=True, metavar="KEY=VALUE...")
@click.option("--config", "config_file", metavar="FILE", help="This file instead of the one in force.")
def update(assignments: tuple[str, ...], config_file: str | None) -> None:
    """Change keys of a file, its comments kept. KEY=null takes a key out."""
    path = configfile.find_file(config_file)
    if path is None:
        raise ConfigError("there is no configuration file to change; `nbaccel config` writes one")
    if path.suffix == ".toml":
        raise ConfigError(f"{path} is not written by this command: change its table [tool.nbaccel] by hand")
    before = configfile.read_file(path)
    pairs = dict(configfile.assignment(text) for text in assignments)
    new = configfile.override(RunConfig.from_mapping(_plain(before, pairs)), assignments, place="the command")
    changes = {key.partition(".")[0]: None for key in pairs}
    changes.update({key: getattr(new, key) for key in changes})
    text = configfile.change(path, changes)
    configfile.write(path, text)
    configfile.read_file(path).config()
    click.echo(f"{path} changed: {', '.join(changes)}")


def _plain(file: configfile.ConfigFile, changed: dict[str, Any]) -> dict[str, Any]:
    """The file's values without those that are about to change, which may be what is wrong with it."""
    whole = {key for key in changed if "." not in key}
    return {key: value for key, value in file.values.items() if key not in whole}


@config.command("import")
@click.argument("file", required=False)
@click.option("--file", "target", type=click.Path(path_type=Path), default=configfile.PROJECT_FILE)
@click.option("--force", is_flag=True, help="Replace a file that is there.")
def import_(file: str | None, target: Path, force: bool) -> None:
    """Write the project's file from one of Hugging Face Accelerate's (its default one, if none is named)."""
    from nbaccel.cli.foreign import from_accelerate, their_default

    source = Path(file) if file else their_default()
    if target.exists() and not force:
        raise ConfigError(f"{target} is there already: add --force to replace it")
    found = from_accelerate(configfile.read_file(configfile.find_file(source) or source))
    configfile.write(target, configfile.dump(_asked(found.config)))
    click.echo(f"{target} written from {source}:")
    click.echo(configfile.dump(_asked(found.config)), nl=False)
    for note in found.notes:
        click.echo(note)


def _asked(config: RunConfig) -> dict[str, Any]:
    """The keys that were asked, as plain values, in RunConfig's order."""
    values = {name: getattr(config, name) for name in RunConfig.__dataclass_fields__ if name != "sources"}
    return {name: value for name, value in values.items() if value is not None}
