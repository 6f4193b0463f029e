"""What the benchmarks say of the machine they ran on, and where their results go."""

import json
import os
import platform
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import torch

from lab.storage import json_text, versions, write_atomically

BFLOAT16_UNITS = ("amx_bf16", "avx512_bf16")  # the best first


def cpu() -> tuple[str, str]:
    """(model, the best of BFLOAT16_UNITS it has, or "no_bf16"; "unknown" off Linux)."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine(), "unknown"
    about = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    about = {name.strip(): value.strip() for name, value in about.items()}
    flags = about.get("flags", "").split()
    units = next((unit for unit in BFLOAT16_UNITS if unit in flags), "no_bf16")
    return about.get("model name", platform.machine()), units


def target(name: str, units: str) -> Path:
    """results/<name>_<units>.json: each kind of machine keeps its own."""
    return HERE / "results" / f"{name}_{units}.json"


def measured(name: str, units: str) -> dict:
    """What a benchmark wrote on one kind of machine; exits where it has not been run there."""
    path = target(name, units)
    if not path.exists():
        raise SystemExit(
            f"{path.name} is not there: benchmarks/{name}.py writes it on such a machine"
        )
    return json.loads(path.read_text(encoding="utf-8"))


def write(name: str, result: dict) -> None:
    """`result` with the machine and the versions it was measured with."""
    model, units = cpu()
    about = {
        "cpu": f"{model}, {os.cpu_count()} cores, {units}",
        "threads": torch.get_num_threads(),
        "versions": versions("torch", "transformers", "sae-bench"),
    }
    write_atomically(target(name, units), json_text(about | result))
