"""`nbaccel estimate`: the memory a model takes."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

__all__ = ["estimate"]


@click.command()
@click.argument("model")
@click.option("-n", "--num-processes", type=click.IntRange(1), default=1, show_default=True, help="Ranks.")
@click.option(
    "--optimizer", type=click.Choice(["adamw", "momentum", "sgd"]), default="adamw", show_default=True
)
@click.option("--mixed-precision", type=click.Choice(["no", "bf16", "fp16"]), default="no", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def estimate(model: str, num_processes: int, optimizer: str, mixed_precision: str, as_json: bool) -> None:
    """Print what MODEL takes to train, by strategy and rank, and to serve.

    MODEL is a safetensors file, a folder with such files or with a config.json of Hugging Face's, or
    package.module:name of a torch module, its class, or a function that makes one. No weights are loaded.
    """
    from nbaccel.core.plan import Setting, measure, spreads, training_memory
    from nbaccel.core.plan.size import serving_bytes

    size = measure(model)
    setting = Setting(num_processes=num_processes, optimizer=optimizer, mixed_precision=mixed_precision)
    rows = {one.name: training_memory(size, one, setting) for one in spreads(setting)}
    served = serving_bytes(size)
    if as_json:
        training = [{"strategy": name, **asdict(row), "total": row.total} for name, row in rows.items()]
        click.echo(json.dumps({"model": asdict(size), "training": training, "serving": served}, indent=2))
        return
    click.echo(
        f"{size.name}: {size.parameters:,} parameters ({size.trainable:,} trainable), by its {size.source}"
    )
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"to train with {optimizer}, on each of {num_processes} rank(s)", title_justify="left", box=None
    )
    for column in ("strategy", "weights", "gradients", "optimizer", "buffers", "together"):
        table.add_column(column, justify="left" if column == "strategy" else "right")
    for name, row in rows.items():
        sizes = (row.weights, row.gradients, row.optimizer, row.working, row.total)
        table.add_row(name, *map(_text, sizes))
    console = Console(soft_wrap=True, highlight=False)
    console.print(table)
    console.print("to serve: " + ", ".join(f"{name} {_text(count)}" for name, count in served.items()))
    console.print("activations and caches come on top; they depend on the batch")


def _text(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"
