"""The questions of `nbaccel config`, fitted to what this machine has."""

from __future__ import annotations

from typing import Any, get_args

import click

from nbaccel.config import RunConfig, TrackerName
from nbaccel.errors import ConfigError, NbaccelError
from nbaccel.session.environment import Environment, probe
from nbaccel.session.resolve import Plan, resolve

__all__ = ["ask", "suggestions"]


def suggestions() -> dict[str, Any]:
    """What a launch without any configuration would do here, as keys."""
    environment = probe()
    plan = resolve(RunConfig(), environment)
    return {
        "num_processes": plan.num_processes,
        "device": plan.device,
        "mixed_precision": _precision(plan, environment),
    }


def ask(given: RunConfig) -> RunConfig:
    """The answers, as a configuration; what `given` holds already is not asked."""
    environment = probe()
    answers: dict[str, Any] = {}
    try:
        plan = resolve(RunConfig(), environment)
        click.echo(f"This machine: {_machine(plan, environment)}. Enter takes what stands in [brackets].")
        _ask_where(given, answers, plan, environment)
        _ask_how(given, answers)
        _ask_checkpoints(given, answers)
    except (click.Abort, EOFError):
        raise ConfigError(
            "the questions were not answered; nothing was written. Without a terminal use --default and flags."
        ) from None
    return RunConfig.from_mapping(answers, place="your answers")


def _ask_where(given: RunConfig, answers: dict[str, Any], plan: Plan, environment: Environment) -> None:
    if plan.device != "cpu" and given.device is None:
        answers["device"] = _choice("device", "Compute on", [plan.device, "cpu"], plan.device)
    device = given.device or answers.get("device") or plan.device
    if given.device is None:
        answers["device"] = device
    if given.num_processes is None and given.devices is None:
        there = plan if device == plan.device else resolve(RunConfig(device=device), environment)
        unit = "one per accelerator" if device != "cpu" else f"{environment.resources.cores} cores"
        answers["num_processes"] = _valid("num_processes", f"Ranks ({unit})", int, there.num_processes)
    if given.mixed_precision is None:
        best = _precision(plan, environment) if device == plan.device else "no"
        answers["mixed_precision"] = _choice(
            "mixed_precision", "Precision", ["no", "bf16", "fp16", "auto"], best
        )


def _ask_how(given: RunConfig, answers: dict[str, Any]) -> None:
    if given.gradient_accumulation_steps is None:
        steps = _valid("gradient_accumulation_steps", "Micro-steps per optimizer step", int, 1)
        if steps != 1:
            answers["gradient_accumulation_steps"] = steps
    if given.gradient_clipping is None:
        norm = click.prompt("Clip gradients to this norm (0: no)", type=float, default=0.0)
        if norm:
            answers["gradient_clipping"] = norm
    if given.compile is None and click.confirm("Compile models (torch.compile)?", default=False):
        answers["compile"] = True
    if given.seed is None:
        seed = click.prompt("Seed (empty: a new one each time)", default="", show_default=False)
        if seed:
            answers["seed"] = _number(seed)
    if given.log_with is None:
        name = click.prompt("Tracker", type=click.Choice(["none", *get_args(TrackerName)]), default="none")
        if name != "none":
            answers["log_with"] = [name]


def _ask_checkpoints(given: RunConfig, answers: dict[str, Any]) -> None:
    if given.project_dir is None:
        folder = click.prompt("Folder for checkpoints (empty: none)", default="", show_default=False)
        if not folder:
            return
        answers["project_dir"] = folder
    if given.save_every is None:
        every = _valid("save_every", "Save every (steps, or a time like 15min)", _number, "15min")
        answers["save_every"] = every
    if given.keep is None:
        answers["keep"] = _valid("keep", "Checkpoints to keep", int, 3)
    if given.resume is None and click.confirm(
        "Go on from the newest checkpoint at the next start?", default=True
    ):
        answers["resume"] = "auto"


def _valid(key: str, question: str, kind: Any, default: Any) -> Any:
    """An answer that RunConfig takes for this key; asks again otherwise."""
    while True:
        value = click.prompt(question, type=kind, default=default)
        try:
            RunConfig.from_mapping({key: value})
        except NbaccelError as error:
            click.echo(f"  {error}")
        else:
            return value


def _choice(key: str, question: str, choices: list[str], default: str) -> str:
    answer: str = click.prompt(question, type=click.Choice(choices), default=default)
    return answer


def _number(text: str) -> Any:
    return int(text) if str(text).strip().isdigit() else text


def _machine(plan: Plan, environment: Environment) -> str:
    cores = environment.resources.cores
    names = ", ".join(dict.fromkeys(plan.device_names))
    devices = f"{plan.num_processes} {plan.device} device(s) ({names}), " if plan.device != "cpu" else ""
    return f"{devices}{cores} core{'s' * (cores != 1)}"


def _precision(plan: Plan, environment: Environment) -> str:
    """bf16 where the hardware has it, fp16 on older GPUs, none on the CPU."""
    if plan.device != "cuda":
        return "no"
    gpus = environment.accelerators.gpus
    able = all(gpu.capability is None or gpu.capability >= (8, 0) for gpu in gpus)
    return "bf16" if able else "fp16"
