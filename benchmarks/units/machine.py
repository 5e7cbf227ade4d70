"""What the figures of a measurement hold for: device, cores, load, versions."""

from __future__ import annotations

import os
import platform
from datetime import date
from typing import Any

import torch
import transformers

from benchmarks.machine import machine as described
from benchmarks.machine import revision


def machine(device: torch.device) -> dict[str, Any]:
    """Return what the figures hold for."""
    return {
        "date": date.today().isoformat(),
        "device": described(device.type),
        "cores": os.cpu_count(),
        "load": [round(value, 2) for value in os.getloadavg()],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "probe": revision(),
    }


def short(device: torch.device) -> str:
    """Return a name of the device that fits into a file name."""
    if device.type != "cuda":
        return "cpu"
    return "".join(letter if letter.isalnum() else "-" for letter in torch.cuda.get_device_name(device).lower())
