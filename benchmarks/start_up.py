"""How long a run takes from its command to the end of its first training step, caches warm.

    python benchmarks/start_up.py      # half a minute

Every start is the real command in a process and a folder of its own, its unfinished work in it too,
stopped after its first step; the caches must hold what the laptop scale needs (any finished run
leaves that).  Writes results/start_up_<bfloat16 units>.json.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import machine

REPETITIONS = 5

# The script's own main(), which leaves after the first step; what it was busy with stands before.
UNTIL_THE_FIRST_STEP = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).resolve().parent.parent)!r})
import experiment, lab.work
from pathlib import Path
lab.work.work_root = lambda: Path.cwd() / "training"
lab.work.work_root().mkdir()
step = experiment.Trainer.step
def first(self, x):
    step(self, x)
    os._exit(0)
experiment.Trainer.step = first
sys.exit(experiment.main(sys.argv[1:]))
"""


def one_start() -> float:
    """Seconds to the end of the first step."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        command = [sys.executable, "-c", UNTIL_THE_FIRST_STEP, "--out_dir=run_7"]
        laptop = os.environ | {"EXPERIMENT_SCALE": "laptop"}
        done = subprocess.run(command, cwd=folder, env=laptop, capture_output=True, text=True)
        seconds = time.perf_counter() - start
    if done.returncode or "(once)" in done.stdout:
        raise SystemExit(f"no warm start:\n{done.stdout}{done.stderr}")
    return seconds


def main() -> None:
    one_start()  # the machine's own caches
    found = []
    for _ in range(REPETITIONS):
        found.append(one_start())
        print(f"{found[-1]:.1f} s", flush=True)
    print(f"median {statistics.median(found):.1f} s ({min(found):.1f} to {max(found):.1f})")
    machine.write("start_up", {"seconds": found})


if __name__ == "__main__":
    main()
