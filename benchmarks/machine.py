"""What the benchmarks say of the machine they ran on, and where their results go."""

import json
import os
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import torch

from lab.devices import processor
from lab.storage import json_text, versions, write_atomically


def target(name: str, units: str) -> Path:
    """results/<name>_<units>.json: each kind of machine keeps its own."""
    return HERE / "results" / f"{name}_{units}.json"


def slug(device: str) -> str:
    """A GPU's name as it stands in a file's."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


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
    model, units = processor()
    about = {
        "cpu": f"{model}, {os.cpu_count()} cores, {units}",
        "threads": torch.get_num_threads(),
        "versions": versions("torch", "transformers", "sae-bench"),
    }
    write_atomically(target(name, units), json_text(about | result))
