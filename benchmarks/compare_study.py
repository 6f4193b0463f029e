"""What a study costs: this program against one training and one evaluation after the other.

    python benchmarks/compare_study.py     # at once: arithmetic on what the others measured

This program's side is measured whole: the seconds that the committed study's runs noted down
(results/laptop/*/config.json: training of all seeds, fidelity, probing with its read-out checks,
absorption).  The peers' side is R runs x S seeds of SAELens trainings and stock SAE-Bench
evaluations, EXTRAPOLATED: tokens times the seconds a token that compare_training.py measured, and
the seconds per SAE of compare_stock.py, its sparse probing scaled from the classes it was
measured on to all of them.  Left out on the peers' side, in their favour: loading models, the first
evaluation's language-model work, and the read-out checks.  Writes results/compare_study.json.
"""

import json
import statistics
from pathlib import Path

import machine

from lab.packaged_text import TASKS
from lab.scales import SCALES
from lab.storage import json_text, write_atomically

HERE = Path(__file__).resolve().parent


UNITS = "avx512_bf16"  # of the machine that results/laptop was made on


def main() -> None:
    scale = SCALES["laptop"]
    training, evaluation = (
        machine.measured(name, UNITS) for name in ("compare_training", "compare_stock")
    )
    classes = {name: len(task) for name, task in TASKS.items()}
    whole = sum(classes[name] for name in scale.tasks)
    share = sum(classes[name] for name in evaluation["tasks"]) / whole
    per_sae = {
        "training": scale.total_steps * scale.batch_tokens
        / training["median_tokens_per_second"]["sae-lens"],
        "sparse probing": evaluation["sparse_probing"]["seconds_stock"] / share,
        "absorption": evaluation["absorption"]["seconds_stock"],
    }  # fmt: skip
    one = sum(per_sae.values())
    ours = {
        path.parent.name: json.loads(path.read_text(encoding="utf-8"))["seconds"]["total"]
        for path in sorted((HERE.parent / "results" / "laptop").glob("run_*/config.json"))
    }
    first = max(ours, key=ours.get)  # the one that made the caches
    later = statistics.median(seconds for name, seconds in ours.items() if name != first)
    saes = scale.n_seeds * len(ours)
    result = {
        "peers_seconds_per_sae_extrapolated": per_sae,
        "peers_seconds_whole_study_extrapolated": saes * one,
        "here_seconds_whole_study": sum(ours.values()),
        "times_faster_whole_study": saes * one / sum(ours.values()),
        "here_seconds_first_run": ours[first],
        "here_seconds_later_run": later,
        "times_faster_later_run": scale.n_seeds * one / later,
        "runs": len(ours),
        "seeds": scale.n_seeds,
    }
    parts = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in per_sae.items())
    print(f"peers, one SAE (extrapolated): {one:.0f} s ({parts})")
    print(
        f"study of {len(ours)} runs x {scale.n_seeds} seeds: peers {saes * one / 3600:.1f} h "
        f"(extrapolated), here {sum(ours.values()) / 3600:.2f} h: "
        f"{result['times_faster_whole_study']:.1f} times faster"
    )
    print(
        f"a run after the first: peers {scale.n_seeds * one:.0f} s (extrapolated), here "
        f"{later:.0f} s: {result['times_faster_later_run']:.1f} times faster"
    )
    target = HERE / "results" / "compare_study.json"
    write_atomically(target, json_text(result))


if __name__ == "__main__":
    main()
