"""BlendedSAE: numbers worked out by hand, and a plain loop in float64 beside it."""

import pytest
import torch
from tiny import RECIPE, randn

import experiment

BLEND, RESTORED = experiment.RUNS["run_1"], experiment.RUNS["run_10"]
ALPHAS = [0.0, 0.1, 0.5, 0.9, 1.0]


def one_token() -> dict:
    """x_c = (3, 4), so r = 5; columns (1, 0) and (0, 2), so c = (0.6, 0.8) and x_c . w = (3, 8)."""
    return {
        "x": torch.tensor([[[4.0, 2.0]]]),
        "b_dec": torch.tensor([[1.0, -2.0]]),
        "W_enc": torch.tensor([[[1.0, 0.0], [0.0, 2.0]]]),
        "gate": torch.tensor([[2.0, 0.5]]),
        "b_enc": torch.tensor([[0.1, -0.2]]),
    }


def random_parts(S=2, B=5, D=4, F=7, seed=0) -> dict:
    g = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(S, B, D, generator=g),
        "b_dec": 0.2 * torch.randn(S, D, generator=g),
        "W_enc": torch.randn(S, D, F, generator=g),
        "gate": torch.rand(S, F, generator=g) + 0.5,
        "b_enc": torch.randn(S, F, generator=g) * 0.3,
    }


def per_seed(value: float | torch.Tensor, seed: int) -> torch.Tensor:
    """A float, or a tensor [S, 1, 1], as one seed sees it, in float64."""
    return value[seed, 0, 0].double() if isinstance(value, torch.Tensor) else torch.tensor(value)


def loop_pre_activations(x, b_dec, W_enc, gate, b_enc, alpha) -> torch.Tensor:
    """The equation of the design, one latent of one token of one seed at a time, in float64."""
    x, b_dec, W_enc, gate, b_enc = (t.double() for t in (x, b_dec, W_enc, gate, b_enc))
    z = []
    for s in range(len(x)):
        a = per_seed(alpha, s)
        for token in x[s]:
            for i in range(W_enc.shape[-1]):
                x_c, w = token - b_dec[s], W_enc[s, :, i]
                r, linear = x_c.norm(), x_c @ w
                cosine = linear / (r * w.norm())
                z.append(gate[s, i] * ((1 - a) * cosine + a * linear) + b_enc[s, i])
    return torch.stack(z).reshape(*x.shape[:2], W_enc.shape[-1])


def loop_latents(x, b_dec, W_enc, gate, b_enc, alpha, restored=False) -> torch.Tensor:
    """What fires, in float64; with the norm restored each token's latents times its distance."""
    f = loop_pre_activations(x, b_dec, W_enc, gate, b_enc, alpha).clamp(0)
    if not restored:
        return f
    x, b_dec = x.double(), b_dec.double()
    r = [(token - b_dec[s]).norm() for s in range(len(x)) for token in x[s]]
    rows = [norm * row for norm, row in zip(r, f.flatten(0, 1), strict=True)]
    return torch.stack(rows).view_as(f)


def fresh_sae(seeds=(1, 2), d_in=4, d_sae=7, restored=False, **start) -> experiment.BlendedSAE:
    run = RESTORED if restored else BLEND
    return experiment.BlendedSAE(run, RECIPE, d_in, d_sae, seeds=seeds, **start)


def random_sae(seeds=(1, 2), d_in=4, d_sae=7, restored=False, seed=0) -> experiment.BlendedSAE:
    """An SAE in the middle of training: nothing is at its initial value."""
    g = torch.Generator().manual_seed(seed)
    b_dec = torch.randn(d_in, generator=g)
    sae = fresh_sae(seeds, d_in, d_sae, restored, b_dec=b_dec)
    with torch.no_grad():
        for name, p in sae.named_parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=g))
            if name == "gate":
                p.add_(0.5)
    return sae


def of_each(alphas: list[float]) -> float | torch.Tensor:
    """Alphas of the seeds as pre_activations() and the plain loop take them."""
    return torch.tensor(alphas, dtype=torch.float64)[:, None, None]


def set_by_hand(sae: experiment.BlendedSAE, **values) -> None:
    with torch.no_grad():
        for name, value in values.items():
            getattr(sae, name).copy_(torch.tensor(value))


# ── Pre-activations ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize(
    ("alpha", "z"),
    [
        (0.0, [2 * 0.6 + 0.1, 0.5 * 0.8 - 0.2]),
        (0.5, [2 * (0.5 * 0.6 + 0.5 * 3) + 0.1, 0.5 * (0.5 * 0.8 + 0.5 * 8) - 0.2]),
        (1.0, [2 * 3 + 0.1, 0.5 * 8 - 0.2]),
    ],
)
def test_pre_activations_have_the_values_worked_out_by_hand(alpha, z, as_tensor):
    alpha = torch.full((1, 1, 1), alpha) if as_tensor else alpha
    found = experiment.pre_activations(**one_token(), alpha=alpha)
    assert found.flatten().tolist() == pytest.approx(z, abs=1e-5)


@pytest.mark.parametrize("alpha", [*ALPHAS, torch.tensor([0.2, 0.8])[:, None, None]])
def test_pre_activations_agree_with_a_plain_loop(alpha):
    parts = random_parts()
    found, loop = experiment.pre_activations(**parts, alpha=alpha), loop_pre_activations
    torch.testing.assert_close(found.double(), loop(**parts, alpha=alpha), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0, torch.tensor([0.2, 1.0])[:, None, None]])
def test_the_gradient_of_pre_activations_is_that_of_finite_differences(alpha):
    parts = {name: t.double() for name, t in random_parts(B=3, D=3, F=4).items()}
    x = parts.pop("x")  # data
    for t in parts.values():
        t.requires_grad_()
    alpha = alpha.double() if isinstance(alpha, torch.Tensor) else alpha

    def z(*values):
        named = dict(zip(parts, values, strict=True))
        return experiment.pre_activations(x, **named, alpha=alpha)

    assert torch.autograd.gradcheck(z, (*parts.values(),))


@pytest.mark.parametrize("alpha", ALPHAS)
def test_alpha_only_decides_how_much_of_the_norm_gets_through(alpha):
    """z = g c [(1 - alpha) + alpha r ||w||] + b: the sign of a score never depends on alpha."""
    parts = random_parts(seed=3)
    x_c, W_enc = (parts["x"] - parts["b_dec"][:, None]).double(), parts["W_enc"].double()
    r, w = x_c.norm(dim=-1, keepdim=True), W_enc.norm(dim=1, keepdim=True)
    c = (x_c @ W_enc) / (r * w)
    gate, b_enc = parts["gate"].double()[:, None], parts["b_enc"].double()[:, None]
    identity = gate * c * ((1 - alpha) + alpha * r * w) + b_enc
    found = experiment.pre_activations(**parts, alpha=alpha)
    torch.testing.assert_close(found.double(), identity, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_leaving_out_the_idle_half_changes_nothing(alpha):
    parts = random_parts(seed=4)
    as_float = experiment.pre_activations(**parts, alpha=alpha)
    as_tensor = experiment.pre_activations(**parts, alpha=torch.full((2, 1, 1), alpha))
    torch.testing.assert_close(as_float, as_tensor, rtol=1e-6, atol=1e-6)


def test_the_cosine_ignores_the_length_of_tokens_and_of_columns_and_the_linear_score_does_not():
    parts = random_parts(seed=5)
    longer = {name: parts[name] * n for name, n in (("x", 7), ("b_dec", 7), ("W_enc", 3))}
    longer = parts | longer
    score = {
        (alpha, name): experiment.pre_activations(**p, alpha=alpha) - p["b_enc"][:, None]
        for alpha in (0.0, 1.0)
        for name, p in (("own", parts), ("longer", longer))
    }
    torch.testing.assert_close(score[0.0, "longer"], score[0.0, "own"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(score[1.0, "longer"], 21 * score[1.0, "own"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_a_token_at_b_dec_and_a_dead_column_give_the_bias_and_not_nan(alpha):
    parts = random_parts(seed=6)
    parts["x"][:, 0] = parts["b_dec"]
    parts["W_enc"][:, :, 0] = 0
    z = experiment.pre_activations(**parts, alpha=alpha)
    assert z.isfinite().all()
    assert torch.equal(z[:, 0], parts["b_enc"])
    assert torch.equal(z[:, :, 0], parts["b_enc"][:, :1].expand(-1, 5))


# ── The module ──────────────────────────────────────────────────────────────────────────────────


def test_initial_values_are_those_of_the_design():
    b_dec = torch.tensor([1.0, 2.0, 3.0, 4.0])
    sae = fresh_sae([5, 6], b_dec=b_dec)
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(2, 7))
    assert torch.equal(sae.W_enc, sae.W_dec.transpose(1, 2))
    assert torch.equal(sae.gate, torch.full((2, 7), RECIPE.gate_init)), "one constant, not data"
    assert RECIPE.gate_init == 0.2
    assert torch.equal(sae.b_enc, torch.zeros(2, 7))
    assert torch.equal(sae.b_dec, b_dec.expand(2, 4))
    assert not torch.equal(sae.W_dec[0], sae.W_dec[1])
    assert torch.equal(fresh_sae().b_dec, torch.zeros(2, 4)), "unless told where"
    trained = {name for name, p in sae.named_parameters() if p.requires_grad}
    assert trained == {"W_enc", "W_dec", "b_enc", "b_dec", "gate"}


def test_encoder_and_decoder_do_not_share_memory():
    b_dec = torch.zeros(4)
    sae = fresh_sae([5], b_dec=b_dec)
    before = sae.W_enc.detach().clone()
    with torch.no_grad():
        sae.W_dec.mul_(2)
        sae.b_dec[0] += 1
    assert torch.equal(sae.W_enc, before)
    assert torch.equal(b_dec, torch.zeros(4)), "nor with what it started from"


@torch.no_grad()
def test_restoring_the_norm_gives_latents_worked_out_by_hand():
    parts, restored = one_token(), fresh_sae([0], d_in=2, d_sae=2, restored=True)
    set_by_hand(restored, **{k: v.tolist() for k, v in parts.items() if k != "x"})
    f = restored.encode(parts["x"], [0.0], torch.float32)
    # r = 5, and ReLU(z) = (2 * 0.6 + 0.1, 0.5 * 0.8 - 0.2)
    assert f.flatten().tolist() == pytest.approx([5 * 1.3, 5 * 0.2])


@torch.no_grad()
def test_restoring_the_norm_moves_no_latent_across_its_threshold_and_scales_with_the_token():
    sae, cosine = random_sae(restored=True), random_sae()
    directions = torch.nn.functional.normalize(randn(2, 30, 4), dim=-1)
    near, far = (n * directions + sae.b_dec[:, None] for n in (1.0, 3.0))
    f, longer = (sae.encode(x, [0.0, 0.0], torch.float32) for x in (near, far))
    alone = cosine.encode(far, [0.0, 0.0], torch.float32)
    assert torch.equal(longer > 0, alone > 0), "the cosine decides what fires"
    torch.testing.assert_close(longer, 3 * f, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(longer, 3 * alone, rtol=1e-4, atol=1e-5)


def test_forward_has_the_values_worked_out_by_hand():
    sae = fresh_sae([0, 1], d_in=2, d_sae=3, b_dec=torch.tensor([1.0, 0.0]))
    set_by_hand(
        sae,
        W_enc=[[[1.0, 0.0, -1.0], [0.0, 2.0, 0.0]]] * 2,
        W_dec=[[[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]] * 2,
        gate=[[2.0, 0.5, 1.0]] * 2,
        b_enc=[[0.1, -0.2, -5.0], [0.0, -9.0, -5.0]],
    )
    x = torch.tensor([[4.0, 4.0], [1.0, -2.0]])
    # Seed 0, token 0: x_c = (3, 4), f = (3.7, 2, 0), x_hat = (4.7, 2), squared error 0.49 + 4.
    #         token 1: x_c = (0, -2), f = (0.1, 0, 0), x_hat = (1.1, 0), squared error 0.01 + 4.
    # Seed 1, token 0: f = (3.6, 0, 0), x_hat = (4.6, 0), squared error 0.36 + 16.
    #         token 1: f = 0, x_hat = (1, 0), squared error 4.
    f = sae.encode(x, [0.5, 0.5], torch.float32)
    x_hat = torch.tensor([[[4.7, 2.0], [1.1, 0.0]], [[4.6, 0.0], [1.0, 0.0]]])
    torch.testing.assert_close(f[0], torch.tensor([[3.7, 2.0, 0.0], [0.1, 0.0, 0.0]]))
    torch.testing.assert_close(f[1], torch.tensor([[3.6, 0.0, 0.0], [0.0, 0.0, 0.0]]))
    torch.testing.assert_close(sae.decode(f), x_hat)
    found = sae(x, [0.5, 0.5], torch.tensor([0.1, 0.2]))
    assert found.mse_S.tolist() == pytest.approx([4.25, 10.18])
    assert found.l1_S.tolist() == pytest.approx([2.9, 1.8])
    assert found.l0_S.tolist() == pytest.approx([1.5, 0.5])
    assert found.loss_S.tolist() == pytest.approx([4.25 + 0.1 * 2.9, 10.18 + 0.2 * 1.8])
    assert found.fired_SF.tolist() == [[True, True, False], [True, False, False]]


BLENDS = [(False, [a, a]) for a in (0.0, 0.4, 1.0)] + [(False, [0.2, 0.8]), (False, [1.0, 0.3])]


@pytest.mark.parametrize(("restored", "alphas"), [*BLENDS, (True, [0.0, 0.0])])
def test_loss_and_gradients_agree_with_a_plain_loop(restored, alphas):
    sae, lambda_S = random_sae(restored=restored), torch.tensor([0.05, 0.3])
    x = randn(9, 4)
    found = sae(x, alphas, lambda_S)
    found.loss_S.sum().backward()
    assert 0.2 < (found.l0_S / 7).mean() < 0.8, "some latents fire and some do not"

    p = {n: t.detach().double().requires_grad_(t.requires_grad) for n, t in sae.named_parameters()}
    weights = (p[name] for name in ("b_dec", "W_enc", "gate", "b_enc"))
    x_S = x.expand(2, -1, -1)
    f = loop_latents(x_S, *weights, of_each(alphas), restored)
    loss_S = []
    for s in range(2):
        per_token = []
        for b in range(len(x)):
            x_hat = sum(f[s, b, i] * p["W_dec"][s, i] for i in range(7)) + p["b_dec"][s]
            per_token.append(((x[b] - x_hat) ** 2).sum() + lambda_S[s].double() * f[s, b].sum())
        loss_S.append(sum(per_token) / len(x))
    sum(loss_S).backward()
    torch.testing.assert_close(found.loss_S.double(), torch.stack(loss_S), rtol=1e-5, atol=1e-6)
    for name, own in sae.named_parameters():
        assert own.requires_grad or own.grad is None, name
        # None is the gradient of what alpha rules out.
        got = torch.zeros_like(own) if own.grad is None else own.grad
        expected = torch.zeros_like(p[name]) if p[name].grad is None else p[name].grad
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


def test_forward_in_bfloat16_stays_close_to_float32():
    sae = random_sae(d_in=16, d_sae=64)
    inputs = randn(128, 16), [0.5, 0.5], torch.tensor([0.1, 0.1])
    exact, fast = (sae(*inputs, dtype) for dtype in (torch.float32, torch.bfloat16))
    for name in ("loss_S", "mse_S", "l1_S", "l0_S"):
        torch.testing.assert_close(getattr(fast, name), getattr(exact, name), rtol=0.02, atol=0)
        assert getattr(fast, name).dtype == torch.float32
    assert not torch.equal(fast.mse_S, exact.mse_S), "bfloat16 was really used"
    assert (fast.fired_SF == exact.fired_SF).float().mean() > 0.98


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_gradients_in_bfloat16_stay_close_to_float32(alpha):
    x, grads = randn(256, 16), []
    for dtype in (torch.float32, torch.bfloat16):
        sae = random_sae(d_in=16, d_sae=64)
        sae(x, [alpha, alpha], torch.tensor([0.1, 0.1]), dtype).loss_S.sum().backward()
        grads.append({name: p.grad for name, p in sae.named_parameters() if p.requires_grad})
    for name, exact in grads[0].items():
        assert grads[1][name].dtype == torch.float32
        assert (grads[1][name] - exact).norm() < 0.03 * exact.norm(), name


# ── Seeds ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_the_loss_of_one_seed_never_reaches_the_weights_of_another(alpha):
    sae = random_sae(restored=alpha == 0.0)
    loss_S = sae(randn(20, 4), [alpha, alpha], torch.tensor([0.1, 0.1])).loss_S
    named = [(name, p) for name, p in sae.named_parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss_S[0], [p for _, p in named])
    for (name, _), grad in zip(named, grads, strict=True):
        assert torch.count_nonzero(grad[0]) > 0, name
        assert torch.count_nonzero(grad[1]) == 0, name


def test_a_seed_gives_the_same_sae_whatever_stands_beside_it():
    x, alphas, lambda_S = randn(20, 4), [0.5, 0.5], torch.tensor([0.1, 0.1])
    both, turned, alone = (fresh_sae(seeds) for seeds in ([3, 9], [9, 3], [3]))
    assert torch.equal(both.W_dec, turned.W_dec.flip(0))
    assert torch.equal(both.W_dec[:1], alone.W_dec)
    found, turned_found = both(x, alphas, lambda_S), turned(x, alphas, lambda_S)
    for a, b in zip(found, turned_found, strict=True):
        torch.testing.assert_close(a, b.flip(0), rtol=1e-6, atol=1e-6)


def test_every_seed_is_encoded_at_an_alpha_of_its_own():
    sae, x = random_sae(), randn(20, 4)
    found = sae.encode(x, [0.2, 1.0], torch.float32)
    for seed, alpha in enumerate([0.2, 1.0]):
        alike = sae.encode(x, [alpha, alpha], torch.float32)[seed]
        torch.testing.assert_close(found[seed], alike, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found[0], sae.encode(x, [1.0, 0.2], torch.float32)[0], rtol=0.01)


def test_a_single_seed_is_encoded_at_any_number_of_alphas_at_once():
    sae, x = random_sae([1]), randn(20, 4)
    found = sae.encode(x, ALPHAS, torch.float32)
    assert found.shape == (len(ALPHAS), 20, 7)
    for latents, alpha in zip(found, ALPHAS, strict=True):
        alone = sae.encode(x, [alpha], torch.float32)
        torch.testing.assert_close(latents, alone[0], rtol=1e-5, atol=1e-6)


def test_initialisation_neither_uses_nor_disturbs_the_global_generator():
    torch.manual_seed(1)
    first = fresh_sae([3]).W_dec
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after)
    assert torch.equal(fresh_sae([3]).W_dec, first)


# ── The linear encoder it is closest to ─────────────────────────────────────────────────────────


def test_gains_have_the_values_worked_out_by_hand():
    parts = one_token()  # columns of norm 1 and 2, gates 2 and 0.5
    linear, cosine = experiment.gains(parts["W_enc"], parts["gate"], 0.25)
    assert linear.flatten().tolist() == pytest.approx([0.5, 0.125])
    assert cosine.flatten().tolist() == pytest.approx([0.75 * 2 / 1, 0.75 * 0.5 / 2])


@pytest.mark.parametrize("alpha", ALPHAS)
def test_scores_times_their_gains_are_the_pre_activations(alpha):
    parts = random_parts(seed=7)
    x_c = parts["x"] - parts["b_dec"][:, None]
    linear, cosine = experiment.gains(parts["W_enc"], parts["gate"], alpha)
    r = x_c.norm(dim=-1, keepdim=True)
    z = (x_c @ parts["W_enc"]) * (linear + cosine / r) + parts["b_enc"][:, None]
    found = experiment.pre_activations(**parts, alpha=alpha)
    torch.testing.assert_close(found, z, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("restored", "alpha"), [(False, 0.0), (False, 0.4), (True, 0.0)])
def test_the_linear_encoder_agrees_with_a_blend_where_a_tokens_norm_is_1_and_only_there(
    restored, alpha
):
    sae = random_sae(restored=restored)
    directions = torch.nn.functional.normalize(randn(2, 30, 4), dim=-1)

    def both(norm: float) -> tuple[torch.Tensor, torch.Tensor]:
        x_c = norm * directions
        W = sae.linear_encoder([alpha, alpha])
        assert W.shape == sae.W_enc.shape
        linear = (x_c @ W + sae.b_enc[:, None]).relu()
        x = x_c + sae.b_dec[:, None]
        blended = [sae.encode(x[s], [alpha, alpha], torch.float32)[s] for s in range(2)]
        return linear, torch.stack(blended)

    torch.testing.assert_close(*both(1.0), rtol=1e-4, atol=1e-5)
    linear, blended = both(3.0)
    assert not torch.allclose(linear, blended, rtol=0.05)


@torch.no_grad()
def test_at_alpha_1_the_linear_encoder_is_the_encoder_all_over():
    sae, x = random_sae(), 3 * randn(30, 4)
    latents = ((x - sae.b_dec[:, None]) @ sae.linear_encoder([1.0, 1.0])) + sae.b_enc[:, None]
    found = sae.encode(x, [1.0, 1.0], torch.float32)
    torch.testing.assert_close(found, latents.relu(), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_linear_encoder_of_each_seed_is_at_its_own_alpha():
    sae = random_sae()
    found = sae.linear_encoder([0.2, 0.9])
    assert torch.equal(found[0], sae.linear_encoder([0.2, 0.2])[0])
    assert torch.equal(found[1], sae.linear_encoder([0.9, 0.9])[1])


# ── Unit decoder rows ───────────────────────────────────────────────────────────────────────────


def test_the_projected_decoder_gradient_has_no_part_along_its_row_and_keeps_the_rest():
    sae = random_sae()
    sae.normalize_()
    sae(randn(20, 4), [0.5, 0.5], torch.tensor([0.1, 0.1])).loss_S.sum().backward()
    before = sae.W_dec.grad.clone()
    along = (before * sae.W_dec).sum(-1, keepdim=True)
    assert along.abs().max() > 0.01, "there was something to remove"
    sae.project_decoder_gradient_()
    assert (sae.W_dec.grad * sae.W_dec).sum(-1).abs().max() < 1e-6
    torch.testing.assert_close(sae.W_dec.grad + along * sae.W_dec, before)


def test_normalising_gives_unit_decoder_rows_without_turning_them():
    sae = random_sae()
    before = {name: p.detach().clone() for name, p in sae.named_parameters()}
    norms = before["W_dec"].norm(dim=-1, keepdim=True)
    assert (norms - 1).abs().max() > 0.1, "there was something to do"
    sae.normalize_()
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(2, 7))
    torch.testing.assert_close(sae.W_dec * norms, before["W_dec"])
    for name in ("W_enc", "gate", "b_enc", "b_dec"):
        assert torch.equal(getattr(sae, name), before[name]), name
