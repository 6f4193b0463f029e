"""Copy finished runs to where they are committed, with what the comparison of runs reads.

    python results/keep.py FROM TO [EVERY]     # the folders run_* of FROM, into TO

Left out are weights, the snapshot of the script, features.html with its data, and SAE-Bench's
printed log.  With EVERY the training log keeps each EVERY-th step and the last, in six digits: hundreds of SAEs write
20 MB.  config.json then says so, and has the SHA-256 of the log as it is kept.
"""

import hashlib
import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lab import metrics
from lab.storage import json_text, write_atomically

LEFT_OUT = ("*.safetensors", "experiment.py", "sae_bench.log", "features.*", ".lock")


def thinned(lines: list[str], every: int) -> str:
    records = [json.loads(line) for line in lines]
    last = records[-1]["step"]
    kept = [record for record in records if record["step"] % every == 0 or record["step"] == last]
    return "".join(json.dumps(rounded(record)) + "\n" for record in kept)


def rounded(value: object) -> object:
    if isinstance(value, dict):
        return {name: rounded(of_it) for name, of_it in value.items()}
    if isinstance(value, list):
        return [rounded(of_it) for of_it in value]
    return metrics.rounded(value, 6) if isinstance(value, float) else value


def keep(run: Path, to: Path, every: int) -> None:
    folder = to / run.name
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns(*LEFT_OUT))
    if every == 1:
        return
    log, about = folder / "training_log.jsonl", folder / "config.json"
    log.write_text(thinned(log.read_text(encoding="utf-8").splitlines(), every), encoding="utf-8")
    config = json.loads(about.read_text(encoding="utf-8")) | {"log_keeps_every": every}
    config["sha256"]["training_log.jsonl"] = hashlib.sha256(log.read_bytes()).hexdigest()
    write_atomically(about, json_text(config))


def main() -> None:
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    source, to = Path(sys.argv[1]), Path(sys.argv[2])
    for run in sorted(source.glob("run_*")):
        if (run / "final_info.json").is_file() and not (to / run.name).exists():
            keep(run, to, int(sys.argv[3]) if len(sys.argv) == 4 else 1)
            print(f"kept {to / run.name}")


if __name__ == "__main__":
    main()
