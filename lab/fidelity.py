"""How well a saved SAE stands in for the residual stream, on held-out text."""

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file

from lab.language_model import LanguageModel
from lab.storage import cached, disjoint, save_tensors, tensor_sha256


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
        keep: bool = False,
    ):
        """With `keep` what the language model says is a cache entry, for later runs."""
        self.lm, self.layer, self.outlier_norm = lm, layer, outlier_norm
        self.contexts_NL = contexts_NL
        self.ce_tokens = contexts_NL[: max(1, len(contexts_NL) // 16)]  # the whole model is slow

        def build(folder: Path) -> None:
            tensors = {name: tensor.cpu() for name, tensor in self._read(batch).items()}
            save_tensors(tensors, folder / "heldout.safetensors")

        if keep:
            tokens = {"tokens": tensor_sha256(contexts_NL), "shape": contexts_NL.shape}
            asked = tokens | {"layer": layer, "outlier_norm": outlier_norm, "batch": batch}
            entry = cached("heldout", disjoint(lm.identity, asked), build)
            read = load_file(entry / "heldout.safetensors", device=str(lm.device))
        else:
            read = self._read(batch)
        self.residuals_NLD = read["residuals"].float()
        self.scored_NL = self._scored(self.residuals_NLD)
        self.ce, self.ce_zeros = read["cross_entropies"].tolist()

    def _read(self, batch: int) -> dict[str, torch.Tensor]:
        """Residuals [N, L, D] as the model gives them; cross-entropy of the model as it is, and
        with zeros for the residuals that are scored."""
        found = [self.lm.residuals(t)[self.layer] for t in self.contexts_NL.split(batch)]
        residuals_NLD = torch.cat(found)
        zeros = residuals_NLD.masked_fill(self._scored(residuals_NLD.float())[..., None], 0)
        both = [self.cross_entropy(residuals) for residuals in (residuals_NLD, zeros)]
        cross_entropies = torch.tensor(both, dtype=torch.float64)
        return {"residuals": residuals_NLD, "cross_entropies": cross_entropies}

    def _scored(self, residuals_NLD: torch.Tensor) -> torch.Tensor:
        ordinary_NL = residuals_NLD.norm(dim=-1) <= self.outlier_norm
        return ordinary_NL & ~self.lm.is_special(self.contexts_NL).to(self.lm.device)

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
