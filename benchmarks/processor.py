"""The processor that a record's figures are of; imported by the scripts beside and below."""

import platform
from pathlib import Path


def name(cpuinfo=Path("/proc/cpuinfo")):
    """The first processor's name, or that of its architecture where the system does not tell."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
