"""A world with known features in trees: activations whose absorption is known, not inferred.

Promises that every arm reads the same rows: they are sampled once, from named seeds, and kept in
the cache.  A child is only on where its parent is, so an SAE saves a latent by leaving the parent
silent there (absorption: arXiv 2409.14507).  Made of sae_lens.synthetic's parts; it stands in for a
language model: its text are row numbers, its layers are spreads of the rows' norms.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from safetensors.torch import load_file

from lab.devices import training_device
from lab.process import require
from lab.scales import Scale
from lab.seeds import seed_for
from lab.storage import cached, disjoint, save_tensors, versions

DOCUMENT = 1016  # rows of a document
CHUNK = 64 * DOCUMENT  # rows that are sampled at once, from a seed of their own
BOS, EOS = -1, -2  # what stands between rows in their text


@dataclass(frozen=True)
class World:
    """Trees of features, free features beside them, and how often and how strongly they fire."""

    roots: int = 16
    branching: int = 2  # children of a parent: of them at most one is on
    depth: int = 1  # of a tree: 1 is roots and their children
    free: int = 16  # features in no tree
    width: int = 96  # of an activation
    p_root: float = 0.24  # chance that a root is on
    p_child: float = 0.19  # that a child is on where its parent is
    p_free: float = 0.2
    magnitude_sd: float = 0.1  # of a feature that is on, around 1
    noise: float = 0.02  # sd of each of the width's coordinates
    # A layer each: sd of the log of a factor on the whole activation.  0.25 is the sd of log
    # ||x - mean x|| after SmolLM2-135M's block 8, tokens over 3 median norms left out (notes.txt).
    norm_spreads: tuple[float, ...] = (0.0, 0.25)
    trees: bool = True  # False: the same features, as often, each on its own

    def __post_init__(self):
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            if field.type is int:
                good = type(value) is int and value >= (name not in ("free",))
                require(good, f"WORLDS: {name}={value!r} must be a whole number, from 1 on")
            elif field.type is float:
                most = 1 if name.startswith("p_") else math.inf
                good = 0 <= value < most and (value > 0 or most > 1)
                require(good, f"WORLDS: {name}={value} must lie in (0, 1), or be an sd from 0 on")
        # sae_lens takes no exclusive children below two, nor does a parent with one show a gap.
        require(self.branching >= 2, f"WORLDS: branching={self.branching} must be 2 or more")
        require(
            self.branching * self.p_child < 1,
            f"WORLDS: p_child={self.p_child} of {self.branching} children that exclude one another "
            "must leave a parent alone sometimes",
        )
        require(
            bool(self.norm_spreads) and all(0 <= s < math.inf for s in self.norm_spreads),
            f"WORLDS: norm_spreads={self.norm_spreads} must be one sd or more, from 0 on",
        )

    @property
    def parents(self) -> list[int]:
        """The parent of each feature, or -1: roots first, then level by level, then the free."""
        level, parents = [*range(self.roots)], [-1] * self.roots
        for _ in range(self.depth):
            born = [parent for parent in level for _ in range(self.branching)]
            level = [*range(len(parents), len(parents) + len(born))]
            parents += born
        return parents + [-1] * self.free

    @property
    def edges(self) -> list[tuple[int, int]]:
        """(parent, child) of every feature that has a parent."""
        return [(parent, child) for child, parent in enumerate(self.parents) if parent >= 0]

    @property
    def rates(self) -> list[float]:
        """How often each feature is on."""
        parents, rates = self.parents, []
        for feature, parent in enumerate(parents):
            own = self.p_root if feature < self.roots else self.p_free
            rates.append(own if parent < 0 else self.p_child * rates[parent])
        return rates

    @property
    def true_l0(self) -> float:
        """Features that are on, on average."""
        return sum(self.rates)


# Chosen by what the control does in it (notes.txt), and frozen before any other arm was run.
WORLDS: dict[str, World] = {
    "trees": World(),
    "no trees": World(trees=False),  # the negative control: nothing can be absorbed
}


class Rows(NamedTuple):
    """Activations before their norms are spread, and what is known of them."""

    x_ND: torch.Tensor
    log_norm_N: torch.Tensor  # standard normal: times a spread it is the log of the factor
    on_NK: torch.Tensor  # whether a feature is on, bool


def directions(world: World) -> torch.Tensor:
    """Unit vectors [K, width] of the features, pushed apart by sae_lens, by gradient descent."""
    from sae_lens.synthetic import FeatureDictionary

    seed = seed_for("world", "directions", len(world.parents), world.width)
    made = FeatureDictionary(len(world.parents), world.width, bias=False, seed=seed)
    return made.feature_vectors.detach().clone()


def generator_of(world: World):
    """sae_lens' generator of feature activations [N, K]; it draws from torch's global generator."""
    from sae_lens.synthetic import ActivationGenerator, HierarchyNode, hierarchy_modifier

    parents, rates = world.parents, world.rates
    # Of b children that fire with chance q each, one that fires is kept: p = (1 - (1 - q)^b) / b.
    q = 1 - (1 - world.branching * world.p_child) ** (1 / world.branching)
    inside = [q if parent >= 0 else rate for parent, rate in zip(parents, rates, strict=True)]
    # Node by node: HierarchyNode.from_dict() takes what it does not know for no tree at all.
    nodes = [HierarchyNode(feature_index=i) for i in range(len(parents))]
    for i, node in enumerate(nodes):
        node.children = [nodes[child] for parent, child in world.edges if parent == i]
        node.mutually_exclusive_children = bool(node.children)
    modifier = hierarchy_modifier(nodes[: world.roots]) if world.trees else None
    return ActivationGenerator(
        len(parents),
        torch.tensor(inside if world.trees else rates),
        std_firing_magnitudes=world.magnitude_sd,
        modify_activations=modifier,
    )


@torch.no_grad()
def sample(world: World, vectors_KD: torch.Tensor, n: int, *names: object) -> Rows:
    """Rows of a world whose features have these directions(); the same for the same names."""
    generator = generator_of(world)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for("world", *names))
        acts = generator.sample(n)
        x = acts @ vectors_KD + world.noise * torch.randn(n, world.width)
        return Rows(x, torch.randn(n), acts > 0)


class KnownWorld:
    """A world in the place of a language model: residuals() of the row numbers in a text."""

    tokenizer = SimpleNamespace(bos_token_id=BOS, eos_token_id=EOS)

    def __init__(self, world: World, name: str, layers: tuple[int, ...], entry: Path, key: dict):
        require(
            max(layers) < len(world.norm_spreads),
            f"layer {max(layers)} does not exist: {name} has {len(world.norm_spreads)} spreads of "
            "norms, from 0 on",
        )
        self.world, self.name, self.layers = world, name, tuple(layers)
        self.d_in, self.device, self.identity = world.width, training_device(), key
        rows = load_file(entry / "rows.safetensors")
        known = load_file(entry / "known.safetensors")
        self._x, self._log_norm = rows["x"], rows["log_norm"]
        self.directions_KD, self.on_NK = known["directions"], known["heldout_on"]
        self.online = Rows(known["online_x"], known["online_log_norm"], known["online_on"])

    def documents(self, start: int) -> Iterator[tuple[int, list[int]]]:
        """(index, row numbers) of each document from `start` on."""
        for i in range(start, len(self._x) // DOCUMENT):
            yield i, [*range(i * DOCUMENT, (i + 1) * DOCUMENT)]

    def is_special(self, tokens: torch.Tensor) -> torch.Tensor:
        """BOS and EOS: no rows."""
        return tokens < 0

    def residuals(self, tokens_BL: torch.Tensor) -> dict[int, torch.Tensor]:
        """Activations [B, L, width] of rows at every layer, float32; those of BOS and EOS mean
        nothing."""
        rows_BL = tokens_BL.cpu().clamp_min(0)
        x, log_norm = self._x[rows_BL].float(), self._log_norm[rows_BL]
        return {layer: self.spread(x, log_norm, layer).to(self.device) for layer in self.layers}

    def spread(self, x: torch.Tensor, log_norm: torch.Tensor, layer: int) -> torch.Tensor:
        """The same activations with the spread of norms of a layer."""
        return x * (self.world.norm_spreads[layer] * log_norm).exp()[..., None]


def load_world(scale: Scale) -> KnownWorld:
    """The world of a scale, sampled once and kept.  Raises ExperimentError for one unknown."""
    name = scale.world
    require(name in WORLDS, f"the world {name!r} is not one of {', '.join(WORLDS)}")
    world, per_context = WORLDS[name], scale.context_length - 1
    heldout = (scale.heldout_contexts + 1) * per_context
    # A block's lanes end with rows that fill no batch, and norms that are outliers are left out.
    training = 1.1 * scale.training_tokens + 2 * scale.block_contexts * per_context
    counts = {"rows": -(-int(heldout + training) // CHUNK) * CHUNK, "online": scale.online_words}
    counts["heldout"] = -(-heldout // DOCUMENT) * DOCUMENT
    key = disjoint({"world": asdict(world)}, counts, versions("torch", "sae-lens"))

    def build(folder: Path) -> None:
        _build(world, counts, folder)

    entry = cached("worlds", key, build)
    return KnownWorld(world, f"world of {name}", scale.layers, entry, key)


def _build(world: World, counts: dict[str, int], folder: Path) -> None:
    vectors, parts = directions(world), []
    for i in range(counts["rows"] // CHUNK):
        x, log_norm, on = sample(world, vectors, CHUNK, "rows", i)
        parts.append(Rows(x.bfloat16(), log_norm, on))
    x, log_norm = (torch.cat(p) for p in list(zip(*parts, strict=True))[:2])
    save_tensors({"x": x, "log_norm": log_norm}, folder / "rows.safetensors")
    online = sample(world, vectors, counts["online"], "online")
    known = {
        "directions": vectors,
        "heldout_on": torch.cat([part.on_NK for part in parts])[: counts["heldout"]],
        "online_x": online.x_ND,
        "online_log_norm": online.log_norm_N,
        "online_on": online.on_NK,
    }
    save_tensors({k: v.contiguous() for k, v in known.items()}, folder / "known.safetensors")
