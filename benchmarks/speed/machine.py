"""What a benchmark's figures depend on: the machine and the versions."""

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch


def describe() -> dict[str, Any]:
    """Returns the processor, cores, versions and commit."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    cores = torch.get_num_threads()
    text = f"{cores} cores ({model}){', ' + gpu if gpu else ''}, Python {platform.python_version()}, torch {torch.__version__}"
    return {"processor": model, "cores": cores, "gpu": gpu, "python": platform.python_version(),
            "torch": torch.__version__, "commit": commit, "text": text}  # fmt: skip
