"""Absorption of the live SAEs, by SAE-Bench's formula, while they train."""

import torch
from safetensors.torch import load_file

from lab.absorption import first_letter_probes
from lab.language_model import LanguageModel
from lab.quick_absorption import fraction_and_full
from lab.saved_sae import decoder_rows
from lab.scales import Scale


def absorption_scores(
    acts_NF: torch.Tensor, cos_NF: torch.Tensor, main_NF: torch.Tensor, projection_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """SAE-Bench's absorption of N words: (fraction [N], whether full [N]), all words at once.

    The formulas are those of its feature_absorption_calculator.py.

    Args:
        acts_NF: latents of each word, residual-stream units.
        cos_NF: cosine of each decoder row with the probe of the word's first letter.
        main_NF: whether a latent is one of the letter's main (split) latents.
        projection_N: the residual's projection on the letter's unit probe.
    A word's feature is fully absorbed if no main latent fires and the latent with the largest probe
    projection is aligned (cosine >= 0.025) and carries at least 0.4 of the residual's; the fraction
    is what the top 3 other aligned latents (cosine >= 0.1) carry of what they and the main ones do.
    """
    part_NF = acts_NF * cos_NF
    main_N = (part_NF * main_NF).sum(-1)
    others_NF = part_NF.masked_fill(main_NF | (cos_NF < 0.1), 0).clamp_min(0)
    absorbed_N = others_NF.topk(min(3, others_NF.shape[-1]), dim=-1).values.sum(-1)
    top_N, index_N = part_NF.max(-1)
    aligned_N = cos_NF.gather(-1, index_N[..., None])[..., 0] >= 0.025
    silent_N = ~((acts_NF >= 1e-8) & main_NF).any(-1)
    return fraction_and_full(main_N, absorbed_N, top_N, aligned_N, silent_N, projection_N)


class OnlineAbsorption:
    """Absorption of the live SAEs during training: one encode of cached words, no language model.

    The probe is SAE-Bench's own, the words those it was trained on: the final score uses its test
    words, so driving a schedule by this one does not leak.  A letter's main latent is the one
    whose firing has the best F1 for it (SAE-Bench trains 260 probes to choose: too slow here).
    """

    def __init__(self, probe: dict[str, torch.Tensor], n_words: int, min_f1: float = 0.6):
        """`probe`: weight [26, D], bias [26], f1 [26], X [N, D] residuals, y [N] letters."""
        good = (probe["f1"] > min_f1)[probe["y"]]
        logits = probe["X"] @ probe["weight"].T + probe["bias"]
        found = logits.gather(1, probe["y"][:, None])[:, 0] > 0
        keep = (good & found).nonzero()[:n_words, 0]
        self.X, self.y = probe["X"][keep], probe["y"][keep]
        self.direction = torch.nn.functional.normalize(probe["weight"], dim=-1)
        self.projection_N = (self.X * self.direction[self.y]).sum(-1)
        self.is_letter = torch.nn.functional.one_hot(self.y, 26).float()

    @torch.no_grad()
    def measure(
        self, sae: torch.nn.Module, alphas: list[float], scale: float, dtype: torch.dtype
    ) -> list[tuple[float, float]]:
        """(absorption fraction, full absorption), each the mean over letters, for every seed."""
        acts = sae.encode(self.X * scale, alphas, dtype).float() / scale
        rows = decoder_rows(sae, len(acts), acts.shape[-1])
        norms = rows.norm(dim=-1, keepdim=True).clamp_min(1e-8)
        if (norms - 1).abs().max() > 1e-4:  # beyond rounding: an edit keeps no unit rows
            acts, rows = acts * norms.mT, rows / norms
        return [self._mean_over_letters(a, W) for a, W in zip(acts, rows, strict=True)]

    def _mean_over_letters(self, acts_NF: torch.Tensor, W_dec: torch.Tensor) -> tuple[float, float]:
        fires_NF = (acts_NF > 0).to(acts_NF.dtype)
        hits = self.is_letter.T @ fires_NF  # [26, F]
        f1 = 2 * hits / (fires_NF.sum(0) + self.is_letter.sum(0)[:, None]).clamp_min(1)
        main = torch.nn.functional.one_hot(f1.argmax(-1), acts_NF.shape[-1]).bool()
        cos = self.direction @ W_dec.T
        fraction_N, full_N = absorption_scores(
            acts_NF, cos[self.y], main[self.y], self.projection_N
        )
        words = self.is_letter.sum(0)
        present = words > 0
        both = torch.stack([fraction_N, full_N.float()], dim=-1)  # [N, 2]
        per_letter = (self.is_letter.T @ both)[present] / words[present, None]
        return tuple(per_letter.mean(0).tolist())


def online_absorption(scale: Scale, lm: LanguageModel, layer: int) -> OnlineAbsorption | None:
    probe = load_file(first_letter_probes(scale, lm, layer) / "probe.safetensors")
    probe = {name: tensor.to(lm.device) for name, tensor in probe.items()}
    online = OnlineAbsorption(probe, scale.online_words)
    return online if len(online.y) else None  # a model that knows no letter
