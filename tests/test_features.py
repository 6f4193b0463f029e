"""features.jsonl: what it says of words, tasks and latents is what the saved SAE computes."""

import json
from types import SimpleNamespace

import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_quick_absorption import letters, prompted  # noqa: F401 - a fixture

import lab.features
from lab.features import (
    EXAMPLES,
    Pieces,
    Texts,
    in_other_seeds,
    json_line,
    nearest,
    roles_of,
    seeds_shown,
    write_features,
)
from lab.fidelity import HeldOut
from lab.probing import probing_artifacts
from lab.process import Clock
from lab.quick_absorption import AbsorptionOfWords
from lab.saved_sae import load_sae
from lab.word_by_word import WordsSeen, add_rates, word_by_word


@pytest.fixture(scope="module")
def written(trained, evaluated, tmp_path_factory):
    """What write_features() makes of the tiny SAEs: lines by kind, the SAE shown, the folder."""
    folder, name = tmp_path_factory.mktemp("features"), next(iter(trained.saved))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COSINE_SAE_CACHE", str(evaluated.cache))
        arguments = {1: trained.trainer.units}, {1: trained.saved}, trained.heldout, Clock()
        config = {"run_name": "run_1", "run": {"title": "a title"}}
        write_features(folder / "eval", config, trained.scale, trained.lm, *arguments)
        norm, batch = trained.trainer.units.outlier_norm, trained.scale.lm_batch
        held = HeldOut(trained.lm, trained.heldout, 1, norm, batch)
        artifacts = probing_artifacts(
            trained.scale, trained.lm.reading_in(getattr(torch, trained.scale.evaluation_dtype))
        )
    text = (folder / "features.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    kinds = {line["kind"] for line in lines}
    found = {kind: [line for line in lines if line["kind"] == kind] for kind in kinds}
    sae = load_sae(trained.saved[name])
    return SimpleNamespace(
        **found, sae_=sae, name=name, held=held, artifacts=artifacts, lines=lines, folder=folder
    )


# ── Words ───────────────────────────────────────────────────────────────────────────────────────


def test_the_letters_are_those_that_sae_bench_scores_with_its_own_numbers(written, evaluated):
    details = evaluated.scores[0][1]["sae_bench"]["eval_result_details"]
    assert [line["letter"] for line in written.letter] == [d["first_letter"] for d in details]
    for line, its in zip(written.letter, details, strict=True):
        assert line["counts"]["words"] == len(line["words"]) == its["num_probe_true_positives"]
        assert line["counts"]["absorbed"] == its["num_full_absorption"]
        assert line["fraction"] == pytest.approx(its["mean_absorption_fraction"], rel=1e-3)
        assert len(line["main"]) == its["num_split_features"]


def test_what_carries_a_word_adds_up_to_its_projection_on_the_probe(written):
    fates = set()
    for line in written.letter:
        mains = {main["latent"] for main in line["main"]}
        for word in line["words"]:
            parts = [part for _, _, part in word["carried"]]
            total = sum(parts) + sum(word[name] for name in ("main", "rest", "bias", "error"))
            size = max(map(abs, [word["projection"], word["error"], word["rest"], *parts]))
            assert total == pytest.approx(word["projection"], abs=4e-3 * size)
            assert parts == sorted(parts, reverse=True) and all(part > 0 for part in parts)
            assert not mains & {latent for latent, _, _ in word["carried"]}
            fates.add(word["fate"])
            if word["fate"] == "absorbed":
                assert word["main"] == 0 and parts[0] / word["projection"] >= 0.4 * (1 - 1e-3)
        absorbed = [w["carried"][0][0] for w in line["words"] if w["fate"] == "absorbed"]
        assert {a["latent"]: a["words"] for a in line["absorbers"]} == {
            latent: absorbed.count(latent) for latent in set(absorbed)
        }
    assert len(fates) >= 2


def test_words_are_counted_as_they_are_scored_and_some_of_many_are_listed(letters):  # noqa: F811
    saes, probe, words, stats = letters
    for sae in saes:
        sae.b_dec = torch.full((64,), 0.1)
        calculator, _ = prompted(words)
        seen = WordsSeen(most=25, seed=0)
        table = seen.calculate_projection_and_cos_sims(calculator, sae, probe, 1, stats)
        calculator, _ = prompted(words)
        expected = AbsorptionOfWords().calculate_projection_and_cos_sims(
            calculator, sae, probe, 1, stats
        )
        assert table.to_dict() == expected.to_dict()
        assert seen.letters.keys() == {"a", "c"}, "b has no words"
        for letter, found in seen.letters.items():
            own = expected[expected["letter"] == letter].set_index("token")
            full = own["is_full_absorption"]
            assert found["counts"]["words"] == len(full)
            assert found["counts"]["absorbed"] == full.sum()
            assert sum(a["words"] for a in found["absorbers"]) == full.sum()
            assert len(found["words"]) == 25 and len(seen.listed[letter][1]) == 25
            for word in found["words"]:
                assert (word["fate"] == "absorbed") == full[word["word"]]
                fraction = own["absorption_fraction"][word["word"]]
                assert word["fraction"] == pytest.approx(fraction, rel=1e-3)
    assert sum(found["counts"]["absorbed"] for found in seen.letters.values()) > 0


def test_the_parts_of_a_word_by_hand():
    """Four latents along the axes of a plane with the probe between two of them; b_dec (1, 0)."""
    W_dec = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [-1.0, 0.0]])
    rows = {2.0: [0.0, 0.0, 5.0, 1.0], 3.0: [2.0, 0.0, 1.0, 0.0], 4.0: [0.0, 0.0, 0.0, 0.5]}
    sae = SimpleNamespace(
        W_dec=W_dec,
        b_dec=torch.tensor([1.0, 0.0]),
        encode=lambda x: torch.tensor([rows[float(row[1])] for row in x]),
    )
    x = torch.tensor([[3.0, 2.0], [3.0, 3.0], [3.0, 4.0]])
    scores = [1.0, 0.5, 1.0], [True, False, False]
    found = word_by_word(sae, x, torch.tensor([2.0, 0.0]), [0, 1], ["a", "b", "c"], *scores)
    # d = (1, 0): cosines 1, 0, .6, -1; the projection is 3 and the bias 1.
    assert found["words"] == [
        {"word": "a", "fate": "absorbed", "fraction": 1.0, "projection": 3.0, "main": 0.0,
         "carried": [[2, 5.0, 3.0]], "rest": -1.0, "bias": 1.0, "error": 0.0},
        {"word": "b", "fate": "fires", "fraction": 0.5, "projection": 3.0, "main": 2.0,
         "carried": [[2, 1.0, 0.6]], "rest": 0.0, "bias": 1.0, "error": -0.6},
        {"word": "c", "fate": "lost", "fraction": 1.0, "projection": 3.0, "main": 0.0,
         "carried": [], "rest": -0.5, "bias": 1.0, "error": 2.5},
    ]  # fmt: skip
    assert found["counts"] == {"words": 3, "fires": 1, "absorbed": 1, "lost": 1}
    assert found["main"] == [{"latent": 0, "cos": 1.0}, {"latent": 1, "cos": 0.0}]
    assert found["absorbers"] == [{"latent": 2, "cos": 0.6, "words": 1}]
    assert found["fraction"] == pytest.approx(2.5 / 3, rel=1e-3)


def test_rates_are_shares_of_a_letters_words_and_of_all_the_others():
    def letter(name: str, n: int) -> dict:
        absorbers = [{"latent": 7}, {"latent": 8}]
        return {
            "letter": name,
            "counts": {"words": n},
            "main": [{"latent": 5}],
            "absorbers": absorbers,
        }

    three = [letter("a", 10), letter("b", 20), letter("c", 40)]
    words = {
        5: {"letters": {"a": 0.5, "b": 0.2, "c": 0.05}},
        7: {"letters": {"a": 0.0, "b": 0.0, "c": 1.0}},
    }
    add_rates(three, words)
    assert three[0]["main"] == [{"latent": 5, "on": 0.5, "off": 0.1}]  # (4 + 2) of 60
    assert three[2]["absorbers"][0] == {"latent": 7, "on": 1.0, "off": 0.0}
    assert three[2]["absorbers"][1] == {"latent": 8, "on": None, "off": None}


# ── Tasks ───────────────────────────────────────────────────────────────────────────────────────


def test_the_best_latent_of_a_class_is_the_one_whose_means_differ_most(written, trained):
    assert len(written.task) == 2 + 4, "two classes of sentiment, four of news"
    means = {}
    for path in written.artifacts.rglob("*_activations.pt"):
        for label, handle in torch.load(path, weights_only=True)["train"].items():
            held = load_file(written.artifacts / f"{handle.split('/')[1]}.safetensors")
            f = written.sae_.encode(held["residuals"][:, 0])
            texts = [f[held["owners"] == i].mean(0) for i in range(len(held["tokens"]))]
            means[path.name.split("_")[0], label] = torch.stack(texts)
    for line in written.task:
        own = means[line["task"], line["class"]]
        others = [
            m
            for (task, label), m in means.items()
            if task == line["task"] and label != line["class"]
        ]
        apart = (own.mean(0) - torch.stack([m.mean(0) for m in others]).mean(0)).abs()
        assert line["latent"] == int(apart.argmax()) and line["texts"] == len(own) == 20
        a, b = own[:, line["latent"]], torch.cat(others)[:, line["latent"]]
        wins = [float(x > y) + 0.5 * float(x == y) for x in a for y in b]
        assert line["auc"] == pytest.approx(sum(wins) / len(wins), abs=1e-3)
        assert line["mean"] == pytest.approx(float(a.mean()), rel=1e-3)


def test_texts_whose_residuals_are_not_kept_are_read_again(written, trained, tmp_path):
    from safetensors.torch import save_file

    path = next(written.artifacts.glob("*.safetensors"))
    held = load_file(path)
    save_file({"tokens": held["tokens"]}, tmp_path / "bare.safetensors")
    lm = trained.lm.reading_in(getattr(torch, trained.scale.evaluation_dtype))
    both = [
        lab.features.text_means(trained.scale, lm, 1, p, written.sae_)
        for p in (path, tmp_path / "bare.safetensors")
    ]
    assert torch.allclose(*both, atol=1e-4) and len(both[0]) == len(held["tokens"])


# ── Latents ─────────────────────────────────────────────────────────────────────────────────────


def test_every_latent_that_a_letter_or_a_task_names_is_there_with_its_roles(written, trained):
    shown = {line["latent"]: line for line in written.latent}
    assert list(shown) == sorted(shown) and len(shown) == len(written.latent)
    for line in written.letter:
        for latent in line["main"] + line["absorbers"]:
            assert line["letter"] in {r.get("letter") for r in shown[latent["latent"]]["roles"]}
            assert 0 <= latent["on"] <= 1 and 0 <= latent["off"] <= 1
    for line in written.task:
        assert line["class"] in {role.get("class") for role in shown[line["latent"]]["roles"]}
    at_random = [i for i, line in shown.items() if {"role": "random"} in line["roles"]]
    assert len(at_random) == 30


def test_densities_histograms_and_texts_are_what_the_sae_computes_on_held_out_text(written):
    held = written.held
    f_NLF = written.sae_.encode(held.residuals_NLD)
    f_NLF[~held.scored_NL] = torch.nan
    assert written.sae[0]["tokens"] == int(held.scored_NL.sum())
    l0 = (f_NLF > 0).sum() / held.scored_NL.sum()
    assert written.sae[0]["l0"] == pytest.approx(float(l0), rel=1e-3)
    texts = 0
    for line in written.latent:
        acts = f_NLF[..., line["latent"]]
        fires = acts[acts > 0]
        assert line["fires"] == len(fires)
        if not len(fires):
            assert line["histogram"] is line["max"] is line["mean"] is None
            assert line["examples"] == line["middle"] == []
            continue
        assert sum(line["histogram"]) == len(fires) and len(line["histogram"]) == 24
        assert line["max"] == pytest.approx(float(fires.max()), rel=1e-3)
        assert line["examples"][0]["acts"][line["examples"][0]["at"]] == pytest.approx(
            line["max"], rel=5e-3
        )
        for text in line["examples"] + line["middle"]:
            n, peak = text["context"], text["acts"][text["at"]]
            at = int(acts[n].nan_to_num(-1).argmax())
            window = acts[n, max(1, at - 14) : at + 9].tolist()
            assert [a is None for a in text["acts"]] == [a != a for a in window]
            known = [(a, b) for a, b in zip(text["acts"], window, strict=True) if a is not None]
            assert all(a == pytest.approx(b, rel=6e-3, abs=1e-6) for a, b in known)
            assert peak == max(a for a in text["acts"] if a is not None)
            texts += 1
    assert texts > 100


def test_examples_are_one_of_a_context_strongest_first_and_the_middle_is_near_half():
    """Contexts whose one firing token is 1, 2, .. 20; context 20 does not fire."""
    acts = torch.zeros(21, 6, 1)
    acts[:, 3, 0] = torch.tensor([*range(1, 21), 0]).float()
    acts[2, 5, 0] = torch.nan
    tokens = torch.arange(21 * 6).view(21, 6)
    texts = Texts(acts, tokens, SimpleNamespace(text=str)).of_latent(0)
    peaks = [[text["acts"][text["at"]] for text in texts[name]] for name in ("examples", "middle")]
    assert peaks == [[20.0 - i for i in range(EXAMPLES)], [10.0, 11.0, 9.0]]
    first = texts["examples"][0]
    assert first["context"] == 19 and first["at"] == 2
    assert first["tokens"] == [str(19 * 6 + i) for i in range(1, 6)], "without BOS"


def test_promoted_tokens_are_those_of_the_final_norm_and_the_unembedding(written, trained):
    model, lines = trained.lm.reading_in(torch.float32).model, written.latent[:5]
    pieces = Pieces(trained.lm.tokenizer)
    norm = trained.lm.reading_in(torch.float32)._norm.weight
    for line in lines:
        row = written.sae_.W_dec[line["latent"]]
        logits = model.get_output_embeddings().weight @ (row / row.square().mean().sqrt() * norm)
        logits = logits - logits[: len(trained.lm.tokenizer)].mean()
        best = logits[: len(trained.lm.tokenizer)].argsort(descending=True)
        assert line["promoted"][0] == [
            pieces.text(int(best[0])), pytest.approx(float(logits[best[0]]), rel=1e-2)
        ]  # fmt: skip
        assert line["suppressed"][0][0] == pieces.text(int(best[-1]))
        assert len(line["promoted"]) == len(line["suppressed"]) == 10


def test_nearest_latents_and_those_of_other_seeds_by_hand():
    W_dec = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-0.6, -0.8]])
    assert nearest(W_dec, [0, 2]) == [
        {"nearest": [[1, 0.8], [2, 0.0], [3, -0.6]]},
        {"nearest": [[1, 0.6], [0, 0.0], [3, -0.8]]},
    ]
    other = torch.tensor([[0.0, 1.0], [0.6, 0.8]])
    found = in_other_seeds(W_dec[[0, 2]], [other, other.flip(0)])
    assert found == [{"seeds": [[1, 0.6], [0, 0.6]]}, {"seeds": [[0, 1.0], [1, 1.0]]}]
    assert in_other_seeds(W_dec[:1], []) == [{"seeds": []}]


def test_absorbing_latents_of_most_words_come_first_where_there_is_no_room_for_all(trained):
    letter = {"letter": "s", "main": [{"latent": 90, "cos": 0.5}]}
    letter["absorbers"] = [{"latent": i, "cos": 0.1, "words": 60 - i} for i in range(60)]
    few = roles_of([letter], [], trained.scale, 1, 96, most=35)
    all_ = roles_of([letter], [], trained.scale, 1, 96, most=1000)
    assert len(few) == 35 and {0, 1, 90} <= few.keys() < all_.keys()
    assert set(range(60)) <= all_.keys()
    assert few == roles_of([letter], [], trained.scale, 1, 96, most=35), "from a named seed"
    assert few != roles_of([letter], [], trained.scale, 2, 96, most=35)


def test_the_first_seed_of_the_middle_target_is_shown():
    scale = SimpleNamespace(target_l0s=(4.0, 8.0, 16.0), n_seeds=2)
    paths = {f"l0_{target}_seed_{seed}": None for target in (4, 8, 16) for seed in (0, 1)}
    assert seeds_shown(scale, paths) == ["l0_8_seed_0", "l0_8_seed_1"]
    assert seeds_shown(SimpleNamespace(target_l0s=(4.0,), n_seeds=6), paths)[0] == "l0_4_seed_0"


# ── Tokens, files ───────────────────────────────────────────────────────────────────────────────


def test_tokens_keep_their_spaces_and_broken_bytes_are_numbers(trained):
    tokenizer = trained.lm.tokenizer
    known = {" the": " the", "\n": "\n", "~": "~"}
    pieces = Pieces(tokenizer)
    for text, shown in known.items():
        (number,) = tokenizer(text, add_special_tokens=False).input_ids
        assert pieces.text(number) == shown
    raw = ["Ġâ", "▁cat", "Ċ", "<0xE2>"]  # bytes of a space and E2; as SentencePiece has them
    to_string = {"Ġâ": " \ufffd", "▁cat": "cat", "Ċ": "\n", "<0xE2>": "\ufffd"}
    fake = SimpleNamespace(
        convert_ids_to_tokens=raw.__getitem__, convert_tokens_to_string=lambda t: to_string[t[0]]
    )
    assert [Pieces(fake).text(i) for i in range(3)] == [" <0xE2>", " cat", "\n"]


def test_lines_are_ascii_and_hold_every_character(written):
    hostile = "\ud800 \u2028 \u202e </script> \0"
    line = json_line({"word": hostile})
    assert line.isascii() and "\n" not in line and json.loads(line)["word"] == hostile
    with pytest.raises(ValueError):
        json_line({"mean": float("nan")})


def test_the_page_shows_the_lines_of_the_file(written):
    page = (written.folder / "features.html").read_text(encoding="utf-8")
    data = page.split('<script type="application/json" id="data">')[1].split("</script>")[0]
    assert json.loads(data) == written.lines
    assert written.lines[0]["title"] == "a title" in page


def test_a_world_writes_nothing(tmp_path):
    write_features(tmp_path / "eval", {}, tiny.tiny_world(), None, {}, {}, torch.zeros(1), Clock())
    assert not list(tmp_path.iterdir())


def test_where_no_letter_is_scored_the_rest_is_shown(trained, evaluated, monkeypatch):
    monkeypatch.setenv("COSINE_SAE_CACHE", str(evaluated.cache))
    none = [{"sae_bench": None, "words": None}]
    monkeypatch.setattr(lab.features, "evaluate_absorption", lambda *_: none)
    arguments = {1: trained.trainer.units}, {1: trained.saved}, trained.heldout
    lines = list(lab.features.feature_lines(trained.scale, trained.lm, *arguments))
    assert not [line for line in lines if line["kind"] == "letter"]
    latents = [line for line in lines if line["kind"] == "latent"]
    assert len(latents) >= 30 and all(line["words"] == [] for line in latents)
