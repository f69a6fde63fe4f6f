"""The parts of `gpu.py`, in the order in which they are worth their time."""

from . import kernels, memory, nf4, precisions, prefix, speed, unit_tests
from .part import Part

PARTS: dict[str, Part] = {
    "tests": unit_tests.PART,
    "prefix": prefix.PART,
    "kernels": kernels.PART,
    "nf4": nf4.PART,
    "memory": memory.PART,
    "speed": speed.SPEED,
    "precisions": precisions.PART,
    "compiled": speed.COMPILED,
}
