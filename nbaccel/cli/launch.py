"""`nbaccel launch`: a script, a module or a notebook on N ranks, as a cell of a notebook would run it."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from nbaccel.cli.foreground import run_here, run_to_end, say
from nbaccel.cli.options import config_options, configuration, environment_pairs, file_options
from nbaccel.cli.runs import complete_run, find_run
from nbaccel.cli.several import make_meeting, run_among_hosts
from nbaccel.cli.target import find_target, read_run
from nbaccel.errors import ConfigError
from nbaccel.session.configfile import working_folder
from nbaccel.session.request import make_request

__all__ = ["launch"]


@click.command(context_settings={"allow_interspersed_args": False})
@config_options
@file_options
@click.option("-m", "module", is_flag=True, help="SCRIPT is a module, as in python -m.")
@click.option(
    "--output", default="auto", metavar="KIND", help="auto (folds equal lines), all, rank0 or none."
)
@click.option("--max-time", metavar="TIME", help="End the run after this time: 90s, 2h30m.")
@click.option("--start-timeout", default="60", metavar="TIME", help="Until all ranks must be ready.")
@click.option("--grace", default=1.0, help="Seconds the others get after a rank failed.  [default: 1]")
@click.option(
    "--stop-grace",
    default="60",
    metavar="TIME",
    help="After SIGTERM: time to stop at a step and save, before the ranks are interrupted.",
)
@click.option("--env", multiple=True, callback=environment_pairs, metavar="NAME=VALUE", help="For the ranks.")
@click.option("--nnodes", default="1", metavar="N|MIN:MAX", help="Hosts; run the command on each.")
@click.option("--rdzv-endpoint", metavar="HOST:PORT", help="Where the hosts meet; HOST is one of them.")
@click.option("--rdzv-id", metavar="NAME", help="Keeps two runs at one endpoint apart.")
@click.option(
    "--rdzv-conf",
    multiple=True,
    callback=environment_pairs,
    metavar="KEY=TIME",
    help="join_timeout, last_call_timeout or silence.",
)
@click.option("--interface", metavar="NAME", help="Network of the ranks of several hosts.")
@click.option("--name", help="What the run is called; the script's name otherwise.")
@click.option("--folder", metavar="DIR", help="Where the run folder goes.")
@click.option("--no-folder", is_flag=True, help="Keep no run folder.")
@click.option(
    "--from",
    "earlier",
    shell_complete=complete_run,
    metavar="RUN",
    help="What this run was: its script, arguments, configuration and options.",
)
@click.argument("script", required=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def launch(
    module: bool,
    output: str,
    max_time: str | None,
    start_timeout: str,
    grace: float,
    stop_grace: str,
    env: dict[str, str],
    nnodes: str,
    rdzv_endpoint: str | None,
    rdzv_id: str | None,
    rdzv_conf: dict[str, str],
    interface: str | None,
    name: str | None,
    folder: str | None,
    no_folder: bool,
    earlier: str | None,
    script: str | None,
    arguments: tuple[str, ...],
    config_file: str | None,
    assignments: tuple[str, ...],
    **keys: Any,
) -> int:
    """Run SCRIPT on N ranks: a Python file, a notebook, or a module with -m.

    Options of nbaccel come before SCRIPT; whatever follows it is the script's own.

    \b
    nbaccel launch -n 4 train.py --lr 3e-4
    nbaccel launch --device cpu -m package.train
    nbaccel launch train.ipynb
    nbaccel launch --from last --set seed=2
    """
    _leave_own_folder()
    if no_folder and folder and earlier is None:
        raise ConfigError(
            "--folder says where the run folder goes, --no-folder that there is none: give one of them"
        )
    before = None if earlier is None else read_run(find_run(earlier, Path(folder) if folder else None))
    if script is None and before is None:
        raise click.MissingParameter(param_hint="'SCRIPT'", param_type="argument")
    config = configuration(config_file, keys, assignments, before.config if before else None)
    options: dict[str, Any] = {
        "output": output,
        "max_time": max_time,
        "start_timeout": start_timeout,
        "grace": grace,
        "stop_grace": stop_grace,
        "name": name,
    }
    if before is not None:
        options.update(_not_given(before.options))
        if missing := sorted(set(before.variables) - set(env)):
            say(
                f"of that run's --env {', '.join(missing)} the values are not kept: give them again if needed"
            )
    if before is not None and script is None:
        script, arguments, module = before.target, before.arguments, before.module
        _go_to(before.cwd or ".")
        for note in before.notes:
            say(note)
    meeting = make_meeting(nnodes, rdzv_endpoint, rdzv_id, interface, rdzv_conf)
    target = find_target(str(script), arguments, module=module)
    target = replace(target, options=dict(options), variables=tuple(sorted(env)))
    stop_grace, name = options.pop("stop_grace"), options.pop("name")
    request = make_request(
        target.function,
        (target.path, target.arguments),
        None,
        "",
        meeting is None,  # among hosts the ranks here are not the whole
        config=config,
        returns="none",
        env=env,
        name=name or target.name,
        folder=False if no_folder else folder,
        **options,
    )
    if request.plan.in_place:
        return run_here(request, target)
    if meeting is not None:
        return run_among_hosts(request, target, meeting, stop_grace=stop_grace)
    return run_to_end(request, target, stop_grace=stop_grace)


def _not_given(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of an earlier run's options that this command line does not set."""
    context = click.get_current_context()
    return {
        name: value
        for name, value in options.items()
        if context.get_parameter_source(name) is ParameterSource.DEFAULT
    }


def _go_to(folder: str) -> None:
    """Work in the folder that the earlier run was started in."""
    try:
        os.chdir(folder)
    except OSError as error:
        raise ConfigError(
            f"it was started in {folder}, which cannot be gone to ({error.strerror}): launch the script by its path"
        ) from error


def _leave_own_folder() -> None:
    """Take off the import path what Python put there for this command; the script gets its own folder."""
    own = (str(working_folder()), os.path.dirname(os.path.abspath(sys.argv[0])))
    if sys.path and os.path.abspath(sys.path[0]) in own and not getattr(sys.flags, "safe_path", False):
        del sys.path[0]
