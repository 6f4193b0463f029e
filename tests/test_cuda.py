"""The path through CUDA, on a pretend GPU (pretend_cuda.py): every tensor where CUDA wants it.

Nothing here is a measurement, and nothing here needs a GPU.  The pretend GPU is registered with
torch for good, so whatever uses it runs in a process of its own.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import test_gemma
import tiny
import torch
from hub import make_gemma

import experiment
from lab.activations import Position, calibrate, shuffled_batches, whole_block
from lab.devices import Ranks
from lab.scales import SCALES, Scale
from lab.storage import save_tensors

TESTS = Path(__file__).resolve().parent
ON_THE_GPU = f"""
sys.path.insert(0, {str(TESTS)!r})
import pretend_cuda
gpu = pretend_cuda.pretend_for_good()
"""


def started(code: str, cwd: Path | None = None, **environment: str) -> subprocess.Popen:
    """Python code in a process of its own, with these tests' modules in reach."""
    paths = [str(tiny.ROOT), str(TESTS)]
    return subprocess.Popen(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {paths}\n{code}"],
        cwd=cwd,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def alone(function: Callable) -> dict:
    """What a function of this file finds in a process of its own, with a pretend GPU."""
    done = tiny.ended(started(f"import test_cuda as t; t.on_a_pretend_gpu(t.{function.__name__})"))
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def on_a_pretend_gpu(function: Callable) -> None:
    import pretend_cuda

    with pretend_cuda.pretend_cuda() as gpu:
        print(json.dumps(function(gpu)))


# ── Does the pretend GPU do what it says? ────────────────────────────────────────────────────────


def mixes() -> dict[str, Callable]:
    """What CUDA refuses."""
    import torch.distributed as dist

    gpu, cpu = torch.ones(3, 4, device="cuda"), torch.ones(3, 4)
    scalar, layer = torch.tensor(1.0), torch.nn.Linear(4, 2).to("cuda")
    indices = torch.tensor([0, 1])
    one = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("nccl", **one)
    return {
        "sum": lambda: gpu + cpu,
        "product": lambda: cpu @ gpu.T,
        "layer": lambda: layer(cpu),
        "condition": lambda: torch.where(cpu > 0, gpu, gpu),
        "concatenation": lambda: torch.cat([gpu, cpu]),
        "stack of scalars": lambda: torch.stack([gpu.sum(), scalar]),
        "in place, into the CPU": lambda: scalar.add_(gpu.sum()),
        "mask of masked_fill": lambda: gpu.masked_fill(cpu > 0, 0),
        "index on the GPU into the CPU": lambda: cpu[indices.to("cuda")],
        "values put into the GPU": lambda: gpu.index_put_((indices,), cpu[:2]),
        "embedding": lambda: torch.nn.functional.embedding(indices, gpu),
        "gather": lambda: gpu.gather(1, torch.zeros(3, 1, dtype=torch.long)),
        "index_add": lambda: gpu.index_add_(0, indices, gpu[:2]),
        "generator": lambda: torch.randn(2, device="cuda", generator=torch.Generator()),
        "state of the generator": lambda: torch.cuda.set_rng_state(
            torch.cuda.get_rng_state().to("cuda")
        ),
        "NumPy": gpu.numpy,
        "file of a tensor that does not lie together": lambda: save_tensors(
            {"x": gpu.T}, Path(os.devnull)
        ),
        "file of tensors that share memory": lambda: save_tensors(
            {"x": gpu, "y": gpu[:]}, Path(os.devnull)
        ),
        "second GPU of one": lambda: torch.cuda.set_device(1),
        "tensor on a second GPU": lambda: torch.ones(1, device="cuda:1"),
        "more than its memory": lambda: torch.ones(250_000, device="cuda"),
        "all_reduce of the CPU's": lambda: dist.all_reduce(cpu),
        "all_gather into the CPU's": lambda: dist.all_gather([cpu], gpu),
        "broadcast of the CPU's": lambda: dist.broadcast(cpu, 0),
        "all_reduce of what does not lie together": lambda: dist.all_reduce(gpu.T),
        "all_reduce of what NCCL has no number for": lambda: dist.all_reduce(gpu.short()),
    }


def no_mixes() -> dict[str, Callable]:
    """What CUDA takes."""
    import torch.distributed as dist

    gpu, cpu, scalar = torch.ones(3, 4, device="cuda"), torch.ones(3, 4), torch.tensor(2.0)
    return {
        "scalar of the CPU": lambda: gpu * scalar,
        "index of the CPU": lambda: gpu[torch.tensor([0, 2])],
        "mask of the CPU": lambda: gpu[cpu > 0],
        "scalar put at a mask": lambda: gpu.clone().index_put_((cpu > 0,), scalar),
        "copy either way": lambda: (cpu.clone().copy_(gpu), gpu.clone().copy_(cpu)),
        "numbers": lambda: (gpu.sum().item(), gpu.tolist(), bool(gpu.any())),
        "state of the generator": lambda: torch.cuda.set_rng_state(torch.cuda.get_rng_state()),
        "half of its memory": lambda: torch.ones(125_000, device="cuda"),
        "this process's GPU": lambda: torch.cuda.set_device(torch.device("cuda", 0)),
        "all_reduce": lambda: dist.all_reduce(gpu, dist.ReduceOp.MAX),
        "objects": lambda: (
            dist.all_gather_object([None], {"x": cpu, "y": gpu}),
            dist.broadcast_object_list([1, "two"], src=0),
        ),
    }


def what_is_refused(gpu) -> list[dict]:
    """{name: whether it was refused} of mixes and no mixes."""

    def refused(what: Callable) -> bool:
        try:
            what()
        except (RuntimeError, TypeError, ValueError):
            return True
        return False

    gpu.memory = 1_000_000
    return [{name: refused(f) for name, f in some.items()} for some in (mixes(), no_mixes())]


def test_the_pretend_gpu_refuses_what_cuda_refuses_and_nothing_else():
    mixed, not_mixed = alone(what_is_refused)
    assert all(mixed.values()), mixed
    assert not any(not_mixed.values()), not_mixed


def where_files_put_tensors(gpu) -> dict:
    import io

    def location(tensor: torch.Tensor) -> str:
        return str(tensor.device)

    gpu.devices, file = 2, io.BytesIO()
    layer = torch.nn.Linear(2, 3).to("cuda")
    optimizer = torch.optim.Adam(layer.parameters(), fused=True)
    layer(torch.ones(1, 2, device="cuda")).sum().backward()
    optimizer.step()
    held = {"layer": layer, "optimizer": optimizer, "view": layer.weight.data[0]}
    torch.save(held | {"cpu": torch.ones(2)}, file)
    found = {}
    for where in (None, "cpu", "cuda:1"):
        file.seek(0)
        again = torch.load(file, map_location=where, weights_only=False)
        (moment, *_) = again["optimizer"].state.values()
        found[str(where)] = [
            *(location(t) for t in (again["layer"].weight, moment["exp_avg"], again["cpu"])),
            again["layer"].weight.data_ptr() == again["view"].data_ptr(),
            isinstance(again["layer"].weight, torch.nn.Parameter),
            again["optimizer"].param_groups[0]["params"][0] is again["layer"].weight,
            torch.equal(again["layer"].weight.cpu(), layer.weight.cpu()),
        ]
    return found


def test_a_file_says_where_a_tensor_lay_and_loading_puts_it_where_it_is_told():
    same = [True] * 4
    assert alone(where_files_put_tensors) == {
        "None": ["cuda:0", "cuda:0", "cpu", *same],
        "cpu": ["cpu", "cpu", "cpu", *same],
        "cuda:1": ["cuda:1", "cuda:1", "cuda:1", *same],
    }


def bytes_of_the_gpu(gpu) -> list:
    found = [gpu.live]
    x = torch.ones(1000, device="cuda")
    view, shared = x[:10], x.view(10, 100).T
    found.append(gpu.live)  # 4,000 bytes, once
    del x, shared
    found.append(gpu.live)  # all of them still: `view` holds the storage
    del view
    found.append(gpu.live)
    with gpu.watched() as part:
        y = torch.zeros(100_000, device="cuda") + 1  # two of 400,000, for a moment
        del y
    found += [part.peak, gpu.live, sorted(part.made_by().values())]
    with gpu.watched() as later:
        z = torch.ones(10, dtype=torch.bfloat16, device="cuda")
    found += [later.peak, gpu.peak]
    w = torch.ones(100, 100, device="cuda", requires_grad=True)
    product = (w * w).sin()  # its backward keeps w * w, and nothing else of its own
    found.append(gpu.live)
    product.sum().backward()
    del product
    found += [gpu.live, torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]]
    del w, z
    return found


def test_the_bytes_on_the_pretend_gpu_are_those_of_its_storages_while_they_live():
    big, w, z = 400_000, 40_000, 20
    assert alone(bytes_of_the_gpu) == [
        *(0, 4000, 4000, 0),
        *(2 * big, 0, [big, big], z, 2 * big),
        z + 3 * w,
        *(z + 2 * w, z + 2 * w, 80_000_000_000 - z - 2 * w),
    ]


def what_is_waited_for(gpu) -> dict:
    cpu = torch.ones(3)
    x = cpu.to("cuda")
    actions = {
        "arithmetic": lambda: (x * 2 + x).sum(),
        "scalar of the CPU": lambda: x * torch.tensor(2.0),
        "view": lambda: x[1:].view(2, 1),
        "list": lambda: torch.tensor([1.0, 2.0], device="cuda"),
        "fill": lambda: torch.full((3,), 2.0, device="cuda"),
        "copy": lambda: x.copy_(cpu),
        "copy that may be queued": lambda: x.copy_(cpu, non_blocking=True),
        "copy that is queued": lambda: x.copy_(cpu.clone().pin_memory(), non_blocking=True),
        "move that is queued": lambda: cpu.clone().pin_memory().to("cuda", non_blocking=True),
        "number": lambda: x.sum().item(),
        "condition": lambda: bool(x.any()),
        "tolist": x.tolist,
        "mask": lambda: x[x > 0],
        "write at a mask": lambda: x.masked_fill_(x > 9, 0),
        "index of the CPU": lambda: x[torch.tensor([0])],
        "index of the GPU": lambda: x[torch.zeros(1, dtype=torch.long, device="cuda")],
        "where it is not 0": lambda: x.nonzero(),
        "one-hot": lambda: torch.nn.functional.one_hot(x.long(), 4),
    }
    found = {}
    for name, action in actions.items():
        gpu.waits.clear()
        action()
        found[name] = dict(gpu.waits)
    return found


def test_the_pretend_gpu_counts_where_the_cpu_waits():
    waits = {name: found for name, found in alone(what_is_waited_for).items() if found}
    assert waits == {
        "list": {"from the CPU": 1},
        "copy": {"from the CPU": 1},
        "copy that may be queued": {"from the CPU": 1},
        "number": {"item": 1},
        "condition": {"item": 1},
        "tolist": {"to the CPU": 1},
        "mask": {"mask": 1},
        "index of the CPU": {"from the CPU": 1},
        "where it is not 0": {"nonzero": 1},
    }


# ── The program on it ────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def scale(tmp_path_factory) -> Scale:
    """The gemma scale's way (eager attention, nothing kept, scores in bfloat16), without a hub."""
    folder = make_gemma(tmp_path_factory.mktemp("models") / "tiny-gemma", layers=3)
    changes = {"layers": (0, 1), "keep_activations": False, "evaluation_dtype": "bfloat16"}
    return tiny.tiny_scale(folder, tasks=("sentiment",), checkpoint_seconds=600, **changes)


def log_of(folder: Path) -> list[dict]:
    lines = (folder / "training_log.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(x).items() if k != "tokens_per_second"} for x in lines]


def test_the_gemma_scale_runs_start_to_finish_on_the_gpu(hub, tmp_path):
    tasks = ("LabHC/bias_in_bios_class_set1", "codeparrot/github-code")
    scale = test_gemma.small(layers=(1,), tasks=tasks)
    process = test_gemma.start(hub, tmp_path / "cache", tmp_path, scale, ON_THE_GPU)
    test_gemma.finish(process, tmp_path)
    config = json.loads((tmp_path / "run_2" / "config.json").read_text())
    assert config["device"] == "pretend GPU"
    assert config["language_model"]["device"] == "cuda pretend GPU"
    results = json.loads((tmp_path / "run_2" / "final_info.json").read_text())
    means = results["gemma-2-2b layer 1"]["means"]
    missing = {name for name, value in means.items() if value is None}
    between_seeds = ("_rank_correlation", "_mcc", "_mcc_null", "_over_seeds")
    assert all(name.endswith(between_seeds) for name in missing), "of which there is one here"
    assert means["absorption_letters"] >= 20
    assert 0 < means["fvu"] < 1


KINDS = "run_1", "run_2", "run_7", "run_8", "run_10"  # blend, paced, linear, cosine, restored
EVERY_KIND = f"""
for name in {KINDS[:-1]}:
    assert main_of(name) == 0
sys.argv[1:] = ["--out_dir={KINDS[-1]}"]
"""
# With the first-letter probes of the GPU's run: SAE-Bench fits them in bfloat16 on CUDA.
STRAIGHT_ON = """
lab.language_model.device_kind = lambda: "cuda pretend GPU"
identity = experiment.training_identity
experiment.training_identity = lambda *of_what: identity(*of_what) | {"straight on": True}
main_of = lambda name: experiment.main([f"--out_dir={name}"])
"""
STOPPED = f"""
import os
from pathlib import Path
step, main = experiment.Trainer.step, experiment.main
def stopping(self, x):
    if self.steps_done == 10 and not Path(f"stopped {{self.run.title}}").exists():
        Path(f"stopped {{self.run.title}}").touch()
        os.kill(os.getpid(), {int(signal.SIGTERM)})
    return step(self, x)
experiment.Trainer.step = stopping
def main_of(name):
    assert main([f"--out_dir={{name}}"]) == 75
    return main([f"--out_dir={{name}}"])
experiment.main = lambda arguments: main_of(arguments[0].split("=")[1])
"""


@pytest.fixture(scope="module")
def all_trained(scale, cache, tmp_path_factory) -> dict[str, Path]:
    """Every kind of arm, trained in one go on the CPU, and stopped and taken up on the GPU."""
    patches = {"cpu": STRAIGHT_ON + EVERY_KIND, "gpu": ON_THE_GPU + STOPPED + EVERY_KIND}
    folders = {name: tmp_path_factory.mktemp(name) for name in patches}
    processes = [
        tiny.start_script(scale=scale, cache=cache, cwd=folders[name], patch=patch, quick=True)
        for name, patch in patches.items()
    ]
    for process, on_gpu in zip(processes, (False, True), strict=True):
        done = tiny.ended(process)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("going on from the checkpoint of step") == on_gpu * len(KINDS)
    return folders


@pytest.mark.parametrize("run", KINDS)
def test_training_on_the_gpu_is_that_on_the_cpu_also_when_it_is_stopped(run, all_trained):
    on_gpu, on_cpu = (log_of(all_trained[name] / run) for name in ("gpu", "cpu"))
    assert len(on_cpu) == 20 * 2
    assert on_gpu == on_cpu
    config = json.loads((all_trained["gpu"] / run / "config.json").read_text())
    assert config["device"] == "pretend GPU"


# ── What a training step waits for ───────────────────────────────────────────────────────────────


def waits_of_training(gpu) -> dict[str, dict[str, int]]:
    """{what: {kind: waits}} of an ordinary step of every kind of arm, between two measurements, and
    of the batch that it is made on."""
    rows = torch.randn(512, 1, 16, device="cuda").bfloat16()
    units = calibrate(rows[:, 0], Ranks())
    scale = replace(SCALES["gemma-2-2b"], **tiny.SMALL | {"d_sae": 48, "n_seeds": 2})
    found = {}
    for name in KINDS:
        run = experiment.RUNS[name]
        trainer = experiment.Trainer(scale, tiny.RECIPE, run, 5, units, Ranks())
        assert trainer.device.type == "cuda"
        trainer.step(rows[:, 0])  # with which the average begins
        gpu.waits.clear()
        trainer.step(rows[:, 0])
        found[name] = dict(gpu.waits)
    block = whole_block(tiny.fresh((0, 1, 2, 3)), rows, [128] * 4)
    batches = shuffled_batches(scale, [block], Ranks(), Position(0, 0, {}))
    next(batches)
    gpu.waits.clear()
    next(batches)
    return found | {"batch": dict(gpu.waits)}


def test_an_ordinary_step_waits_for_nothing_but_what_is_listed_here():
    """For nothing: what it needs of the CPU's numbers is filled in on the GPU, and what it measures
    stays there until it is written down."""
    assert alone(waits_of_training) == {name: {} for name in (*KINDS, "batch")}


# ── Two processes, a GPU each ────────────────────────────────────────────────────────────────────

# In float32, for gradients are added up in another order.  Stopped once, and taken up in the same
# process, which leaves its group first, as its end would.
TOGETHER = """
import os, torch
load, main, step = experiment.load_language_model, experiment.main, experiment.Trainer.step
experiment.load_language_model = lambda scale: load(scale, torch.float32)

def stopping(self, x):
    if self.steps_done == 4:
        experiment.Trainer.step = step
        if os.environ["RANK"] == "0":
            os.kill(os.getpid(), 15)
    return step(self, x)

def main_of(arguments):
    assert main(arguments) == 75
    torch.distributed.destroy_process_group()
    os.environ["MASTER_PORT"] = os.environ["NEXT_PORT"]
    return main(arguments)

experiment.Trainer.step, experiment.main = stopping, main_of
"""
ALONE = """
import torch
load = experiment.load_language_model
experiment.load_language_model = lambda scale: load(scale, torch.float32)
"""
TWO_GPUS = ON_THE_GPU.replace("for_good()", "for_good(devices=2)")


def free_ports(n: int) -> list[str]:
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.socket()) for _ in range(n)]
        for one in held:
            one.bind(("127.0.0.1", 0))
        return [str(one.getsockname()[1]) for one in held]


def together(patch: str, **how) -> list[subprocess.CompletedProcess]:
    """The script in two processes that train together, as torchrun starts them."""
    ports = dict(zip(("MASTER_PORT", "NEXT_PORT"), free_ports(2), strict=True))
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"} | ports
    processes = [
        tiny.start_script(
            "--out_dir=run_2", patch=patch, RANK=rank, LOCAL_RANK=rank, **common, **how
        )
        for rank in "01"
    ]
    return [tiny.ended(process) for process in processes]


def test_two_processes_with_a_gpu_each_follow_the_curve_of_one_also_when_stopped(
    scale, cache, tmp_path
):
    scale = replace(scale, training_dtype="float32", keep_activations=True)  # rows of the CPU
    how = {"scale": scale, "cache": cache, "quick": True}
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    done = tiny.run_script("--out_dir=run_2", patch=ON_THE_GPU + ALONE, cwd=folders[0], **how)
    assert done.returncode == 0, done.stderr[-3000:]
    both = together(TWO_GPUS + TOGETHER, cwd=folders[1], **how)
    for done in both:
        assert done.returncode == 0, done.stderr[-3000:]
        assert "going on from the checkpoint of step 10" in both[0].stdout
    alone, two = (log_of(folder / "run_2") for folder in folders)
    test_gemma.same_curve(two, alone)


def test_two_processes_on_one_gpu_are_an_error(scale, cache, tmp_path):
    """What NCCL would find where no process says which GPU is its own."""
    unsaid = TWO_GPUS + "import torch\ntorch.cuda.set_device = lambda device: None\n"
    for done in together(unsaid, scale=scale, cache=cache, cwd=tmp_path, quick=True):
        assert done.returncode != 0
        assert "Duplicate GPU detected" in done.stderr


# ── Would it notice? ─────────────────────────────────────────────────────────────────────────────

# Runs the program once for each change to its source, in a fork of a process that has imported all
# that the program does, so that only the program is read anew.
CHANGED = """
import contextlib, importlib.util, io, json, os, sys, traceback
from pathlib import Path
import sae_bench.evals.absorption.main, sae_bench.evals.sparse_probing.main, sae_lens, transformers
import pretend_cuda

def run_changed(file, old, new):
    gpu = pretend_cuda.pretend_for_good()
    import lab
    path = Path({root!r}) / file
    source = path.read_text(encoding="utf-8")
    assert source.count(old) == 1, (file, old)
    name = file.removesuffix(".py").replace("/", ".")
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    exec(compile(source.replace(old, new), path, "exec"), module.__dict__)
    if name != "experiment":
        setattr(lab, path.stem, module)
    import experiment, lab.scales, lab.storage
    lab.evaluation.probing_artifacts = lambda *_: lab.storage.cache_root()
    values = {{k: tuple(v) if isinstance(v, list) else v for k, v in {scale!r}.items()}}
    lab.scales.SCALES[values["name"]] = lab.scales.Scale(**values)
    experiment.RECIPES[values["name"]] = experiment.Recipe(**{recipe!r})
    try:
        with contextlib.redirect_stderr(io.StringIO()) as told:
            status = experiment.main(["--out_dir=run_7"])
        return told.getvalue() if status else "nothing was noticed"
    except RuntimeError as error:
        return str(error)

for number, change in enumerate({changes!r}):
    if not (child := os.fork()):
        folder = Path(str(number))
        folder.mkdir()
        os.chdir(folder)
        try:
            Path("found").write_text(run_changed(*change))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
"""


def outcomes(
    changes: list[tuple[str, str, str]], scale: Scale, cache: Path, cwd: Path
) -> list[str]:
    """The error that the program ends with after each change: (file, old, new)."""
    values = {"scale": asdict(scale), "recipe": asdict(tiny.RECIPE), "root": str(tiny.ROOT)}
    environment = {"COSINE_SAE_CACHE": str(cache), "EXPERIMENT_SCALE": scale.name}
    done = tiny.ended(started(CHANGED.format(changes=changes, **values), cwd, **environment))
    assert done.returncode == 0, done.stderr[-3000:]
    found = []
    for number in range(len(changes)):
        path = cwd / str(number) / "found"
        assert path.exists(), done.stderr[-3000:]
        found.append(path.read_text(encoding="utf-8"))
    return found


REMOVED = [
    ("lab/language_model.py", "base_model(tokens_BL.to(self.device)", "base_model(tokens_BL"),
    ("experiment.py", "recipe.initial_lambda, device=self.device)", "recipe.initial_lambda)"),
    (
        "lab/fidelity.py",
        "special(self.contexts_NL).to(self.lm.device)",
        "special(self.contexts_NL)",
    ),
]


def test_a_tensor_that_stays_behind_is_noticed(scale, cache, tmp_path):
    """In the model's pass, in the trainer, in the evaluation: each with its move taken out."""
    for error in outcomes(REMOVED, scale, cache, tmp_path):
        assert "Expected all tensors to be on the same device" in error
