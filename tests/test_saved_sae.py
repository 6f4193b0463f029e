"""A saved SAE does to raw activations what the trained one did: equal to a plain computation."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_sae import loop_latents, random_sae, set_by_hand
from tiny import RECIPE, hundred_steps, randn

import experiment
from lab import saved_sae
from lab.activations import Calibration
from lab.identity import experiment_fingerprint
from lab.process import ExperimentError
from lab.saved_sae import check_saved, latents_at_once, load_sae, of_one_seed, read_out, save_saes
from lab.storage import file_sha256

D_IN, D_SAE, SCALE = 4, 7, 0.037  # residuals are 27 times as large as what training saw
FINGERPRINT = experiment_fingerprint(experiment.__file__)
LM = SimpleNamespace(name="a model", d_in=D_IN)
# (norm restored, alpha of either seed): cosine, blends, linear, and the restored cosine.
BLENDS = [(False, [0.0, 0.0]), (False, [0.3, 0.9]), (False, [1.0, 1.0]), (True, [0.0, 0.0])]


@pytest.fixture(autouse=True, scope="module")
def known_to_sae_lens() -> type:
    return experiment.register_with_sae_lens()


class Stub:
    """A trainer at its end: two seeds in the middle of nowhere, with or without an average."""

    layer, units = 3, Calibration(SCALE, torch.zeros(D_IN), 100.0, 0.0)

    def __init__(self, restored: bool, alphas: list[float], unit_rows: bool, average: bool = False):
        self.sae, self.alphas = random_sae(restored=restored), alphas
        if unit_rows:
            self.sae.normalize_()
        run = experiment.RUNS["run_10" if restored else "run_1"]
        self.settings = {"run": asdict(run), "recipe": asdict(RECIPE)}
        self.average = experiment.WeightAverage(self.sae.parameters()) if average else None
        if average:
            for kept in self.average.average:
                kept.mul_(0.8)

    def averaged(self):
        return self.average.applied() if self.average else contextlib.nullcontext()

    def final_alphas(self) -> list[float]:
        return self.alphas


def saved(trainer, folder: Path, experiment_of: str = FINGERPRINT) -> list[Path]:
    """The folders of its SAEs, by seed."""
    scale = replace(hundred_steps(), d_sae=D_SAE)
    found = save_saes(scale, LM, [trainer], folder, "run_x", experiment_of, trainer.settings)
    assert list(found) == [trainer.layer]
    return list(found[trainer.layer].values())


def raw_rows(n: int = 50) -> torch.Tensor:
    return 25 * randn(n, D_IN)


@torch.no_grad()
def plain(sae, seed: int, alpha: float, x: torch.Tensor, scale: float = SCALE) -> SimpleNamespace:
    """From the trained tensors of one seed, in float64 and latent by latent, in residual units."""
    w = {name: p.detach().double() for name, p in sae.named_parameters()}
    weights = (w[name][seed : seed + 1] for name in ("b_dec", "W_enc", "gate", "b_enc"))
    f = loop_latents(x[None] * scale, *weights, alpha, sae.run.norm_restored)[0]
    norm_F = w["W_dec"][seed].norm(dim=-1)
    return SimpleNamespace(
        latents=f * norm_F / scale,
        reconstructions=(f @ w["W_dec"][seed] + w["b_dec"][seed]) / scale,
        W_dec=w["W_dec"][seed] / norm_F[:, None],
        b_dec=w["b_dec"][seed] / scale,
        b_enc=w["b_enc"][seed] * norm_F / scale,
        norm_F=norm_F,
    )


def assert_close(found: torch.Tensor, expected: torch.Tensor, error: float = 1e-5) -> None:
    assert found.shape == expected.shape
    assert expected.norm() > 0
    assert ((found.double() - expected).norm() / expected.norm()).item() < error


# ── What it computes ────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("unit_rows", [True, False])
@pytest.mark.parametrize(("restored", "alphas"), BLENDS)
def test_a_saved_sae_does_to_raw_activations_what_the_trained_one_does(
    restored, alphas, unit_rows, seed, tmp_path
):
    import sae_lens

    trainer, x = Stub(restored, alphas, unit_rows), raw_rows()
    sae = sae_lens.SAE.load_from_disk(saved(trainer, tmp_path)[seed])
    expected = plain(trainer.sae, seed, alphas[seed], x)
    assert unit_rows == bool((expected.norm_F - 1).abs().max() < 1e-5)
    assert 0.1 < (expected.latents > 0).double().mean() < 0.9
    found = sae.encode(x)
    assert_close(found, expected.latents)
    assert_close(sae.decode(found), expected.reconstructions)
    assert_close(sae(x), expected.reconstructions)
    # What SAE-Bench takes apart: a sum of unit rows.
    assert_close(found @ sae.W_dec + sae.b_dec, expected.reconstructions)
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(D_SAE))
    # Any leading shape will do.
    torch.testing.assert_close(sae.encode(x[:6].view(2, 3, -1)).view(6, -1), found[:6])
    torch.testing.assert_close(
        sae.decode(found[:6].view(2, 3, -1)).view(6, -1), sae.decode(found[:6])
    )


@torch.no_grad()
def test_without_the_change_of_units_a_blend_would_be_another(tmp_path):
    """The test above would be empty if alpha 0.3 meant the same in any units."""
    trainer, x = Stub(False, [0.3, 0.9], True), raw_rows()
    sae = load_sae(saved(trainer, tmp_path)[0])
    assert sae.cfg.activation_scale == SCALE
    unconverted = plain(trainer.sae, 0, 0.3, x, scale=1.0).latents
    assert (unconverted - sae.encode(x)).norm() > 0.1 * unconverted.norm()


@torch.no_grad()
@pytest.mark.parametrize("seed", [0, 1])
def test_a_saved_sae_gives_the_training_saes_latents_in_residual_units(trained, seed):
    """A really trained one, with its average."""
    folder = list(trained.saved.values())[seed]
    sae = load_sae(folder)
    trainer, scale = trained.trainer, trained.trainer.units.scale
    x = trained.lm.residuals(trained.heldout)[1].float().flatten(0, 1)
    norms = x.norm(dim=-1)
    x = x[norms <= trainer.units.outlier_norm][:64]
    alpha = trained.run.alpha_end
    assert sae.cfg.alpha == pytest.approx(alpha, abs=1e-12)
    with trainer.average.applied():
        expected = plain(trainer.sae, seed, alpha, x, scale)
    found = sae.encode(x)
    # Averaged unit rows are shorter; SAE-Bench needs unit rows, so latents take up the norm.
    assert expected.norm_F.max() < 0.999
    assert_close(found, expected.latents)
    assert_close(sae.decode(found), expected.reconstructions)
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(96), rtol=0, atol=1e-6)
    # Not in training units: those are at least twice smaller here, so a missing fold would show.
    assert scale < 0.5
    assert max(check_saved(trainer, folder, seed, x).values()) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("unit_rows", [True, False])
@pytest.mark.parametrize(("restored", "alphas"), BLENDS)
def test_the_weights_that_sae_lens_shows_are_in_residual_units(
    restored, alphas, unit_rows, seed, tmp_path
):
    trainer = Stub(restored, alphas, unit_rows)
    sae = load_sae(saved(trainer, tmp_path)[seed])
    # The tokens that every blend sees as a linear encoder does: their distance is 1 in training.
    directions = torch.nn.functional.normalize(randn(40, D_IN), dim=-1)
    x = (directions + trainer.sae.b_dec[seed]) / SCALE
    if alphas[seed] == 1.0:
        x = raw_rows()
    expected = plain(trainer.sae, seed, alphas[seed], x)
    assert_close(sae.W_dec, expected.W_dec)
    assert_close(sae.b_dec, expected.b_dec)
    assert_close(sae.b_enc, expected.b_enc)
    assert sae.W_enc.shape == (D_IN, D_SAE)
    assert_close(((x - sae.b_dec) @ sae.W_enc + sae.b_enc).relu(), expected.latents)


def test_a_saved_sae_can_be_differentiated_by_its_input_as_attributions_need(trained):
    sae = load_sae(next(iter(trained.saved.values()))).to(dtype=torch.float64)
    x = trained.lm.residuals(trained.heldout[:1])[1][0, 1:4].double().requires_grad_()
    assert (sae.encode(x) > 0).any()
    assert torch.autograd.gradcheck(sae.encode, (x,))


# ── As SAELens has it ───────────────────────────────────────────────────────────────────────────


@torch.no_grad()
@pytest.mark.parametrize(("restored", "alphas"), BLENDS)
def test_sae_lens_saves_it_again_and_reads_the_same(restored, alphas, tmp_path):
    import sae_lens

    x = raw_rows()
    sae = load_sae(saved(Stub(restored, alphas, False), tmp_path / "ours")[1])
    sae.save_model(tmp_path / "again")
    again = sae_lens.SAE.load_from_disk(tmp_path / "again")
    assert torch.equal(again.encode(x), sae.encode(x))
    assert torch.equal(again(x), sae(x))
    assert again.cfg.to_dict() == sae.cfg.to_dict()
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        assert torch.equal(getattr(again, name), getattr(sae, name)), name


ROUNDING = {"float16": 2**-11, "bfloat16": 2**-8}


@torch.no_grad()
@pytest.mark.parametrize("loaded", [True, False], ids=["loaded in it", "converted"])
@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize(("restored", "alphas"), BLENDS)
def test_in_half_precision_it_stays_within_rounding(restored, alphas, dtype, loaded, tmp_path):
    import sae_lens

    trainer, x = Stub(restored, alphas, False), raw_rows(400)
    (folder, _), half = saved(trainer, tmp_path), getattr(torch, dtype)
    sae = sae_lens.SAE.load_from_disk(folder, **({"dtype": dtype} if loaded else {}))
    sae = sae if loaded else sae.to(dtype=half)
    expected = plain(trainer.sae, 0, alphas[0], x)
    found, limit = sae.encode(x), 6 * ROUNDING[dtype]
    assert found.dtype == half and sae.dtype == half
    assert_close(found, expected.latents, limit)
    x_hat = sae(x)
    assert x_hat.dtype == half
    assert_close(x_hat, expected.reconstructions, limit)
    for name in ("W_dec", "b_enc", "b_dec"):
        assert getattr(sae, name).dtype == half
        assert_close(getattr(sae, name), getattr(expected, name), 2 * ROUNDING[dtype])
    assert_close(found.float() @ sae.W_dec.float() + sae.b_dec, expected.reconstructions, limit)


@torch.no_grad()
def test_its_hooks_see_what_goes_in_the_latents_and_the_reconstruction_and_can_change_them(
    tmp_path,
):
    sae, x = load_sae(saved(Stub(False, [0.3, 0.9], False), tmp_path)[0]), raw_rows()
    output, cache = sae.run_with_cache(x)
    assert torch.equal(cache["hook_sae_input"], x)
    assert torch.equal(cache["hook_sae_acts_post"], sae.encode(x))
    assert torch.equal(cache["hook_sae_recons"], output)
    assert torch.equal(cache["hook_sae_output"], output)
    assert "hook_sae_acts_pre" not in cache

    def without_latent_2(acts, hook):
        acts[..., 2] = 0
        return acts

    with sae.hooks(fwd_hooks=[("hook_sae_acts_post", without_latent_2)]):
        ablated = sae(x)
    gone = sae.encode(x)[:, 2:3] * sae.W_dec[2]
    assert gone.norm() > 0
    torch.testing.assert_close(output - ablated, gone, rtol=1e-3, atol=1e-3)
    with sae.hooks(fwd_hooks=[("hook_sae_input", lambda x, hook: x * 0)]):
        assert torch.equal(sae.encode(x), sae.encode(0 * x))
    # The error term adds what the reconstruction lacks, and keeps the difference of an ablation.
    sae.use_error_term = True
    torch.testing.assert_close(sae(x), x, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_folding_the_decoders_norm_is_harmless(tmp_path):
    import sae_lens

    (folder, _), x = saved(Stub(False, [0.3, 0.9], False), tmp_path), raw_rows()
    sae = load_sae(folder)
    before = sae.encode(x), sae(x)
    sae.fold_W_dec_norm()
    folded = sae_lens.SAE.load_from_disk(folder, fold_W_dec_norm=True)
    for one in (sae, folded):
        assert torch.equal(one.encode(x), before[0]) and torch.equal(one(x), before[1])


def test_its_configuration_says_where_it_belongs(tmp_path):
    folder = saved(Stub(False, [0.3, 0.9], False), tmp_path)[1]
    cfg = json.loads((folder / "cfg.json").read_text())
    assert (cfg["d_in"], cfg["d_sae"], cfg["dtype"]) == (D_IN, D_SAE, "float32")
    assert (cfg["alpha"], cfg["activation_scale"]) == (0.9, SCALE)
    assert cfg["experiment"] == FINGERPRINT
    assert cfg["settings"]["run"] == json.loads(json.dumps(asdict(experiment.RUNS["run_1"])))
    assert cfg["settings"]["recipe"] == asdict(RECIPE)
    metadata = load_sae(folder).cfg.metadata
    assert (metadata.model_name, metadata.hook_name) == ("a model", "blocks.3.hook_resid_post")
    assert metadata.prepend_bos is True and metadata.context_size == 128


def test_an_sae_of_another_experiment_is_refused_with_how_to_read_it(tmp_path):
    import sae_lens

    (folder, _) = saved(Stub(False, [0.3, 0.9], False), tmp_path, experiment_of="0123456789abcdef")
    for load in (load_sae, sae_lens.SAE.load_from_disk):
        with pytest.raises(ExperimentError, match=r"trained by another experiment\.py") as error:
            load(folder)
        for text in ("0123456789abcdef", FINGERPRINT, "experiment.register_with_sae_lens()"):
            assert text in str(error.value)


# ── What is saved ───────────────────────────────────────────────────────────────────────────────


def test_every_seed_is_saved_under_its_weights_hash_in_the_order_of_the_seeds(tmp_path):
    trainer, scale = Stub(False, [0.3, 0.9], False), replace(hundred_steps(), d_sae=D_SAE)
    one = save_saes(scale, LM, [trainer], tmp_path, "run_x", FINGERPRINT, trainer.settings)[3]
    for seed, (name, folder) in enumerate(one.items()):
        digest = file_sha256(folder / "sae_weights.safetensors")[:12]
        assert name == f"run_x_layer_3_seed_{seed}_{digest}"
        assert folder == tmp_path / f"layer_3_seed_{seed}"
        assert load_sae(folder).cfg.alpha == trainer.alphas[seed]
    set_by_hand(trainer.sae, b_enc=[[0.5] * D_SAE] * 2)
    other = save_saes(scale, LM, [trainer], tmp_path, "run_x", FINGERPRINT, trainer.settings)[3]
    assert not one.keys() & other.keys(), "other weights have another name"


def test_the_average_is_saved_and_the_weights_of_the_moment_beside_it(tmp_path):
    trainer = Stub(False, [0.3, 0.9], True, average=True)
    own = {name: p.detach().clone() for name, p in trainer.sae.named_parameters()}
    for seed, folder in enumerate(saved(trainer, tmp_path)):
        raw, averaged = (load_file(folder / f"{n}.safetensors") for n in ("raw", "sae_weights"))
        assert raw.keys() == averaged.keys() == {f"trained.{name}" for name in own}
        for name, p in own.items():
            assert torch.equal(raw[f"trained.{name}"], p[seed : seed + 1]), name
            torch.testing.assert_close(averaged[f"trained.{name}"], 0.8 * p[seed : seed + 1])
    assert all(torch.equal(p, own[name]) for name, p in trainer.sae.named_parameters())


def test_what_is_saved_is_a_copy_that_further_training_does_not_change(tmp_path):
    trainer, x = Stub(False, [0.3, 0.9], False), raw_rows()
    taken = of_one_seed(trainer.sae, 0, 2)
    before = {name: w.clone() for name, w in taken.items()}
    sae = load_sae(saved(trainer, tmp_path)[0])
    latents = sae.encode(x)
    with torch.no_grad():
        for p in trainer.sae.parameters():
            p.add_(1)
    names = ("W_enc", "W_dec", "gate", "b_enc", "b_dec")
    assert set(taken) == {f"trained.{name}" for name in names}
    for name, w in taken.items():
        assert torch.equal(w, before[name]) and not w.requires_grad and w.is_contiguous(), name
    assert torch.equal(sae.encode(x), latents)
    assert torch.equal(load_sae(tmp_path / "layer_3_seed_0").encode(x), latents)


class WithBuffers(experiment.BlendedSAE):
    """A temperature of each seed, a gain that all of them share, and a count: three more tensors.

    The count goes into the latents as a whole number, which half precision has to keep."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        S = len(self.W_dec)
        self.register_buffer("temperature", torch.arange(1.0, S + 1)[:, None, None])
        self.register_buffer("shared", torch.linspace(0.5, 1.5, D_SAE))
        self.register_buffer("count", torch.tensor(1001))

    def encode(self, x, alphas, dtype):
        assert self.count.dtype == torch.int64
        f = super().encode(x, alphas, dtype)
        return f * self.temperature.to(dtype) * self.shared.to(dtype) * (self.count % 1000)


@pytest.fixture
def with_buffers(monkeypatch) -> Iterator[Stub]:
    def build(d_in: int, d_sae: int, run: dict, recipe: dict) -> WithBuffers:
        values = {name: tuple(v) if isinstance(v, list) else v for name, v in run.items()}
        return WithBuffers(experiment.Run(**values), experiment.Recipe(**recipe), d_in, d_sae)

    monkeypatch.setattr(saved_sae, "_builds", dict(saved_sae._builds))
    saved_sae.register("buffers", build)
    trainer = Stub(False, [0.3, 0.9], False)
    with_more = WithBuffers(experiment.RUNS["run_1"], RECIPE, D_IN, D_SAE, (1, 2))
    with_more.load_state_dict(trainer.sae.state_dict(), strict=False)
    trainer.sae = with_more
    return trainer


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_buffers_belong_to_the_saved_sae_too_those_of_a_seed_and_those_of_all(
    with_buffers, dtype, tmp_path
):
    import sae_lens

    x = raw_rows()
    for seed, folder in enumerate(saved(with_buffers, tmp_path, "buffers")):
        with_buffers.sae.restored = False
        expected = plain(with_buffers.sae, seed, [0.3, 0.9][seed], x)
        sae = sae_lens.SAE.load_from_disk(folder, dtype=dtype)
        f = expected.latents * (seed + 1) * with_buffers.sae.shared
        assert_close(sae.encode(x), f, 1e-5 if dtype == "float32" else 6 * ROUNDING[dtype])
        assert sae.trained.count.item() == 1001
        if dtype == "float32":
            assert max(check_saved(with_buffers, folder, seed, x).values()) < 1e-6


# ── Reading out with another alpha ──────────────────────────────────────────────────────────────


@torch.no_grad()
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_reading_out_with_another_alpha_changes_alpha_alone(alpha, tmp_path):
    trainer, x = Stub(False, [0.3, 0.9], False), raw_rows()
    sae = load_sae(saved(trainer, tmp_path)[0])
    swapped = read_out(sae, alpha)
    assert (sae.cfg.alpha, swapped.cfg.alpha) == (0.3, alpha)
    assert swapped.trained is sae.trained, "the weights are shared"
    expected = plain(trainer.sae, 0, alpha, x)
    assert_close(swapped.encode(x), expected.latents)
    assert_close(swapped(x), expected.reconstructions)
    assert_close(sae.encode(x), plain(trainer.sae, 0, 0.3, x).latents)


@torch.no_grad()
def test_the_encoder_that_a_read_out_shows_is_that_of_its_own_alpha(tmp_path):
    trainer, x = Stub(False, [0.3, 0.9], False), raw_rows()
    swapped = read_out(load_sae(saved(trainer, tmp_path)[0]), 1.0)
    latents = ((x - swapped.b_dec) @ swapped.W_enc + swapped.b_enc).relu()
    assert_close(latents, plain(trainer.sae, 0, 1.0, x).latents)


@torch.no_grad()
def test_read_outs_of_one_sae_are_encoded_together_and_as_each_would_be_alone(tmp_path):
    trainer, x = Stub(False, [0.3, 0.9], False), raw_rows()
    first, second = map(load_sae, saved(trainer, tmp_path))
    saes = [first, second, read_out(first, 0.0), read_out(first, 1.0)]
    passes = []
    for sae in (first, second):
        encode = sae.trained.encode
        sae.trained.encode = lambda x, alphas, dtype, encode=encode: (
            passes.append(alphas),
            encode(x, alphas, dtype),
        )[1]
    found = {id(sae): latents for sae, latents in latents_at_once(saes, x)}
    assert sorted(passes) == [[0.3, 0.0, 1.0], [0.9]]
    assert len(found) == len(saes)
    for sae, (seed, alpha) in zip(saes, [(0, 0.3), (1, 0.9), (0, 0.0), (0, 1.0)], strict=True):
        assert_close(found[id(sae)], plain(trainer.sae, seed, alpha, x).latents)


# ── The check after training ────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize(("restored", "alphas"), BLENDS)
def test_a_saved_sae_that_computes_what_was_trained_passes_the_check(
    restored, alphas, average, tmp_path
):
    trainer = Stub(restored, alphas, not average, average)
    for seed, folder in enumerate(saved(trainer, tmp_path)):
        assert max(check_saved(trainer, folder, seed, raw_rows()).values()) < 1e-6


def edit_config(folder: Path, **changes) -> None:
    path = folder / "cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, **changes) -> None:
    """changes: {parameter: function of it}."""
    weights = load_file(folder / "sae_weights.safetensors")
    for name, change in changes.items():
        weights[f"trained.{name}"] = change(weights[f"trained.{name}"]).contiguous()
    save_file(weights, folder / "sae_weights.safetensors")


WRONG = {
    "another alpha": lambda folder: edit_config(folder, alpha=0.31),
    "other units": lambda folder: edit_config(folder, activation_scale=SCALE * 1.001),
    "a weight": lambda folder: edit_weights(folder, W_enc=lambda w: w * 1.001),
    "a bias": lambda folder: edit_weights(folder, b_enc=lambda b: b + 1e-3),
    "a gate": lambda folder: edit_weights(folder, gate=lambda g: g * 1.001),
    "a decoder": lambda folder: edit_weights(folder, W_dec=lambda w: w.roll(1, -1)),
    "another seed": lambda folder: save_file(
        load_file(folder.with_name("layer_3_seed_1") / "sae_weights.safetensors"),
        folder / "sae_weights.safetensors",
    ),
    "the weights of the moment": lambda folder: save_file(
        load_file(folder / "raw.safetensors"), folder / "sae_weights.safetensors"
    ),
}


@pytest.mark.parametrize("wrong", sorted(WRONG))
def test_a_saved_sae_that_computes_something_else_is_refused_by_how_much(wrong, tmp_path):
    trainer = Stub(False, [0.3, 0.9], True, average=True)
    folder = saved(trainer, tmp_path)[0]
    check_saved(trainer, folder, 0, raw_rows())
    WRONG[wrong](folder)
    with pytest.raises(ExperimentError, match="does not compute what was trained") as error:
        check_saved(trainer, folder, 0, raw_rows())
    assert "layer_3_seed_0" in str(error.value)
    assert "nothing was evaluated" in str(error.value)


def test_an_sae_whose_code_holds_something_beside_its_state_is_refused(tmp_path, monkeypatch):
    """What hangs on the object and not on its state, run or recipe is not there after loading."""
    trainer = Stub(False, [0.3, 0.9], True)
    trainer.sae.temperature = 1.3
    encode = experiment.BlendedSAE.encode

    def warmer(self, x, alphas, dtype):
        return encode(self, x, alphas, dtype) * getattr(self, "temperature", 1.0)

    monkeypatch.setattr(experiment.BlendedSAE, "encode", warmer)
    with pytest.raises(ExperimentError, match=r"its latents differ by 0\.2"):
        check_saved(trainer, saved(trainer, tmp_path)[0], 0, raw_rows())


def test_a_decoder_that_is_not_linear_is_refused(tmp_path, monkeypatch):
    decode = experiment.BlendedSAE.decode
    monkeypatch.setattr(
        experiment.BlendedSAE, "decode", lambda self, f: decode(self, f + 0.1 * f.square())
    )
    trainer = Stub(False, [0.3, 0.9], True)
    with pytest.raises(ExperimentError, match=r"f @ W_dec .* must be linear in the latents"):
        check_saved(trainer, saved(trainer, tmp_path)[0], 0, raw_rows())


def test_an_encoder_whose_alphas_disturb_each_other_is_refused(tmp_path, monkeypatch):
    encode = experiment.BlendedSAE.encode

    def crosswise(self, x, alphas, dtype):
        f = encode(self, x, alphas, dtype)
        return f if len(alphas) == len(self.W_dec) else f.flip(0)

    monkeypatch.setattr(experiment.BlendedSAE, "encode", crosswise)
    trainer = Stub(False, [0.3, 0.9], True)
    with pytest.raises(ExperimentError, match="read out with alpha 0 and 1 at once"):
        check_saved(trainer, saved(trainer, tmp_path)[0], 0, raw_rows())
