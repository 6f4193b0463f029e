"""How well a saved SAE stands in for the residual stream, on held-out text."""

from typing import NamedTuple

import torch

from lab.language_model import LanguageModel


class Fidelity(NamedTuple):
    """How well an SAE stands in for the residual stream, on held-out contexts."""

    fvu: float  # sum ||x - x_hat||^2 / sum ||x - mean||^2
    l0: float  # latents that fire on a token
    dead: float  # share of latents that fire on no token
    ce_recovered: float  # 1: as good as the original residuals; 0: as bad as zeros


class HeldOut:
    """Held-out contexts with their residuals and the cross-entropies every SAE is compared with.

    Special tokens and outliers keep their own residuals: the SAE was not trained on them.
    """

    def __init__(
        self,
        lm: LanguageModel,
        contexts_NL: torch.Tensor,
        layer: int,
        outlier_norm: float,
        batch: int,
    ):
        self.lm, self.layer = lm, layer
        found = [lm.residuals(t)[self.layer].float() for t in contexts_NL.split(batch)]
        self.residuals_NLD = torch.cat(found)
        ordinary_NL = self.residuals_NLD.norm(dim=-1) <= outlier_norm
        self.scored_NL = ordinary_NL & ~lm.is_special(contexts_NL).to(lm.device)
        self.ce_tokens = contexts_NL[: max(1, len(contexts_NL) // 16)]  # the whole model is slow
        self.ce = self.cross_entropy(self.residuals_NLD)
        zeros = self.residuals_NLD.masked_fill(self.scored_NL[..., None], 0)
        self.ce_zeros = self.cross_entropy(zeros)

    def cross_entropy(self, residuals_NLD: torch.Tensor) -> float:
        tokens = self.ce_tokens.split(8)  # more would only be more logits at a time
        residuals = residuals_NLD[: len(self.ce_tokens)].split(8)
        found = [
            self.lm.cross_entropy(t, {self.layer: r}) * len(t)
            for t, r in zip(tokens, residuals, strict=True)
        ]
        return sum(found) / len(self.ce_tokens)

    @torch.no_grad()
    def fidelity(self, sae) -> Fidelity:
        x_ND = self.residuals_NLD[self.scored_NL]
        x_hat_ND, error, l0 = torch.empty_like(x_ND), 0.0, 0.0
        fired = torch.zeros(sae.cfg.d_sae, dtype=torch.bool, device=x_ND.device)
        for x, x_hat in zip(x_ND.split(4096), x_hat_ND.split(4096), strict=True):
            f = sae.encode(x)
            x_hat.copy_(sae.decode(f))
            error += (x - x_hat).square().sum().item()
            l0 += (f > 0).sum().item()
            fired |= (f > 0).any(0)
        replaced = self.residuals_NLD.clone()
        replaced[self.scored_NL] = x_hat_ND
        ce = self.cross_entropy(replaced)
        return Fidelity(
            fvu=error / (x_ND - x_ND.mean(0)).square().sum().item(),
            l0=l0 / len(x_ND),
            dead=1 - fired.float().mean().item(),
            ce_recovered=(self.ce_zeros - ce) / (self.ce_zeros - self.ce),
        )
