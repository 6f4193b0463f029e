"""Made-up runs with known numbers, and folders of them drawn once by the real plot.py."""

import html
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import plot

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "plot.py"
LAPTOP, PYTHIA, GEMMA = "laptop layer 8", "pythia-70m layer 3", "gemma-2-2b layer 5"
KS = (1, 2, 5, 10, 20, 50)
UNKNOWN = "run_my_$idea$"
HOSTILE = "<script>document.title='broken'</script> & co"


def entry(**per_seed) -> dict:
    """An entry of final_info.json from one value per seed of each metric.

    As a run writes it: "means" are rounded to four digits, the seeds are not.
    """
    values = {name: list(seeds) for name, seeds in per_seed.items()}
    n = {name: len(seeds) for name, seeds in values.items()}
    missing = {name: None in seeds for name, seeds in values.items()}
    return {
        "means": {m: None if missing[m] else float(f"{np.mean(v):.4g}") for m, v in values.items()},
        "stderrs": {
            m: None if missing[m] or n[m] < 2 else float(np.std(v, ddof=1) / math.sqrt(n[m]))
            for m, v in values.items()
        },
        "final_info_dict": values,
    }


def usual_entry(level: float = 0.0, seeds: int = 3, tasks=("code", "news")) -> dict:
    """Everything experiment.py writes, shifted by `level`; seed s lies 0.01 s higher."""

    def around(centre: float) -> list[float]:
        return [centre + level + 0.01 * s for s in range(seeds)]

    metrics = {f"probing_top_{k}": around(0.6 + 0.02 * i) for i, k in enumerate(KS)}
    metrics |= {"probing_all_latents": around(0.8), "probing_top_1_sd_over_tasks": around(0.1)}
    metrics |= {f"lm_top_{k}": [0.55 + 0.04 * i] * seeds for i, k in enumerate(KS)}
    names = "absorption_full absorption_fraction fvu dead ce_recovered grad_norm_cv"
    names += " loss_roughness mse_roughness"
    metrics |= {name: around(0.2) for name in names.split()}
    metrics |= {"l0": around(36), "loss_spikes": [0.0] * seeds, "decoder_pw_mcc": [0.4] * seeds}
    metrics |= {f"online_absorption_{kind}": around(0.1) for kind in ("full", "fraction")}
    metrics |= {"l0_target": [36.0] * seeds, "training_steps": [40] * seeds}
    letters = {letter: around(0.1) for letter in "abc"}
    return entry(**metrics) | {
        "per_letter": {"absorption_full": letters, "absorption_fraction": letters},
        "per_task": {
            "probing_top_1": {task: around(0.6 + 0.1 * i) for i, task in enumerate(tasks)}
        },
        "notes": {"outlier_norm": 100.0},
    }


def read_out_entry(level: float = 0.0, seeds: int = 3, ks: tuple[int, ...] = (1, 2, 5)) -> dict:
    """What experiment.py writes of a read-out: probes on few latents.  With all KS as it did
    before: probes on all latents too, and no notes."""
    whole = usual_entry(level, seeds) | {"notes": {"read_out": "on few latents"}}
    names = [*(f"probing_top_{k}" for k in ks), "probing_top_1_sd_over_tasks"]
    names += ["probing_all_latents"] if ks == KS else []
    for part in ("means", "stderrs", "final_info_dict"):
        whole[part] = {name: whole[part][name] for name in names}
    parts = ["means", "stderrs", "final_info_dict", "per_task", *(["notes"] if ks != KS else [])]
    return {part: whole[part] for part in parts}


# Of a made-up study: how an arm's absorbed share, FVU and L0 on words compare with the control's.
EFFECTS = {
    "run_1": (0.97, 1.02, 1.0),
    "run_2": (1.05, 1.05, 1.02),
    "run_3": (0.9, 1.08, 1.0),
    "run_4": (1.0, 1.04, 0.98),
    "run_5": (1.1, 1.03, 1.0),
    "run_6": (0.85, 1.04, 1.05),
    "run_7": (1.0, 1.0, 1.0),
    "run_8": (0.7, 1.25, 0.9),
    "run_9": (1.02, 1.02, 1.0),
    "run_10": (0.6, 1.55, 1.1),
}


def target_entry(name: str, target: float, seeds: int = 10, tasks: int = 7) -> dict:
    """What a run of a study writes at a target L0: scores fall with L0, and seeds agree on what is
    theirs.  No two values are alike."""
    absorbs, worse, dense = EFFECTS[name]
    shared = np.random.default_rng(7).normal(size=(12, seeds))  # by seed, the same in every run
    own = np.random.default_rng([int(name[4:]), int(10 * target)]).normal(size=(12, seeds))
    z = iter(0.8 * shared + 0.6 * own)
    l0 = target * (1 + 0.01 * next(z))
    on_words, on_texts = 2.5 * dense * l0 * (1 + 0.02 * next(z)), 1.3 * l0 * (1 + 0.01 * next(z))
    fvu = 0.25 * worse * (36 / l0) ** 0.4 * (1 + 0.01 * next(z))
    absorbed = 0.16 * absorbs * (94 / on_words) ** 0.7 + 0.008 * next(z)
    lost = 0.1 * worse * (94 / on_words) ** 0.4 + 0.006 * next(z)
    level = 0.62 + 0.03 * np.log2(target) / np.log2(36) + 0.02 * (worse - 1)
    by_task = level + np.linspace(-0.15, 0.2, tasks)[:, None] * (1 + 0.1 * next(z))
    by_task = by_task + 0.01 * own[-1] * np.linspace(-1, 1, tasks)[:, None]
    found = usual_entry(seeds=seeds)
    values = found["final_info_dict"] | {
        "l0": l0,
        "fvu": fvu,
        "l0_on_words": on_words,
        "fvu_on_words": 1.7 * fvu,
        "l0_on_texts": on_texts,
        "fvu_on_texts": 1.2 * fvu,
        "absorption_absorbed": absorbed,
        "absorption_absorbed_by_its_letter": 0.75 * absorbed,
        "absorption_lost": lost,
        "absorption_main_fires": 1 - absorbed - lost,
        "absorption_full": 2.6 * absorbed + 0.02 * next(z),
        "absorption_fraction": 0.3 + 2.6 * absorbed + 0.01 * next(z),
        "mse_roughness": 0.02 * (1 + 0.1 * (worse - 1)) + 0.0004 * next(z),
        "probing_top_1": by_task.mean(0),
        "probing_top_1_sd_over_tasks": by_task.std(0, ddof=1),
        "l0_target": [target] * seeds,
    }
    per_task = {f"task_{i}": list(scores) for i, scores in enumerate(by_task)}
    return found | entry(**values) | {"per_task": {"probing_top_1": per_task}}


def world_entry(name: str, target: float, seeds: int = 10) -> dict:
    """The same in a world with known features of which 8.5 are on."""
    absorbs, worse, _ = EFFECTS[name]
    shared = np.random.default_rng(8).normal(size=(8, seeds))
    own = np.random.default_rng([int(name[4:]), int(10 * target)]).normal(size=(8, seeds))
    z = iter(0.8 * shared + 0.6 * own)
    l0, low = target * (1 + 0.005 * next(z)), 1 / (1 + (target / 8) ** 6)
    return entry(
        l0=l0,
        fvu=worse * (0.01 + 0.6 * low) * (1 + 0.05 * next(z)),
        absorption_gap=absorbs * (0.1 + 0.45 * np.exp(-((target - 7.2) ** 2) / 4)) + 0.02 * next(z),
        parent_fires_alone=0.97 - 0.5 * low + 0.01 * next(z),
        parent_cosine=0.985 - 0.15 * low**2 + 0.003 * next(z),
        mcc=0.97 - 0.2 * low + 0.005 * next(z),
        f1=0.9 - 0.3 * low + 0.01 * next(z),
        mse_roughness=0.02 * (1 + 0.1 * (worse - 1)) + 0.0004 * next(z),
        dead=[0.0] * seeds,
        l0_target=[target] * seeds,
    )


def write_study(
    folder: Path, names, targets, seeds: int = 10, layers=(8,), make=target_entry, steps: int = 40
) -> None:
    """Runs at several targets, each with its log."""
    scale = "laptop" if make is target_entry else "synthetic"
    for name in names:
        info = {
            f"{scale} layer {layer}, L0 {target:g}": make(name, target, seeds)
            for layer in layers
            for target in targets
        }
        log = [r for layer in layers for r in records(layer, steps, seeds * len(targets))]
        write_run(folder, name, info, log, n_seeds=seeds, target_l0s=list(targets))


def records(layer: int, steps: int = 40, seeds: int = 3) -> list[dict]:
    def line(step: int) -> dict:
        measured = step % 10 == 0
        several = {"alpha": 0.5, "l0_target": 36.0, "lambda": 0.05, "l0": 40.0, "loss": 0.5}
        return {name: [v + 0.01 * s for s in range(seeds)] for name, v in several.items()} | {
            "layer": layer,
            "step": step,
            "ema_decay": None,
            "online_absorption_fraction": [0.1] * seeds if measured else None,
            "online_absorption_full": [0.1] * seeds if measured else None,
        }

    return [line(step) for step in range(steps)]


def write_run(
    folder: Path, name: str, info: dict, log=None, title=None, config=None, **scale
) -> Path:
    """A finished run; by default of the title that its label in plot.py was written for."""
    run, label = folder / name, plot.labels.get(name, "a run")
    title = title or (label if isinstance(label, str) else label[1])
    run.mkdir(parents=True)
    (run / "final_info.json").write_text(json.dumps(info))
    about = {
        "run": {"title": title},
        "scale": {"n_seeds": 3, "d_sae": 64} | scale,
        "total_steps": 40,
    }
    (run / "config.json").write_text(json.dumps(about | (config or {})))
    if log is not None:
        (run / "training_log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in log))
    return run


def draw(folder: Path, script: Path = SCRIPT) -> subprocess.CompletedProcess:
    command = [sys.executable, str(script), str(folder)]
    rooms = os.environ | {"PYTHONPATH": str(ROOT)}  # for a copy of the script
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=rooms)


def with_label(folder: Path, line: str) -> Path:
    """A copy of plot.py with one more line in `labels`, as an agent of the loop adds it."""
    script, head = folder / "plot.py", "labels = {\n"
    text = SCRIPT.read_text(encoding="utf-8")
    assert text.count(head) == 1
    script.write_text(text.replace(head, f"{head}    {line}\n"), encoding="utf-8")
    return script


def table(summary: str, heading: str) -> dict[str, dict[str, str]]:
    """A table of summary.md as {row: {column: cell}}."""
    section = summary.split(f"### {heading}\n")[1].split("\n#")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    head, _, *body = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {row[0]: dict(zip(head, row, strict=True)) for row in body}


def words(svg: Path) -> str:
    """The text of a figure: matplotlib leaves it in comments where it draws letters as outlines."""
    return html.unescape("\n".join(re.findall(r"<!-- (.*?) -->", svg.read_text(encoding="utf-8"))))


@pytest.fixture(scope="session")
def comparison(tmp_path_factory) -> Path:
    """A folder with everything that can be met in one, drawn by the real script."""
    folder = tmp_path_factory.mktemp("runs")
    read_out = {f"{LAPTOP}, read out with alpha = {a}": read_out_entry(0.05 * a) for a in (0, 1)}
    null = usual_entry()
    for name in [name for name in null["means"] if name.startswith("absorption")]:
        null["means"][name] = null["stderrs"][name] = None
        null["final_info_dict"][name] = [None] * 3
    null |= {"per_letter": {"absorption_full": {}, "absorption_fraction": {}}}
    null["notes"] |= {"absorption": "null: too few letters"}
    paired = usual_entry()
    paired["final_info_dict"]["probing_top_1"] = [0.70, 0.76, 0.67]  # control: 0.60, 0.61, 0.62
    write_run(folder, "run_1", {LAPTOP: paired, **read_out}, records(8), title=HOSTILE)
    write_run(folder, "run_2", {LAPTOP: null}, records(8))
    write_run(folder, "run_3", {PYTHIA: usual_entry()}, records(3))
    write_run(folder, "run_4", {LAPTOP: usual_entry()}, records(8))
    cut = folder / "run_4" / "final_info.json"
    cut.write_text(cut.read_text()[:-40])
    (folder / "run_5").mkdir()
    write_run(folder, "run_6", {LAPTOP: usual_entry(0.01)})
    write_run(folder, "run_7", {LAPTOP: usual_entry()}, records(8), title="the control")
    write_run(folder, "run_10", {LAPTOP: usual_entry(0.02)}, records(8), training_tokens=1)
    write_run(folder, UNKNOWN, {LAPTOP: usual_entry(0.03)}, records(8))
    single = entry(probing_top_1=[0.5], lm_top_1=[0.68])
    write_run(folder, "run_0", {GEMMA: single | {"notes": {"baseline": "as it was given"}}})
    script = with_label(tmp_path_factory.mktemp("edited"), f'"{UNKNOWN}": "{UNKNOWN}",')
    found = draw(folder, script)
    assert found.returncode == 0, found.stderr
    (folder / "stdout").write_text(found.stdout)
    (folder / "stderr").write_text(found.stderr)
    return folder


@pytest.fixture(scope="session")
def summary(comparison) -> str:
    return (comparison / "summary.md").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def alone(tmp_path_factory) -> Path:
    """A folder with one run of one seed, drawn by the real script."""
    folder = tmp_path_factory.mktemp("alone")
    info = {LAPTOP: usual_entry(seeds=1)}
    info[f"{LAPTOP}, read out with alpha = 0"] = read_out_entry(seeds=1, ks=KS)
    write_run(folder, "run_1", info, records(8, seeds=1))
    found = draw(folder)
    assert (found.returncode, found.stderr) == (0, "")
    return folder
