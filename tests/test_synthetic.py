"""lab/synthetic.py: the world is what it says, sampled once, from seeds with names of their own."""

import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from tiny import tiny_world

from lab.process import ExperimentError
from lab.storage import json_text
from lab.synthetic import BOS, DOCUMENT, EOS, WORLDS, World, directions, load_world, sample
from lab.text import heldout_contexts

DEEP = World(roots=2, branching=3, depth=2, free=1, p_child=0.25)


@pytest.fixture(scope="module")
def vectors() -> torch.Tensor:
    return directions(World())


@pytest.fixture(scope="module")
def rows(vectors):
    return sample(World(), vectors, 40_000, "test")


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COSINE_SAE_CACHE", str(tmp_path_factory.mktemp("worlds")))
        yield load_world(tiny_world(layers=(0, 1)))


# ── The world ───────────────────────────────────────────────────────────────────────────────────


def test_the_features_of_a_tree_are_numbered_level_by_level():
    assert World().parents[:20] == [-1] * 16 + [0, 0, 1, 1]
    assert len(World().parents) == 16 + 32 + 16
    # Two roots, 2 x 3 children, 6 x 3 grandchildren, one that is free.
    assert DEEP.parents == [-1, -1, 0, 0, 0, 1, 1, 1] + [p for p in range(2, 8) for _ in "abc"] + [
        -1
    ]
    assert DEEP.edges[0] == (0, 2)
    assert DEEP.edges[-1] == (7, 25)
    assert len(DEEP.edges) == 6 + 18


def test_the_features_that_are_on_follow_from_the_rates():
    # 16 x .24 + 32 x .24 x .19 + 16 x .2
    assert World().true_l0 == pytest.approx(3.84 + 1.4592 + 3.2)
    assert WORLDS["no trees"].true_l0 == WORLDS["trees"].true_l0


def test_a_child_is_only_on_where_its_parent_is_and_at_most_one_of_them(rows):
    for parent, child in World().edges:
        assert not (rows.on_NK[:, child] & ~rows.on_NK[:, parent]).any()
    assert rows.on_NK[:, 16:48].view(-1, 16, 2).sum(-1).max() == 1


@pytest.mark.parametrize(
    "world", [World(), World(trees=False), DEEP], ids=["trees", "none", "deep"]
)
def test_features_are_on_as_often_as_the_world_says(world):
    on = sample(world, torch.eye(len(world.parents), world.width), 40_000, "test").on_NK
    expected = torch.tensor(world.rates)
    assert ((on.float().mean(0) - expected).abs() < 5 * (expected / 40_000).sqrt()).all()


def test_without_trees_a_child_is_on_whatever_its_parent_is(vectors):
    on = sample(World(trees=False), vectors, 40_000, "test").on_NK
    parents, children = torch.tensor(World().edges).T
    with_parent = (on[:, children] & on[:, parents]).sum() / on[:, parents].sum()
    without = (on[:, children] & ~on[:, parents]).sum() / (~on[:, parents]).sum()
    assert with_parent == pytest.approx(without.item(), abs=0.005)


def test_a_row_is_the_sum_of_its_features_directions_with_noise_of_the_stated_size(rows, vectors):
    strengths = rows.x_ND @ vectors.T  # the directions are orthogonal: 64 in width 96
    assert (vectors @ vectors.T - torch.eye(64)).abs().max() < 1e-4
    assert strengths[rows.on_NK].mean() == pytest.approx(1.0, abs=0.01)
    assert strengths[rows.on_NK].std() == pytest.approx((0.1**2 + 0.02**2) ** 0.5, abs=0.005)
    assert strengths[~rows.on_NK].std() == pytest.approx(0.02, abs=0.001)
    assert rows.log_norm_N.std() == pytest.approx(1.0, abs=0.02)


def test_rows_are_the_same_for_the_same_names_whatever_was_drawn_before(vectors):
    first = sample(World(), vectors, 100, "a", 1)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    again, other = sample(World(), vectors, 100, "a", 1), sample(World(), vectors, 100, "a", 2)
    assert torch.equal(torch.get_rng_state(), before), "the global generator is left as it was"
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert not torch.equal(first.x_ND, other.x_ND)


@pytest.mark.parametrize(
    "changes",
    [
        {"roots": 0}, {"roots": 2.0}, {"free": -1}, {"branching": 1}, {"depth": 0}, {"width": 0},
        {"p_root": 0.0}, {"p_root": 1.0}, {"p_free": -0.1}, {"p_child": 0.5},
        {"p_child": math.nan},
        {"magnitude_sd": -0.1}, {"noise": math.inf}, {"norm_spreads": ()},
        {"norm_spreads": (0.0, -1.0)},
    ],
    ids=str,
)  # fmt: skip
def test_a_bad_value_of_a_world_is_refused_by_name(changes):
    (name,) = changes
    with pytest.raises(ExperimentError, match=f"WORLDS: {name}="):
        World(**changes)


# ── In the place of a language model ────────────────────────────────────────────────────────────


def test_a_layer_spreads_the_norms_of_the_same_rows(known):
    numbers = torch.arange(DOCUMENT).view(8, -1)
    found = known.residuals(numbers)
    ratio = found[1].norm(dim=-1) / found[0].norm(dim=-1)
    assert ratio.log().std() == pytest.approx(0.25, abs=0.02)
    cosine = torch.nn.functional.cosine_similarity(found[0], found[1], dim=-1)
    assert cosine.min() > 1 - 1e-5


def test_the_text_of_a_world_is_its_rows_in_order_and_the_heldout_ones_are_known(known, vectors):
    scale = tiny_world(layers=(0, 1))
    contexts, first = heldout_contexts(scale, known)
    assert contexts.shape == (128, 32)
    assert (contexts[:, 0] == BOS).all()
    numbers = contexts[~known.is_special(contexts)]
    assert torch.equal(numbers, torch.arange(len(numbers)))
    assert (contexts == EOS).sum() == len(numbers) // DOCUMENT
    assert first * DOCUMENT >= len(numbers)
    # What is said to be on is what the rows are made of.
    strengths = known.residuals(contexts)[0][~known.is_special(contexts)] @ vectors.T
    assert torch.equal(strengths > 0.5, known.on_NK[numbers])


def test_a_world_is_sampled_once_and_rebuilt_alike(known, monkeypatch, tmp_path):
    monkeypatch.setenv("COSINE_SAE_CACHE", str(tmp_path))
    scale = tiny_world(layers=(0, 1))
    first = load_world(scale)
    (entry,) = (path for path in (tmp_path / "worlds").iterdir() if path.is_dir())
    made = (entry / "rows.safetensors").stat().st_mtime_ns
    load_world(replace(scale, name="another", n_seeds=3))
    assert (entry / "rows.safetensors").stat().st_mtime_ns == made
    assert json.loads(json_text(first.identity))["world"] == asdict(World()) | {
        "norm_spreads": [0.0, 0.25]
    }
    tokens = torch.arange(100)[None]
    for layer in (0, 1):
        assert torch.equal(first.residuals(tokens)[layer], known.residuals(tokens)[layer])
    assert all(torch.equal(a, b) for a, b in zip(first.online, known.online, strict=True))


def test_a_world_or_a_layer_that_there_is_not_is_refused(monkeypatch, known):
    with pytest.raises(ExperimentError, match="the world 'mine' is not one of trees, no trees"):
        load_world(tiny_world(language_model="world:mine"))
    with pytest.raises(ExperimentError, match="layer 2 does not exist"):
        type(known)(known.world, "w", (2,), None, {})


@pytest.mark.parametrize(
    ("said", "changes"),
    [
        ("tasks=", {"tasks": ("news",)}),
        ("must both be a world's", {"text": "sae-probes"}),
        ("must both be a world's", {"language_model": "pypi:smollm2"}),
    ],
)
def test_a_scale_of_half_a_world_is_refused(said, changes):
    with pytest.raises(ExperimentError, match=said):
        tiny_world(**changes)
