"""`nbaccel completion`: the script that makes a shell complete the command's words."""

from __future__ import annotations

import os

import click
from click.shell_completion import get_completion_class

from nbaccel.errors import ConfigError

__all__ = ["completion"]


@click.command()
@click.argument("shell", required=False, type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, /, shell: str | None) -> None:
    """Print the completion for SHELL, the present one by default.

    \b
    bash, in ~/.bashrc:   eval "$(nbaccel completion bash)"
    zsh, in ~/.zshrc:     eval "$(nbaccel completion zsh)"
    fish:                 nbaccel completion fish > ~/.config/fish/completions/nbaccel.fish
    """
    name = shell or os.path.basename(os.environ.get("SHELL", ""))
    kind = get_completion_class(name)
    if kind is None:
        raise ConfigError(f"there is no completion for the shell {name!r}: name bash, zsh or fish")
    root = ctx.find_root().command
    click.echo(kind(root, {}, "nbaccel", "_NBACCEL_COMPLETE").source())
