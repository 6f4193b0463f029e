"""Edits that experimenters make, applied as text to a copy of experiment.py: each is either right,
equal to a plain computation beside it, or refused in a sentence.

What they share: one place is edited, and the tiny script is run as it stands.
"""

import importlib.util
import json
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import RECIPE, ROOT, randn, run_script, start_script, tiny_scale, tree

import experiment

ENCODE = "f = pre_activations(x, *weights, alpha, dtype).relu()"
DECODE = "return torch.bmm(f, self.W_dec.to(f.dtype)).float() + self.b_dec[:, None, :]"
PARAMETER = "        self.gate = param(torch.full((S, d_sae), recipe.gate_init))\n"
LOSS = "return Forward(mse_S + lambda_S * l1_S,"
STATE = "        self.steps_done = 0\n"
AFTER_STEP = "        self.optimizer.step()\n"
OPTIMIZER = "torch.optim.Adam(trained, lr=recipe.learning_rate, fused=True)"


@pytest.fixture(scope="module")
def scale(tiny_model):
    return tiny_scale(tiny_model, tasks=("sentiment",), training_tokens=30 * 256)


@pytest.fixture
def run_edited(scale, cache, tmp_path):
    """run_edited((old, new), ...): the run of an edited copy, in tmp_path/run_1 or another row."""

    def run(*pairs: tuple[str, str], run: str = "run_1", start=run_script, **how):
        how = {"quick": True, "cwd": tmp_path, "scale": scale, "cache": cache} | how
        return start(f"--out_dir={run}", script=edited(tmp_path, *pairs), **how)

    return run


def edited(folder: Path, *pairs: tuple[str, str]) -> Path:
    """A folder with a copy of experiment.py in which each old text, found once, is the new one."""
    text = Path(experiment.__file__).read_text(encoding="utf-8")
    for old, new in pairs:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    copy = folder / "edited"
    copy.mkdir(exist_ok=True)
    (copy / "experiment.py").write_text(text, encoding="utf-8")
    return copy


def finished(process, run: Path) -> dict:
    """config.json of a run that ended well, its SAEs found to be what was trained."""
    assert process.returncode == 0, process.stderr
    assert "every saved SAE, loaded afresh, computes what was trained" in process.stdout
    return json.loads((run / "config.json").read_text(encoding="utf-8"))


def refused(process, *said: str) -> None:
    """Status 1, and one sentence last on stderr, without a traceback."""
    assert process.returncode == 1, process.stderr
    assert "Traceback" not in process.stderr
    assert process.stderr.splitlines()[-1].startswith("error: ")
    for text in said:
        assert text in process.stderr


def log_of(run: Path) -> list[dict]:
    lines = (run / "training_log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def as_a_user_loads_it(run: Path, seed: int = 0):
    """The saved SAE, by the run's own experiment.py, and its trained tensors in float64."""
    import sae_lens

    spec = importlib.util.spec_from_file_location(
        f"experiment_of_{run.name}", run / "experiment.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.register_with_sae_lens()
    folder = run / f"sae/layer_1_seed_{seed}"
    weights = load_file(folder / "sae_weights.safetensors")
    plain = {name.removeprefix("trained."): t[0].double() for name, t in weights.items()}
    return sae_lens.SAE.load_from_disk(folder), plain


def plain_scores(sae, w: dict[str, torch.Tensor], x: torch.Tensor) -> tuple:
    """(pre-activations in training units, latent by latent; residual-stream units of a latent)."""
    alpha, scale = sae.cfg.alpha, sae.cfg.activation_scale
    x_c = x.double() * scale - w["b_dec"]
    z = torch.empty(len(x), len(w["gate"]), dtype=torch.float64)
    for i in range(len(w["gate"])):
        column = w["W_enc"][:, i]
        linear = x_c @ column
        cosine = linear / (x_c.norm(dim=-1) * column.norm())
        z[:, i] = w["gate"][i] * ((1 - alpha) * cosine + alpha * linear) + w["b_enc"][i]
    return z, w["W_dec"].norm(dim=-1) / scale


def assert_close(found: torch.Tensor, plain: torch.Tensor) -> None:
    assert plain.norm() > 0
    assert (found.double() - plain).norm() < 1e-5 * plain.norm()


# ── Another formula ─────────────────────────────────────────────────────────────────────────────


def test_a_per_latent_temperature_is_trained_averaged_saved_and_loaded(run_edited, tmp_path):
    process = run_edited(
        (PARAMETER, PARAMETER + "        self.temperature = param(torch.full((S, d_sae), 1.5))\n"),
        (
            ENCODE,
            f"t = self.temperature[:, None, :].to(dtype)\n        {ENCODE[:-7]}.mul(t).relu()",
        ),
    )
    finished(process, tmp_path / "run_1")
    sae, w = as_a_user_loads_it(tmp_path / "run_1")
    assert (w["temperature"] - 1.5).abs().max() > 1e-3  # it was trained
    raw = load_file(tmp_path / "run_1/sae/layer_1_seed_0/raw.safetensors")
    assert not torch.equal(raw["trained.temperature"][0].double(), w["temperature"])  # and averaged
    x = randn(50, sae.cfg.d_in) / sae.cfg.activation_scale
    z, units = plain_scores(sae, w, x)
    assert_close(sae.encode(x), (z * w["temperature"]).relu() * units)


def test_topk_in_the_one_place_of_the_encoder_is_scored_as_it_was_trained(run_edited, tmp_path):
    top_4 = f"{ENCODE}\n        f = f * (f >= f.topk(4).values[..., -1:])"
    process = run_edited((ENCODE, top_4), quick=False)
    finished(process, tmp_path / "run_1")
    (entry, *_) = json.loads((tmp_path / "run_1/final_info.json").read_text("utf-8")).values()
    assert 3.5 < entry["means"]["l0"] <= 4  # bfloat16 has no part in it: no two latents tie
    sae, w = as_a_user_loads_it(tmp_path / "run_1")
    x = randn(50, sae.cfg.d_in) / sae.cfg.activation_scale
    z, units = plain_scores(sae, w, x)
    f = z.relu()
    assert_close(sae.encode(x), f * (f >= f.topk(4).values[..., -1:]) * units)


def test_jumprelu_keeps_its_threshold_in_the_right_units(run_edited, tmp_path):
    jump = f"z = {ENCODE[4:-7]}\n        f = z * (z > self.threshold[:, None, :].to(dtype))"
    process = run_edited(
        (PARAMETER, PARAMETER + "        self.threshold = param(torch.full((S, d_sae), 0.05))\n"),
        (ENCODE, jump),
    )
    finished(process, tmp_path / "run_1")
    sae, w = as_a_user_loads_it(tmp_path / "run_1")
    x = randn(50, sae.cfg.d_in) / sae.cfg.activation_scale
    z, units = plain_scores(sae, w, x)
    f = z * (z > w["threshold"])
    assert (f.sign() != z.relu().sign()).any()  # the threshold matters
    assert_close(sae.encode(x), f * units)


def test_another_decoder_is_what_the_saved_sae_decodes_and_shows_as_w_dec(run_edited, tmp_path):
    """Tied: the encoder's directions are the decoder's."""
    tied = DECODE.replace(
        "self.W_dec", "torch.nn.functional.normalize(self.W_enc, dim=1).transpose(1, 2)"
    )
    finished(run_edited((DECODE, tied)), tmp_path / "run_1")
    sae, w = as_a_user_loads_it(tmp_path / "run_1")
    rows = torch.nn.functional.normalize(w["W_enc"], dim=0).T
    assert_close(sae.W_dec, rows)
    f = randn(50, sae.cfg.d_sae).relu()
    assert_close(sae.decode(f), f.double() @ rows + w["b_dec"] / sae.cfg.activation_scale)


def test_a_decoder_that_is_not_linear_is_refused_after_training(run_edited, tmp_path):
    process = run_edited((DECODE, DECODE.replace("torch.bmm(f,", "torch.bmm(f * (1 + f),")))
    refused(process, "layer_1_seed_0 does not compute what was trained", "nothing was evaluated")
    assert not (tmp_path / "run_1/final_info.json").exists()


def test_what_training_changes_and_no_state_dict_holds_is_refused_after_training(
    run_edited, tmp_path
):
    process = run_edited(
        (PARAMETER, PARAMETER + "        self.floor = 0.0\n"),
        (ENCODE, f"{ENCODE}\n        f = f * (f > self.floor)"),
        (AFTER_STEP, AFTER_STEP + "        sae.floor = 0.05\n"),
    )
    refused(
        process, "does not compute what was trained: its latents differ by", "buffer of the SAE"
    )
    assert not (tmp_path / "run_1/final_info.json").exists()


FORWARD = "        f = self.encode(x, alphas, dtype)\n"
CUT = "        f = f * (f >= f.topk(4).values[..., -1:])\n"
LEAKY = ENCODE.replace(".relu()", "").replace("f = ", "z = ")


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        ([(FORWARD, FORWARD + CUT)], "L0 in forward() is not that of encode()"),
        (
            [("x - self.decode(f)", "x - 0.9 * self.decode(f)")],
            "mse in forward() is not that of decode(encode())",
        ),
        (
            [(ENCODE, f"{LEAKY}\n        f = torch.where(z > 0, z, 0.01 * z)")],
            "latents are below 0",
        ),
        (
            [
                (
                    ENCODE,
                    f"{ENCODE}\n        least = f.flatten(1).topk(8 * x.shape[0]).values"
                    "\n        return f * (f >= least[:, -1, None, None])",
                )
            ],
            "latents depend on what else is in the batch",
        ),
        (
            [(ENCODE, f"{ENCODE}.mul(1 + 0.1 * torch.rand_like(self.b_enc)[:, None, :])")],
            "gives other latents when it reads the same rows again",
        ),
        (
            [("        alphas, targets = self.schedule_at(step)\n",
              "        alphas, targets = self.schedule_at(step)\n"
              "        alphas = [1 - a for a in alphas]\n")],
            "the last step trained with alpha [0.09",
        ),
        (
            [("        forward = sae(x, alphas,", "        forward = sae(0.2 * x, alphas,")],
            "step() does not train on what the SAE will read",
        ),
        (
            [
                ("CONTROL =", "FLOOR = [0.0]\nCONTROL ="),
                (AFTER_STEP, AFTER_STEP + "        FLOOR[0] += 0.001\n"),
            ],
            "training changed FLOOR, of the script and not of an object",
        ),
    ],
)  # fmt: skip
def test_what_is_trained_elsewhere_than_in_the_sae_is_refused(run_edited, tmp_path, pairs, said):
    refused(run_edited(*pairs), said)
    assert not (tmp_path / "run_1/final_info.json").exists()


def test_dropout_in_training_mode_only_is_right(run_edited, tmp_path):
    """Everything that is measured or saved is so in eval mode."""
    noisy = f"{ENCODE}\n        f = f * torch.rand_like(f).gt(0.1) if self.training else f"
    finished(run_edited((ENCODE, noisy)), tmp_path / "run_1")


def test_a_file_beside_the_script_belongs_to_its_code_and_is_kept_with_the_run(
    run_edited, tmp_path
):
    folder = edited(tmp_path)
    (folder / "mine.py").write_text("def activation(z):\n    return z.relu()\n")
    mine = (
        ("from lab.work import Work", "from mine import activation\nfrom lab.work import Work"),
        (ENCODE, f"f = activation({ENCODE[4:-7]})"),
    )
    finished(run_edited(*mine), tmp_path / "run_1")
    assert (tmp_path / "run_1/mine.py").exists()
    (folder / "mine.py").write_text("def activation(z):\n    return z.relu() * 3\n")
    refused(run_edited(*mine), "the code has changed since run_1 was begun: experiment.py")


def test_a_parameter_that_the_seeds_would_share_is_refused_before_any_step(run_edited):
    shared = PARAMETER + "        self.temperature = param(torch.ones(d_sae))\n"
    refused(run_edited((PARAMETER, shared)), "BlendedSAE.temperature has shape (96,)", "2 seeds")


# ── Another training ────────────────────────────────────────────────────────────────────────────


def test_another_loss_term_is_trained_on_logged_and_leaves_the_mse_comparable(run_edited, tmp_path):
    term = LOSS.replace("lambda_S * l1_S", "lambda_S * l1_S + 0.5 * f.float().mean(1).sum(-1)")
    finished(run_edited((LOSS, term)), tmp_path / "run_1")
    records = log_of(tmp_path / "run_1")
    for record in records:  # sum over latents of the mean over tokens: the l1 once more
        for s in range(2):
            plain = record["mse"][s] + (record["lambda"][s] + 0.5) * record["l1"][s]
            assert record["loss"][s] == pytest.approx(plain, rel=1e-2)  # f is bfloat16


def test_another_schedule_is_one_function_and_its_row(run_edited, tmp_path):
    process = run_edited(
        ('    "linear": linear,\n', '    "linear": linear,\n    "square": lambda p: p**2,\n'),
        ('readout_alphas=(0.0, 1.0)),\n    "run_2"', 'schedule="square"),\n    "run_2"'),
    )
    finished(process, tmp_path / "run_1")
    records = log_of(tmp_path / "run_1")
    for record in records:
        assert record["alpha"] == [pytest.approx(0.1 + 0.8 * (record["step"] / 29) ** 2)] * 2


def test_a_schedule_that_leaves_0_to_1_is_refused_before_any_work(run_edited, cache, tmp_path):
    before = tree(cache)
    process = run_edited(("return min(1.0, 2.0 * progress)", "return 2.0 * progress"), run="run_4")
    refused(process, "ALPHA_SCHEDULES['fast'] gives alpha = 1.0")
    assert tree(cache) == before
    assert not (tmp_path / "run_4/config.json").exists()


GROUPS = OPTIMIZER.replace(
    "trained,", '[{"params": [self.sae.gate], "lr": 0.0}, {"params": trained[:-1]}],'
)


def test_an_optimiser_groups_own_rate_is_kept(run_edited, tmp_path):
    """The gate, the last trained parameter of these arms, at rate 0: it stays where it began."""
    finished(run_edited((OPTIMIZER, GROUPS), run="run_7"), tmp_path / "run_7")
    _, w = as_a_user_loads_it(tmp_path / "run_7")
    assert torch.equal(w["gate"], torch.full_like(w["gate"], torch.tensor(RECIPE.gate_init).item()))
    assert w["b_enc"].abs().max() > 0  # the other group was trained


# Everything a checkpoint must find by itself: a second rate, a tensor, a window, a generator.
STATEFUL = (
    (OPTIMIZER, GROUPS.replace("0.0", "recipe.learning_rate / 3")),
    (
        STATE,
        STATE
        + "        from collections import deque\n"
        + "        self.noise = torch.Generator().manual_seed(5)\n"
        + "        self.window, self.drift = deque(maxlen=3), None\n"
        + "        self.dice = __import__('random').Random(1)\n",
    ),
    (
        AFTER_STEP,
        AFTER_STEP
        + "        self.drift = loss_S if self.drift is None else 0.9 * self.drift + loss_S\n"
        + "        self.window.append(grad_norm_S.sum().item() * self.dice.random())\n"
        + "        with torch.no_grad():\n"
        + "            shake = torch.rand(sae.b_enc.shape, generator=self.noise)\n"
        + "            shake = shake + torch.rand(sae.b_enc.shape)  # nobody's generator\n"
        + "            scale = 1e-4 * self.drift.mean() * sum(self.window)\n"
        + "            sae.b_enc.add_(scale * (shake - 1))\n",
    ),
)


def stopped(process, steps: int = 1) -> None:
    """SIGTERM once training has logged something, the process's end awaited."""
    (log,) = waited_for(process)
    while log.read_bytes().count(b"\n") < steps:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=300) == 75, process.communicate()
    process.communicate()


def waited_for(process) -> list[Path]:
    """The training log that the process has begun."""
    while not (found := logs_in(process.cache) - process.logs_before):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    return list(found)


def logs_in(cache: Path) -> set[Path]:
    return set(cache.glob("training/*/training_log.jsonl"))


def slow_start(*arguments, cache: Path, **how):
    """start_script() with steps slow enough to be stopped between."""
    slow = "step = experiment.Trainer.step\n"
    slow += "def slow(self, x):\n    import time\n    time.sleep(0.1)\n    return step(self, x)\n"
    slow += "experiment.Trainer.step = slow\n"
    before = logs_in(cache)
    process = start_script(*arguments, cache=cache, patch=slow, **how)
    process.cache, process.logs_before = cache, before
    return process


def test_a_resumed_run_goes_on_with_whatever_the_edit_added(run_edited, tmp_path):
    finished(run_edited(*STATEFUL), tmp_path / "run_1")
    undisturbed = {n: t for n, (t, _) in tree(tmp_path / "run_1/sae").items()}
    (tmp_path / "run_1").rename(tmp_path / "undisturbed")
    stopped(run_edited(*STATEFUL, start=slow_start), steps=10)
    process = run_edited(*STATEFUL)
    assert "going on from the checkpoint of step" in process.stdout
    finished(process, tmp_path / "run_1")
    assert {n: t for n, (t, _) in tree(tmp_path / "run_1/sae").items()} == undisturbed


@pytest.mark.parametrize(
    ("made", "kind"),
    [
        ("open(__file__)", "_io.TextIOWrapper"),
        ("(i for i in range(3))", "generator"),
        ("[0, lambda x: x]", "function"),
    ],
)
def test_state_that_a_checkpoint_would_lose_is_refused_by_name(run_edited, tmp_path, made, kind):
    process = run_edited((STATE, STATE + f"        self.extra = {made}\n"))
    refused(process, "a checkpoint would lose training.trainers.0.extra", f", of type {kind} (")
    assert not (tmp_path / "run_1/final_info.json").exists()


# ── Code that changed ───────────────────────────────────────────────────────────────────────────

OTHER = ("(linear + cosine)", "(linear + cosine * 1.0)")
HARMLESS = (
    ('CONTROL = "run_7"', '\n# A comment, and a blank line.\nCONTROL = "run_7"'),
    ('    "run_2": Run(', '    "run_11": Run("another idea"),\n    "run_2": Run('),
    ('"""All of the way in half of the time, then held."""', '"""Another docstring."""'),
)


def test_a_finished_run_is_refused_to_edited_code_and_to_no_comment(run_edited, tmp_path):
    finished(run_edited(), tmp_path / "run_1")
    before = tree(tmp_path / "run_1")
    refused(run_edited(OTHER), "the code has changed since run_1 was begun: experiment.py")
    process = run_edited(*HARMLESS)
    assert process.returncode == 0
    assert "run_1 is finished" in process.stdout
    assert tree(tmp_path / "run_1") == before


def test_a_stopped_run_is_refused_to_edited_code_and_taken_up_by_its_own(run_edited, tmp_path):
    stopped(run_edited(start=slow_start))
    before = tree(tmp_path / "run_1")
    refused(run_edited(OTHER), "the code has changed since run_1 was begun: experiment.py")
    assert tree(tmp_path / "run_1") == before
    process = run_edited(*HARMLESS)
    assert "going on from the checkpoint of step" in process.stdout
    finished(process, tmp_path / "run_1")


def test_edited_code_takes_up_no_work_of_other_code(run_edited, tmp_path):
    """Not even where the run's folder is gone."""
    stopped(run_edited(start=slow_start))
    (tmp_path / "run_1").rename(tmp_path / "gone")
    process = run_edited(OTHER)
    assert "going on" not in process.stdout
    finished(process, tmp_path / "run_1")


def test_an_sae_is_only_read_by_the_code_that_trained_it(run_edited, tmp_path):
    import sae_lens

    from lab import saved_sae
    from lab.process import ExperimentError

    finished(run_edited(OTHER), tmp_path / "run_1")
    experiment.register_with_sae_lens()
    folder = tmp_path / "run_1/sae/layer_1_seed_0"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saved_sae, "_builds", dict(saved_sae._builds))
        with pytest.raises(
            ExperimentError, match=r"trained by another experiment\.py .* imports as"
        ):
            sae_lens.SAE.load_from_disk(folder)
        sae, _ = as_a_user_loads_it(tmp_path / "run_1")
        assert sae.encode(randn(3, sae.cfg.d_in)).shape == (3, sae.cfg.d_sae)


# ── Errors of the edit's own ────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "error", ["FileNotFoundError(2, 'no such thing', 'x.pt')", "ConnectionError('gone')"]
)
def test_an_error_in_the_edit_keeps_its_traceback_and_gets_no_advice(run_edited, error):
    process = run_edited((AFTER_STEP, AFTER_STEP + f"        raise {error}  # the line\n"))
    assert process.returncode == 1
    assert "Traceback" in process.stderr
    assert "# the line" in process.stderr
    last = process.stderr.splitlines()[-1]
    assert last.startswith(error.split("(")[0])
    assert not any(word in process.stderr for word in ("free space", "check the network"))


def test_the_copies_edited_here_are_the_script_that_is_run(tmp_path):
    assert Path(experiment.__file__).parent == ROOT
    copy = edited(tmp_path) / "experiment.py"
    assert copy.read_bytes() == Path(experiment.__file__).read_bytes()
