"""`nbaccel merge`: a checkpoint's model as safetensors."""

from __future__ import annotations

from pathlib import Path

import click

__all__ = ["merge"]


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--model", metavar="NAME", help="Which one, where there are several: model_0.")
@click.option("--max-shard-size", default="10GB", show_default=True, help="Of one file.")
def merge(checkpoint: Path, out: Path, model: str | None, max_shard_size: str) -> None:
    """Write the weights in CHECKPOINT, saved by any number of ranks, to the folder OUT.

    CHECKPOINT is its folder, or a project folder, of which the newest complete one is taken. The files are
    in Hugging Face's layout: from_pretrained and safetensors read them.
    """
    from nbaccel.core.merge import merge as write

    done = write(checkpoint, out, model=model, max_shard_size=max_shard_size)
    click.echo(
        f"{done.checkpoint}: {done.model} at optimizer step {done.step}, saved by {done.world_size} rank(s), "
        f"{done.num_tensors} tensors, {done.num_bytes / 1e6:.1f} MB"
    )
    for path in done.files:
        click.echo(f"  {path}")
