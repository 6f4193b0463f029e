"""Saved SAEs: SAELens' layout, saving, loading, read-outs."""

import copy
import importlib.metadata
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from lab.language_model import LanguageModel
from lab.scales import Scale
from lab.storage import file_sha256, json_text, write_atomically


def register_with_sae_lens() -> type:
    """Teach SAELens "cosine_blend", so that sae_lens.SAE.load_from_disk reads our folders.

    Returns the class.  Its parameters are those BlendedSAE.export() writes, for one SAE; it takes
    raw residual-stream activations [..., D].
    """
    from sae_lens import SAE, SAEConfig, register_sae_class
    from sae_lens.registry import SAE_CLASS_REGISTRY

    if "cosine_blend" in SAE_CLASS_REGISTRY:
        return SAE_CLASS_REGISTRY["cosine_blend"][0]

    @dataclass
    class CosineBlendSAEConfig(SAEConfig):
        alpha: float = 1.0
        cosine_scale: float = 1.0
        norm_exponent: float = 0.0

        @classmethod
        def architecture(cls) -> str:
            return "cosine_blend"

    class CosineBlendSAE(SAE):
        """One exported BlendedSAE: k is cosine_scale and e norm_exponent there."""

        def initialize_weights(self) -> None:
            super().initialize_weights()
            F, like = self.cfg.d_sae, {"dtype": self.dtype, "device": self.device}
            self.W_enc = torch.nn.Parameter(self.W_dec.data.T.clone().contiguous())
            self.b_enc = torch.nn.Parameter(torch.zeros(F, **like))
            self.gate = torch.nn.Parameter(torch.ones(F, **like))

        def encode(self, x: torch.Tensor) -> torch.Tensor:
            return self.encode_at(x, [self.cfg.alpha])[0]

        def encode_at(self, x: torch.Tensor, alphas: list[float]) -> list[torch.Tensor]:
            """encode() at several alphas, all of them for one large matmul."""
            x_c = self.process_sae_in(x)  # centres on b_dec
            score = x_c @ self.W_enc
            r = x_c.norm(dim=-1, keepdim=True).clamp_min(1e-8)
            token = self.cfg.cosine_scale * r ** (self.cfg.norm_exponent - 1)
            unit = self.gate / self.W_enc.norm(dim=0).clamp_min(1e-8)
            gains = (a * self.gate + (1 - a) * token * unit for a in alphas)
            z = (self.hook_sae_acts_pre(torch.addcmul(self.b_enc, score, g)) for g in gains)
            return [self.hook_sae_acts_post(z_a.relu()) for z_a in z]

        def decode(self, feature_acts: torch.Tensor) -> torch.Tensor:
            return self.hook_sae_recons(feature_acts @ self.W_dec + self.b_dec)

    register_sae_class("cosine_blend", CosineBlendSAE, CosineBlendSAEConfig)
    return CosineBlendSAE


def sae_lens_config(lm: LanguageModel, scale: Scale, layer: int, blend: dict) -> dict:
    """cfg.json of an exported SAE, as SAELens lays it out."""
    return {
        "architecture": "cosine_blend",
        "d_in": lm.d_in,
        "d_sae": scale.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        **blend,
        "metadata": {
            "model_name": lm.name,
            "hook_name": f"blocks.{layer}.hook_resid_post",
            "hook_layer": layer,
            "context_size": scale.context_length,
            "prepend_bos": True,
            "sae_lens_version": importlib.metadata.version("sae-lens"),
        },
    }


def load_sae(folder: Path):
    """A saved SAE as SAELens loads it."""
    import sae_lens

    register_with_sae_lens()
    return sae_lens.SAE.load_from_disk(folder)


def read_out(sae, alpha: float):
    """The same SAE, its weights shared, with alpha swapped at read time."""
    swapped = copy.copy(sae)
    swapped.cfg = copy.deepcopy(sae.cfg)
    swapped.cfg.alpha = alpha
    return swapped


def save_saes(scale: Scale, lm: LanguageModel, trainers: Iterable, folder: Path) -> dict:
    """Every seed's SAE in SAELens' layout, raw weights beside it; returns {folder: hash}."""
    hashes = {}
    for trainer in trainers:
        for seed in range(scale.n_seeds):
            target = folder / f"layer_{trainer.layer}_seed_{seed}"
            target.mkdir(parents=True, exist_ok=True)
            weights, blend = trainer.export(seed, averaged=True)
            save_file(weights, target / "sae_weights.safetensors")
            save_file(trainer.export(seed, averaged=False)[0], target / "raw.safetensors")
            config = sae_lens_config(lm, scale, trainer.layer, blend)
            write_atomically(target / "cfg.json", json_text(config))
            hashes[target.name] = file_sha256(target / "sae_weights.safetensors")
    return hashes
