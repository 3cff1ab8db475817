"""How a model can be trained on so many ranks: memory and step time of each way, and the fastest that fits.

size          what the model is made of
activations   what a step computes and keeps, traced without numbers
memory        bytes of a rank, by how the model is spread
machine       what a rank has to work with
step_time     seconds of a step
choose        all candidates, why not, and the fastest that fits
"""

from nbaccel.core.plan.activations import Activations, trace_step
from nbaccel.core.plan.choose import Candidate, Plan, choose
from nbaccel.core.plan.machine import Machine, machine_for
from nbaccel.core.plan.memory import Memory, Setting, Spread, optimizer_kind, spreads, training_memory
from nbaccel.core.plan.size import Size, measure, size_of

__all__ = [
    "Activations",
    "Candidate",
    "Machine",
    "Memory",
    "Plan",
    "Setting",
    "Size",
    "Spread",
    "choose",
    "machine_for",
    "measure",
    "optimizer_kind",
    "size_of",
    "spreads",
    "trace_step",
    "training_memory",
]
