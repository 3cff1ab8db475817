"""The command's entry: which commands there are, and what an error becomes on a terminal."""

from __future__ import annotations

import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn, final

import click

from nbaccel import __version__
from nbaccel.checks import did_you_mean
from nbaccel.errors import LaunchError, NbaccelError

__all__ = ["COMMANDS", "main"]

# Name: (module, one line of help). The line stands here so that the list needs no import.
COMMANDS: dict[str, tuple[str, str]] = {
    "launch": ("nbaccel.cli.launch", "Run a script, a module or a notebook on N ranks."),
    "config": ("nbaccel.cli.config", "Write, show, check and change a configuration file."),
    "runs": ("nbaccel.cli.runs", "List the latest runs."),
    "logs": ("nbaccel.cli.logs", "Print what the ranks of a run have printed."),
    "estimate": ("nbaccel.cli.estimate", "Memory a model takes to train and to serve."),
    "merge": ("nbaccel.cli.merge", "Write a checkpoint's model as safetensors."),
    "test": ("nbaccel.cli.selftest", "Train on 2 ranks here and check the numbers."),
    "env": ("nbaccel.cli.env", "Versions, devices and front ends, for a bug report."),
    "doctor": ("nbaccel.cli.doctor", "What on this machine breaks launches, and what to do."),
    "completion": ("nbaccel.cli.completion", "Print the shell completion for bash, zsh or fish."),
}
_EPILOG = (
    "Exit codes: the script's own; 1 when a rank raised; 2 when what was asked cannot be done; 124 after "
    "--max-time; 125 when ranks could not be brought up; 128+n when signal n ended a rank; 130 after "
    "Ctrl-C; 143 after SIGTERM."
)


@final
class _Commands(click.Group):
    """Imports a command when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(COMMANDS[cmd_name][0])
        command: click.Command = getattr(module, cmd_name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            hint = did_you_mean(args[0], COMMANDS)
            if args[0].endswith((".py", ".ipynb")):
                hint = f" To run a script: nbaccel launch {args[0]}"
            ctx.fail(f"there is no command {args[0]!r}.{hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


@click.group(
    cls=_Commands,
    epilog=_EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="nbaccel")
def nbaccel() -> None:
    """Distributed PyTorch from notebooks and scripts."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command and leave with its exit code.

    Args:
        arguments: instead of the process's.
    """
    _escape_characters()
    try:
        code = nbaccel.main(args=arguments, prog_name="nbaccel", standalone_mode=False)
    except click.exceptions.Exit as leaving:
        code = leaving.exit_code
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("Stopped.", err=True)
        code = 130
    except NbaccelError as error:
        click.echo(f"nbaccel: {error}", err=True)
        code = 125 if isinstance(error, LaunchError) else 2
    except BrokenPipeError:  # `nbaccel logs RUN | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 1
    sys.exit(code if isinstance(code, int) else 0)


def _escape_characters() -> None:
    """A character that an output's encoding lacks is written as an escape, instead of ending what prints it."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")
