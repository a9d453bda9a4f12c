"""What the figures were measured with: the machine."""

import os
import platform
from pathlib import Path

import torch


def machine() -> dict[str, str | int | None]:
    """The processor's name, how many cores it offers and torch uses, and the versions that the times depend on."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    """`platform.processor()`; on Linux, where that names the architecture at most, the model name the kernel gives."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(models), "") or platform.processor() or platform.machine()
