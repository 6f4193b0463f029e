"""Saved SAEs: they compute with the code that was trained, in residual-stream units.

A folder has SAELens' layout, and sae_lens.SAE.load_from_disk reads it.  What it returns holds the
trained SAE itself and converts units: x -> scale x on the way in, f -> f ||W_dec,i|| / scale on the
way out.  SAE-Bench's absorption is only meaningful in those units, with unit decoder rows.
"""

import copy
import importlib.metadata
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from lab.activations import Calibration
from lab.language_model import LanguageModel
from lab.process import ExperimentError, require
from lab.scales import Scale
from lab.storage import file_sha256, json_text, save_tensors, write_atomically

ARCHITECTURE = "cosine_blend"
Build = Callable[..., torch.nn.Module]  # (d_in=, d_sae=, **settings): the SAE of one seed
_builds: dict[str, Build] = {}  # by the fingerprint of the experiment they stand in


class Trained(Protocol):
    """What is asked of a trainer: the SAEs of one layer, all seeds stacked."""

    layer: int
    units: Calibration
    sae: torch.nn.Module  # encode(x, alphas, dtype), decode(f), linear_encoder(alphas), b_enc

    def averaged(self) -> AbstractContextManager:
        """Inside it `sae` holds the weights that are to be evaluated."""

    def final_alphas(self) -> list[float]:
        """The blend of each seed at the end of training."""


def register(experiment: str, build: Build) -> type:
    """Let sae_lens.SAE.load_from_disk read the SAEs that the code of this fingerprint trained.

    Returns SAELens' class for them.
    """
    from sae_lens import SAE, SAEConfig, register_sae_class
    from sae_lens.registry import SAE_CLASS_REGISTRY

    _builds[experiment] = build
    if ARCHITECTURE in SAE_CLASS_REGISTRY:
        return SAE_CLASS_REGISTRY[ARCHITECTURE][0]

    @dataclass
    class SavedSAEConfig(SAEConfig):
        experiment: str = ""  # fingerprint of the code that trained it
        settings: dict = field(default_factory=dict)  # what that code builds the SAE from
        activation_scale: float = 1.0  # training saw residuals times this
        alpha: float = 1.0  # at the end of training
        whole_numbers: dict = field(default_factory=dict)  # buffers that are not floating-point

        @classmethod
        def architecture(cls) -> str:
            return ARCHITECTURE

    class SavedSAE(SAE):
        """One trained SAE for raw residual-stream activations [..., D].

        W_enc [D, F], W_dec [F, D] (unit rows), b_enc [F] and b_dec [D] are SAELens' in meaning and
        in residual-stream units, made from the trained SAE: relu((x - b_dec) @ W_enc + b_enc) are
        the latents of a linear encoder (alpha = 1), and those of a blend at tokens whose distance
        from b_dec is the usual one.  SAELens' hook_sae_acts_pre is not called: what comes before
        the activation function is the trained code's own business.
        """

        def initialize_weights(self) -> None:
            cfg = self.cfg
            require(
                cfg.experiment in _builds,
                f"this SAE was trained by another experiment.py (fingerprint {cfg.experiment!r}; "
                f"here {', '.join(_builds)}) and is only read by that: the one in its run's own "
                "folder imports as a module: in a new Python, `import sys; sys.path.insert(0, "
                "'run_1'); import experiment; experiment.register_with_sae_lens()`",
            )
            with torch.device("cpu"):
                self.trained = _builds[cfg.experiment](
                    d_in=cfg.d_in, d_sae=cfg.d_sae, **cfg.settings
                )
            for name in ("W_enc", "W_dec", "b_enc", "b_dec", "latent_units"):
                self.register_buffer(name, torch.empty(0), persistent=False)
            self.convert_units_()

        @torch.no_grad()
        def convert_units_(self) -> None:
            """W_enc, W_dec, b_enc and b_dec from the trained SAE as it stands."""
            sae, scale = self.trained, self.cfg.activation_scale
            like = next(sae.parameters())
            zeros = torch.zeros(1, 1, self.cfg.d_sae, dtype=like.dtype, device=like.device)
            W_dec = decoder_rows(sae, 1, self.cfg.d_sae)[0].float()
            norm_F = W_dec.norm(dim=-1).clamp_min(1e-8)
            found = {
                "W_dec": W_dec / norm_F[:, None],
                "b_dec": sae.decode(zeros)[0, 0].float() / scale,
                "b_enc": sae.b_enc[0].float() * norm_F / scale,
                "latent_units": norm_F / scale,
            }
            for name, value in found.items():
                setattr(self, name, value.to(like.dtype))
            self.W_enc = self.linear_encoder().to(like.dtype)

        @torch.no_grad()
        def linear_encoder(self) -> torch.Tensor:
            """W_enc [D, F] at the alpha of the configuration, in residual-stream units."""
            W_enc = self.trained.linear_encoder([self.cfg.alpha])[0].float()
            return W_enc * self.latent_units.float() * self.cfg.activation_scale

        def process_state_dict_for_loading(self, state_dict: dict) -> None:
            # SAELens reads all of a file in one dtype, whole numbers too, and would round them.
            own = self.trained.state_dict(prefix="trained.")
            for name, values in self.cfg.whole_numbers.items():
                state_dict[name] = torch.tensor(values, dtype=own[name].dtype)

        def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
            found = super().load_state_dict(state_dict, strict=strict, assign=assign)
            self.trained.eval()
            self.convert_units_()
            return found

        def fold_W_dec_norm(self) -> None:
            """Nothing to do: the rows are unit."""

        def encode(self, x: torch.Tensor) -> torch.Tensor:
            return self.encode_at(x, [self.cfg.alpha])[0]

        def encode_at(self, x: torch.Tensor, alphas: list[float]) -> list[torch.Tensor]:
            """encode() at several alphas: one SAE's weights go with all of them, so the trained
            code gives latents [alphas, B, F] for one large matmul."""
            x = self.hook_sae_input(x.to(self.dtype))
            rows = x.reshape(-1, x.shape[-1]) * self.cfg.activation_scale
            f = self.trained.encode(rows, alphas, self.dtype)
            # In place where f is ours alone: a memory of this size is slower to get than to fill.
            ours = f.is_contiguous() and not f.requires_grad
            f = f.mul_(self.latent_units) if ours else f * self.latent_units
            return [self.hook_sae_acts_post(one.reshape(*x.shape[:-1], -1)) for one in f]

        def decode(self, feature_acts: torch.Tensor) -> torch.Tensor:
            f = (feature_acts / self.latent_units).reshape(1, -1, self.cfg.d_sae)
            x_hat = self.trained.decode(f)[0] / self.cfg.activation_scale
            shape = *feature_acts.shape[:-1], self.cfg.d_in
            return self.hook_sae_recons(x_hat.to(self.dtype).reshape(shape))

    register_sae_class(ARCHITECTURE, SavedSAE, SavedSAEConfig)
    return SavedSAE


@torch.no_grad()
def decoder_rows(sae: torch.nn.Module, n_seeds: int, d_sae: int, at_once: int = 2048):
    """What a unit of each latent adds to the reconstruction [S, F, D]: W_dec itself, or where
    decode() is another's its derivative by each latent, exact for every decoder that is linear."""
    like, W_dec = next(sae.parameters()), getattr(sae, "W_dec", None)
    one = {"dtype": like.dtype, "device": like.device}
    if like.dtype == torch.float32 and W_dec is not None and W_dec.shape[:2] == (n_seeds, d_sae):
        some = torch.arange(1, d_sae + 1, **one).cos().expand(n_seeds, 1, d_sae).contiguous()
        found = sae.decode(some) - sae.decode(torch.zeros_like(some))
        if _relative(torch.bmm(some, W_dec), found) < 1e-4:
            return W_dec
    rows = []
    for chosen in torch.arange(d_sae, device=like.device).split(at_once):
        each = torch.nn.functional.one_hot(chosen, d_sae).to(like.dtype).repeat(n_seeds, 1, 1)
        rows.append(torch.func.jvp(sae.decode, (torch.zeros_like(each),), (each,))[1])
    return torch.cat(rows, dim=1)


def load_sae(folder: Path):
    """A saved SAE in the way a user loads it.  Raises ExperimentError if other code trained it than
    what has been registered."""
    import sae_lens

    return sae_lens.SAE.load_from_disk(folder).requires_grad_(False)


def read_out(sae, alpha: float):
    """The same SAE, its weights shared, with alpha swapped at read time."""
    swapped = copy.copy(sae)
    swapped.cfg, swapped._buffers = copy.deepcopy(sae.cfg), dict(sae._buffers)
    swapped.cfg.alpha = alpha
    swapped.W_enc = swapped.linear_encoder().to(sae.W_enc.dtype)
    return swapped


def latents_at_once(saes: Iterable, x_BD: torch.Tensor) -> Iterator[tuple]:
    """(sae, its latents [B, F]); read-outs of the same weights share one large matmul."""
    alike: dict[int, list] = {}
    for sae in saes:
        alike.setdefault(id(getattr(sae, "trained", sae)), []).append(sae)
    for first, *others in alike.values():
        x = x_BD.to(first.dtype)
        if not others:
            yield first, first.encode(x)
            continue
        found = first.encode_at(x, [sae.cfg.alpha for sae in (first, *others)])
        yield from zip((first, *others), found, strict=True)


def of_one_seed(
    sae: torch.nn.Module, seed: int, n_seeds: int, shared: Collection[str] = ()
) -> dict[str, torch.Tensor]:
    """What a saved SAE loads: the trained one's whole state, of one seed.  A tensor whose first
    dimension is not that of the seeds, or that is named in `shared`, belongs to all of them."""
    return {
        f"trained.{name}": (
            t[seed : seed + 1] if t.dim() and len(t) == n_seeds and name not in shared else t
        )
        .detach()
        .to("cpu", copy=True)
        .contiguous()
        for name, t in sae.state_dict().items()
    }


def _shared(sae: torch.nn.Module, single: torch.nn.Module) -> set[str]:
    """Names of tensors that an SAE of one seed has in the same shape as one of several."""
    shapes = {name: t.shape for name, t in single.state_dict().items()}
    return {name for name, t in sae.state_dict().items() if shapes.get(name) == t.shape}


def save_saes(
    scale: Scale,
    lm: LanguageModel,
    trainers: Iterable[Trained],
    folder: Path,
    run_name: str,
    experiment: str,
    settings: dict,
) -> dict[int, dict[str, Path]]:
    """Every seed's SAE in SAELens' layout, raw weights beside it; where there are several target
    L0s, the folder says which.

    Returns {layer: {name: folder}}, in the order in which the SAEs are stacked; a name ends with
    the weights' hash, so that nothing of other weights is ever taken for theirs.
    """
    saved: dict[int, dict[str, Path]] = {}
    targets = scale.sae_targets
    several = len(scale.target_l0s) > 1
    for trainer in trainers:
        shared: set[str] = set()
        if len(targets) > 1 and experiment in _builds:
            single = _builds[experiment](d_in=lm.d_in, d_sae=scale.d_sae, **settings)
            shared = _shared(trainer.sae, single)
        for i, (l0, alpha) in enumerate(zip(targets, trainer.final_alphas(), strict=True)):
            at = f"_l0_{l0:g}" if several else ""
            target = folder / f"layer_{trainer.layer}{at}_seed_{i % scale.n_seeds}"
            target.mkdir(parents=True, exist_ok=True)
            raw = of_one_seed(trainer.sae, i, len(targets), shared)
            save_tensors(raw, target / "raw.safetensors")
            with trainer.averaged():
                weights = of_one_seed(trainer.sae, i, len(targets), shared)
            save_tensors(weights, target / "sae_weights.safetensors")
            config = {
                "architecture": ARCHITECTURE,
                "d_in": lm.d_in,
                "d_sae": scale.d_sae,
                "dtype": "float32",
                "device": "cpu",
                "apply_b_dec_to_input": True,
                "normalize_activations": "none",
                "reshape_activations": "none",
                "experiment": experiment,
                "settings": settings,
                "activation_scale": trainer.units.scale,
                "alpha": alpha,
                "whole_numbers": {
                    name: t.tolist() for name, t in weights.items() if not t.is_floating_point()
                },
                "metadata": {
                    "model_name": lm.name,
                    "hook_name": f"blocks.{trainer.layer}.hook_resid_post",
                    "hook_layer": trainer.layer,
                    "context_size": scale.context_length,
                    "prepend_bos": True,
                    "sae_lens_version": importlib.metadata.version("sae-lens"),
                },
            }
            write_atomically(target / "cfg.json", json_text(config))
            digest = file_sha256(target / "sae_weights.safetensors")
            saved.setdefault(trainer.layer, {})[f"{run_name}_{target.name}_{digest[:12]}"] = target
    return saved


@torch.no_grad()
def check_saved(
    trainer: Trained, folder: Path, seed: int, rows_BD: torch.Tensor, allowed: float = 1e-5
) -> dict[str, float]:
    """How far a saved SAE, loaded as a user loads it, is from the one that was trained: relative
    errors in float32 on residuals, of latents, firing latents, and reconstructions.

    Raises ExperimentError above `allowed`: nothing that does not compute what was trained may be
    evaluated.
    """
    scale, device = trainer.units.scale, next(trainer.sae.parameters()).device
    sae, rows_BD = load_sae(folder).to(device), rows_BD.float().to(device)
    alphas, nothing = trainer.final_alphas(), torch.zeros(1, device=device)
    with trainer.averaged():
        trained_f = trainer.sae.encode(rows_BD * scale, alphas, torch.float32)
        trained_x_hat = trainer.sae.decode(trained_f)[seed] / scale
        forward = trainer.sae(rows_BD * scale, alphas, nothing, torch.float32)
    trained_f = trained_f[seed] * sae.latent_units
    f = sae.encode(rows_BD)
    again = _relative(sae.encode(rows_BD), f)
    require(
        again <= allowed,
        f"the SAE saved as {folder.name} gives other latents when it reads the same rows again "
        f"({again:.2g}, relative): what is random belongs into `if self.training`; nothing was "
        "evaluated",
    )
    l0, mse = (f > 0).sum(-1).float().mean(), (rows_BD - sae.decode(f)).square().sum(-1).mean()
    some, in_a_crowd = rows_BD[:64], f[:64]
    # An activation that cuts (TopK, a threshold) can turn a tie by rounding: the two rows of a
    # thousand that differ most are left out.
    kept = (f - trained_f).norm(dim=-1).argsort()[: len(f) - 1 - len(f) // 500]
    rows_BD, f, trained_f, trained_x_hat = (t[kept] for t in (rows_BD, f, trained_f, trained_x_hat))
    flipped = (f > 0) != (trained_f > 0)
    flipped &= (f - trained_f).abs() > allowed * trained_f.abs().max()  # more than rounding
    errors = {
        "latents": _relative(f, trained_f),
        "L0": flipped.sum().item() / max(1, (trained_f > 0).sum().item()),
        "reconstructions": _relative(sae.decode(f), trained_x_hat),
        "f @ W_dec + b_dec": _relative(f @ sae.W_dec + sae.b_dec, trained_x_hat),
        "latents read out with alpha 0 and 1 at once": max(
            _relative(both, sae.encode_at(some, [alpha])[0])
            for both, alpha in zip(sae.encode_at(some, [0.0, 1.0]), (0.0, 1.0), strict=True)
        ),
    }
    for what, error in errors.items():
        if not error <= allowed:
            raise ExperimentError(
                f"the SAE saved as {folder.name} does not compute what was trained: its {what} "
                f"differ by {error:.2g} (relative, on held-out rows; {allowed:g} is allowed): all "
                "that encode() and decode() use must be a parameter or a buffer of the SAE or "
                "follow from its run and recipe, and decode() must be linear in the latents; "
                "nothing was evaluated"
            )
    demands = {
        "latents are below 0; a latent fires where it is above": (f.clamp_max(0).norm() / f.norm()),
        "latents depend on what else is in the batch": _relative(sae.encode(some), in_a_crowd),
        "L0 in forward() is not that of encode()": (forward.l0_S[seed] / l0 - 1).abs(),
        "mse in forward() is not that of decode(encode())": (
            forward.mse_S[seed] / (mse * scale**2) - 1
        ).abs(),
    }
    for what, error in demands.items():
        require(
            float(error) <= 1e-3,  # means over tokens round in forward()
            f"the SAE saved as {folder.name} is not what was trained: its {what} (relative "
            f"{float(error):.2g}, on held-out rows); nothing was evaluated",
        )
    return errors


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm().clamp_min(1e-12)).item()
