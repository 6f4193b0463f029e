"""Absorption of live SAEs: by hand, and against SAE-Bench's own calculator."""

from types import SimpleNamespace

import pytest
import torch
from tiny import RECIPE, randn

import experiment
from lab.online_absorption import OnlineAbsorption, absorption_scores

# ── Absorption of words ─────────────────────────────────────────────────────────────────────────

# Cosines of six latents with the probe; the first is the letter's main one unless a test says more.
COSINES = [0.8, 0.6, 0.5, 0.05, -0.4, 0.02]


def absorption(
    acts: list[float], projection: float, main: tuple[int, ...] = (0,), cosines=COSINES
) -> tuple[float, bool]:
    """(fraction, full) of one word."""
    is_main = torch.tensor([i in main for i in range(len(cosines))])
    fraction, full = absorption_scores(
        torch.tensor([acts]), torch.tensor([cosines]), is_main[None], torch.tensor([projection])
    )
    return fraction.item(), full.item()


@pytest.mark.parametrize(
    ("acts", "projection", "fraction", "full"),
    [
        # the main latent fires and carries 1.6 of 1.5
        ([2, 0, 0, 0, 0, 0], 1.5, 0.0, False),
        # the same, though another would carry enough: nothing is missing
        ([2, 2, 0, 0, 0, 0], 1.5, 0.0, False),
        # the main latent is silent, another carries 1.2 of 2
        ([0, 2, 0, 0, 0, 0], 2.0, 1.0, True),
        # it carries 0.8 of 2, two others 0.6 + 0.5: 1.1 / 1.9
        ([1, 1, 1, 0, 0, 0], 2.0, 1.1 / 1.9, False),
        # as before, but only 1.2 - 0.8 is missing: 0.4 / 1.2
        ([1, 1, 1, 0, 0, 0], 1.2, 1 / 3, False),
        # the others carry 0.3 of 1: too little
        ([0, 0.5, 0, 0, 0, 0], 1.0, 0.0, False),
        ([0.5, 0.5, 0, 0, 0, 0], 1.0, 0.0, False),
        # nothing fires, or only a latent that points away
        ([0, 0, 0, 0, 0, 0], 1.0, 0.0, False),
        ([0, 0, 0, 0, 3, 0], 1.0, 0.0, False),
        # no aligned absorber: cosine 0.05 counts for the full score (from 0.025), not the fraction
        ([0, 0, 0, 10, 0, 0], 1.0, 0.0, True),
        # cosine 0.02 counts for neither
        ([0, 0, 0, 0, 0, 50], 1.0, 0.0, False),
        # the largest projection is an unaligned latent's; an aligned one still carries 0.6 of 1
        ([0, 1, 0, 0, 0, 50], 1.0, 1.0, False),
        # the residual points away from the probe
        ([0, 2, 0, 0, 0, 0], -1.0, 0.0, False),
        ([1, 2, 0, 0, 0, 0], -1.0, 0.0, False),
    ],
)
def test_absorption_of_a_word_worked_out_by_hand(acts, projection, fraction, full):
    found = absorption([float(a) for a in acts], projection)
    assert found == (pytest.approx(fraction, abs=1e-6), full)


def test_only_the_three_strongest_absorbers_count():
    cosines, acts = [0.8, *[0.5] * 4], [0.0, *[0.3] * 4]  # 0.15 each: 0.45, or 0.6 of all four
    assert absorption(acts, 1.1, cosines=cosines) == (1.0, False)  # 0.45 / 1.1 = 0.409
    assert absorption(acts, 1.2, cosines=cosines) == (0.0, False)  # 0.45 / 1.2 = 0.375


def test_any_main_latent_that_fires_prevents_full_absorption():
    assert absorption([0.0, 2, 0, 0, 0, 0], 2.0, main=(0, 2))[1]
    assert not absorption([0.0, 2, 0.01, 0, 0, 0], 2.0, main=(0, 2))[1]


def test_several_main_latents_carry_together():
    # main: 0.8 + 0.5 = 1.3 of 2; the other 0.9 of 2, of which 0.7 is missing
    fraction, full = absorption([1.0, 1.5, 1, 0, 0, 0], 2.0, main=(0, 2))
    assert (fraction, full) == (pytest.approx(0.7 / 2.0), False)


def test_main_latents_that_point_away_count_as_nothing_found():
    # main: -0.4 of 1, or -1.2; the other 0.6
    assert absorption([0.0, 1, 0, 0, 1, 0], 1.0, main=(4,)) == (1.0, False)
    assert absorption([0.0, 1, 0, 0, 3, 0], 1.0, main=(4,)) == (1.0, False)


def sae_bench_absorption(
    x: torch.Tensor, probe: torch.Tensor, main: list[int], sae: SimpleNamespace
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same words through SAE-Bench's calculator: (fraction [N], full [N])."""
    from sae_bench.evals.absorption.feature_absorption_calculator import FeatureAbsorptionCalculator

    words = [f"a{'b' * i}" for i in range(len(x))]
    given = dict(zip(words, x, strict=True))

    class Model:
        def to_tokens(self, text):
            return torch.zeros(1, 3)

        def run_with_cache(self, prompts, names_filter):
            acts = torch.full((len(prompts), 3, x.shape[-1]), torch.nan)
            acts[:, -2] = torch.stack([given[prompt.strip("\n:")] for prompt in prompts])
            return None, {names_filter[0]: acts}

    found = FeatureAbsorptionCalculator(Model(), icl_word_list=[]).calculate_absorption(
        sae, words, probe, main, layer=0, show_progress=False
    )
    results = found.word_results
    assert [result.word for result in results] == words
    return (
        torch.tensor([float(result.absorption_fraction) for result in results]),
        torch.tensor([result.is_full_absorption for result in results]),
    )


def test_absorption_scores_equal_sae_benchs_own_calculator_on_every_branch():
    D, F, N, letters = 8, 40, 150, 3
    W_dec = torch.nn.functional.normalize(randn(F, D, seed=0), dim=-1)
    W_enc, b_enc = W_dec.T + 0.1 * randn(D, F, seed=1), -0.6
    sae = SimpleNamespace(
        W_dec=W_dec, device="cpu", encode=lambda acts: (acts @ W_enc + b_enc).relu()
    )
    mains, parts = [[0], [1, 2], [3, 4, 5]], []
    probes = torch.nn.functional.normalize(randn(letters, D, seed=2), dim=-1)
    for i, main in enumerate(mains):
        # Main latents are roughly the letter's: they explain some words and not others.
        W_dec[main] = torch.nn.functional.normalize(
            probes[i] + 0.25 * randn(len(main), D, seed=3 + i), dim=-1
        )
    W_enc[:, :6] = W_dec[:6].T
    for i, main in enumerate(mains):
        x = 0.8 * randn(N, D, seed=10 + i) + torch.linspace(-0.5, 2, N)[:, None] * probes[i]
        x[::3] -= 0.9 * x[::3] @ W_dec[main[0]][:, None] * W_dec[main[0]]
        cos = torch.nn.functional.cosine_similarity(probes[i], W_dec, dim=-1)
        is_main = torch.zeros(F, dtype=torch.bool).index_fill(0, torch.tensor(main), True)
        ours = absorption_scores(
            sae.encode(x), cos.expand(N, F), is_main.expand(N, F), x @ probes[i]
        )
        parts.append((*ours, *sae_bench_absorption(x, 3 * probes[i], main, sae), x @ probes[i]))
    fraction, full, expected, expected_full, projection = (
        torch.cat(column) for column in zip(*parts, strict=True)
    )
    torch.testing.assert_close(fraction, expected, rtol=0, atol=1e-5)
    assert torch.equal(full, expected_full)
    branches = {
        "not absorbed": (expected == 0).sum(),
        "partly absorbed": ((expected > 0.01) & (expected < 0.99)).sum(),
        "wholly absorbed": (expected == 1).sum(),
        "fully absorbed": expected_full.sum(),
        "wholly, by several latents": ((expected == 1) & ~expected_full).sum(),
        "negative projection": (projection < 0).sum(),
    }
    assert all(count >= 10 for count in branches.values()), branches


# ── Absorption of live SAEs ─────────────────────────────────────────────────────────────────────


def probe(words: list[tuple[int, list[float]]]) -> dict[str, torch.Tensor]:
    """A probe that knows letters 0 and 1 (axes 0 and 1) and letter 2 badly (axis 2)."""
    weight, bias, f1 = torch.zeros(26, 4), torch.full((26,), -0.5), torch.zeros(26)
    weight[0, 0], weight[1, 1], weight[2, 2] = 2.0, 5.0, 2.0
    f1[:3] = torch.tensor([0.9, 0.61, 0.59])
    X, y = torch.tensor([x for _, x in words]), torch.tensor([letter for letter, _ in words])
    return {"weight": weight, "bias": bias, "f1": f1, "X": X, "y": y}


FOUND = [(0, [1.0, 0.0, 0.0, 0.0])] * 3 + [(1, [0.0, 1.0, 0.0, 0.0])] * 2
ABSORBED = (0, [1.0, 0.0, 3.0, 0.0])  # latent 2 fires in place of latent 0


class LiveSAE(torch.nn.Module):
    """Two seeds of four latents.  Latent 0 is letter 0's but falls silent where latent 2 fires.

    Latents are in training units: proportional to what is encoded.  Seed 1 never absorbs.
    """

    def __init__(self):
        super().__init__()
        rows = [[1.0, 0, 0, 0], [0, 1, 0, 0], [0.6, 0, 0.8, 0], [0, 0, 0, 1]]
        self.W_dec = torch.nn.Parameter(torch.tensor([rows, rows]))

    def encode(self, x, alphas, dtype):
        latents = torch.stack([x[:, 0] - x[:, 2], x[:, 1], x[:, 2], x[:, 3]], dim=-1)
        honest = torch.stack([x[:, 0], x[:, 1], x[:, 2], x[:, 3]], dim=-1)
        return torch.stack([latents, honest]).relu().to(dtype)

    def decode(self, f):
        return f @ self.W_dec


class AnotherDecoder(LiveSAE):
    """The same sums of latents, told by a decoder of its own: its rows are a third as long, and its
    latents three times what they were; W_dec is there and means nothing."""

    def __init__(self, keeps_W_dec: bool):
        super().__init__()
        self.rows = torch.nn.Parameter(self.W_dec.detach() / 3)
        if keeps_W_dec:
            self.W_dec.data.copy_(torch.eye(4).flip(0))
        else:
            del self.W_dec

    def encode(self, x, alphas, dtype):
        return 3 * super().encode(x, alphas, dtype)

    def decode(self, f):
        return f @ self.rows


@pytest.mark.parametrize("scale", [0.01, 1.0, 20.0])
def test_online_absorption_is_the_mean_over_letters_in_residual_stream_units(scale):
    online = OnlineAbsorption(probe([*FOUND, ABSORBED]), n_words=100)
    found = online.measure(LiveSAE(), [0.5, 0.5], scale, torch.float32)
    # Letter 0: latent 2 carries 1.8 of 1 in one of four words.  Letter 1: nothing is absorbed.
    assert found == [(pytest.approx(0.125), pytest.approx(0.125)), (0.0, 0.0)]


@pytest.mark.parametrize("keeps_W_dec", [True, False])
def test_online_absorption_asks_the_decoder_what_a_latent_adds(keeps_W_dec):
    online = OnlineAbsorption(probe([*FOUND, ABSORBED]), n_words=100)
    sae = AnotherDecoder(keeps_W_dec)
    found = online.measure(sae, [0.5, 0.5], 20.0, torch.float32)
    assert found == [(pytest.approx(0.125), pytest.approx(0.125)), (0.0, 0.0)]
    assert all(p.grad is None for p in sae.parameters())


@pytest.mark.parametrize(
    "left_out",
    [
        (2, [1.0, 0.0, 3.0, 0.0]),  # its letter's probe has too low an F1
        (0, [0.2, 0.0, 3.0, 0.0]),  # the probe misses it: 2 * 0.2 - 0.5 < 0
        (1, [0.0, 0.09, 3.0, 0.0]),  # 5 * 0.09 - 0.5 < 0, although a good letter
    ],
)
def test_online_absorption_leaves_out_words_that_the_probe_does_not_know(left_out):
    online = OnlineAbsorption(probe([*FOUND, left_out, ABSORBED]), n_words=100)
    assert len(online.y) == 6
    assert set(online.y.tolist()) == {0, 1}
    assert online.measure(LiveSAE(), [0.5, 0.5], 1.0, torch.float32)[0][0] == pytest.approx(0.125)


def test_online_absorption_takes_no_more_words_than_asked_for_and_fills_up_with_usable_ones():
    words = [(2, [0.0, 0.0, 1.0, 0.0]), *FOUND, ABSORBED]
    online = OnlineAbsorption(probe(words), n_words=5)
    assert online.y.tolist() == [0, 0, 0, 1, 1]
    assert online.measure(LiveSAE(), [0.5, 0.5], 1.0, torch.float32)[0] == (0.0, 0.0)


def test_online_absorption_takes_the_latent_with_the_best_f1_as_main_and_not_the_strongest():
    """Latent 3 fires hard on every word, latent 0 only on its letter's: the letter's is latent 0.

    Were latent 3 the main one, latent 0 would be taken for an absorber of every word of letter 0.
    """
    words = [(letter, [*x[:3], 9.0]) for letter, x in [*FOUND, (1, FOUND[-1][1]), ABSORBED]]
    online = OnlineAbsorption(probe(words), n_words=100)
    found = online.measure(LiveSAE(), [0.5, 0.5], 1.0, torch.float32)
    assert found[0] == (pytest.approx(0.125), pytest.approx(0.125))
    assert found[1] == (0.0, 0.0)


def test_online_absorption_changes_nothing_about_a_real_sae_and_keeps_seeds_apart():
    def real(seeds: list[int]) -> experiment.BlendedSAE:
        return experiment.BlendedSAE(experiment.RUNS["run_1"], RECIPE, 4, 12, seeds=seeds)

    sae, alphas = real([1, 2]), [0.5, 0.7]
    before = [p.detach().clone() for p in sae.parameters()]
    online = OnlineAbsorption(probe([*FOUND, ABSORBED]), n_words=100)
    both = online.measure(sae, alphas, 1.0, torch.float32)
    for seed, alpha, found in zip((1, 2), alphas, both, strict=True):
        (alone,) = online.measure(real([seed]), [alpha], 1.0, torch.float32)
        assert alone == pytest.approx(found)
    for p, q in zip(sae.parameters(), before, strict=True):
        assert torch.equal(p, q) and p.grad is None
