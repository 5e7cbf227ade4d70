"""What figures hold for: the machine and the revision of the probe, in words."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import torch

import probe


def machine(device: str) -> str:
    """Return the name of the processor or GPU that ``"cpu"`` or ``"cuda"`` is, and how many cores are round it."""
    cores = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"{torch.cuda.get_device_name() if device == 'cuda' else _processor()}, {cores}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def revision() -> str:
    """Return the probe's version and the commit, marked where files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "no checkout"
    return f"{probe.__version__} ({commit})"
