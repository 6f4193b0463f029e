"""What the latents of a run mean, as JSON Lines: absorption word by word, and latents by example.

Of every layer one SAE is shown, the first seed of the middle target; the others are only asked for
their most similar latent.  docs/features.md says what every field is.
"""

import json
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from string import ascii_lowercase

import torch
from safetensors.torch import load_file

from lab.absorption import evaluate_absorption, first_letter_probes
from lab.activations import Calibration, harvest
from lab.features_page import page
from lab.fidelity import HeldOut
from lab.folders import FEATURES
from lab.language_model import LanguageModel
from lab.probing import MeanByText, in_cache, probing_artifacts
from lab.process import Clock
from lab.saved_sae import load_sae
from lab.scales import Scale
from lab.seeds import seed_for
from lab.storage import write_atomically
from lab.word_by_word import WordsSeen, add_rates, on_words, short

AT_RANDOM = 30
MOST_LATENTS, MOST_WORDS = 900, 360  # of all layers together; of a letter's, the same
BINS, EXAMPLES, FROM_THE_MIDDLE, BEFORE, AFTER = 24, 8, 3, 14, 8
PROMOTED, NEAREST = 10, 5
TEXTS = 64  # of a class, where the residuals of probing texts are not kept


def write_features(
    evaluated: Path,
    config: dict,
    scale: Scale,
    lm: LanguageModel,
    units: dict[int, Calibration],
    saved: dict[int, dict[str, Path]],
    heldout_NL: torch.Tensor,
    clock: Clock,
) -> None:
    """features.jsonl and features.html beside the folder `evaluated` of a run's configuration, from
    its saved SAEs {layer: {name: folder}}, names by target and seed.  Of a world with known
    features, which has no words, nothing."""
    if scale.world:
        return
    folder, name, title = evaluated.parent, config["run_name"], config["run"]["title"]
    about = {"kind": "about", "run": name, "title": title, "scale": scale.name, "model": lm.name}
    about |= {"heldout": list(heldout_NL.shape), "n_seeds": scale.n_seeds}
    about |= {"tasks": list(scale.tasks), "absorption_words": scale.absorption_words}
    lines = [about, *feature_lines(scale, lm, units, saved, heldout_NL)]
    write_atomically(folder / FEATURES[0], "".join(f"{json_line(line)}\n" for line in lines))
    write_atomically(folder / FEATURES[1], page(lines))
    clock.lap("features")


def json_line(line: dict) -> str:
    """In ASCII: a token may hold anything, half of a surrogate pair too, which UTF-8 cannot say."""
    return json.dumps(line, allow_nan=False, separators=(",", ":"))


def feature_lines(
    scale: Scale,
    lm: LanguageModel,
    units: dict[int, Calibration],
    saved: dict[int, dict[str, Path]],
    heldout_NL: torch.Tensor,
) -> Iterator[dict]:
    """Of each layer its SAE, its scored letters, the best latent of every class of the probing
    tasks, and the latents that all of these name, with some at random."""
    reading, pieces = lm.reading_in(getattr(torch, scale.evaluation_dtype)), Pieces(lm.tokenizer)
    for layer, paths in saved.items():
        shown, *others = seeds_shown(scale, paths)
        seen = WordsSeen(MOST_WORDS // len(saved), seed_for("features", scale.name, layer))
        letters = scored_letters(scale, lm, layer, shown, paths[shown], seen)
        sae = load_sae(paths[shown]).to(lm.device)
        tasks = list(best_latents(scale, reading, layer, sae))
        roles = roles_of(letters, tasks, scale, layer, sae.cfg.d_sae, MOST_LATENTS // len(saved))
        chosen, norm = sorted(roles), units[layer].outlier_norm
        held = HeldOut(lm, heldout_NL, layer, norm, scale.lm_batch, scale.keep_activations)
        corpus = Corpus(sae, held, chosen)
        texts, words = Texts(corpus.acts_NLC, heldout_NL, pieces), on_words(sae, seen, chosen)
        add_rates(letters, dict(zip(chosen, words, strict=True)))
        columns = [
            [{"kind": "latent", "layer": layer, "latent": i, "roles": roles[i]} for i in chosen],
            [corpus.of_latent(i) for i in range(len(chosen))],
            [texts.of_latent(i) for i in range(len(chosen))],
            words,
            promoted(reading, sae.W_dec[chosen], pieces),
            nearest(sae.W_dec, chosen),
            in_other_seeds(sae.W_dec[chosen], [load_sae(paths[other]).W_dec for other in others]),
        ]
        yield {
            "kind": "sae", "layer": layer, "sae": shown, "others": others, "d_sae": sae.cfg.d_sae,
            "target_l0": scale.sae_targets[list(paths).index(shown)], "l0": short(corpus.l0),
            "tokens": corpus.tokens, "dead": short(corpus.dead),
        }  # fmt: skip
        yield from ({"kind": "letter", "layer": layer} | letter for letter in letters)
        yield from ({"kind": "task", "layer": layer} | task for task in tasks)
        for parts in zip(*columns, strict=True):
            yield {name: value for part in parts for name, value in part.items()}


def scored_letters(
    scale: Scale, lm: LanguageModel, layer: int, name: str, path: Path, seen: WordsSeen
) -> list[dict]:
    """The letters that SAE-Bench scores of one SAE; none where the model knows too few of them."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "absorption"
        (found,) = evaluate_absorption(scale, lm, layer, {name: path}, folder, seen)
    details = (found["sae_bench"] or {"eval_result_details": []})["eval_result_details"]
    scored = sorted(detail["first_letter"] for detail in details)
    f1 = load_file(first_letter_probes(scale, lm, layer) / "probe.safetensors")["f1"].tolist()
    return [
        {"letter": letter, "f1": short(f1[ascii_lowercase.index(letter)]), **seen.letters[letter]}
        for letter in scored
    ]


def seeds_shown(scale: Scale, paths: dict[str, Path]) -> list[str]:
    """Names of the SAEs of the middle target: the first is shown."""
    first = len(scale.target_l0s) // 2 * scale.n_seeds
    return list(paths)[first : first + scale.n_seeds]


class Pieces:
    """Tokens as a reader can tell them apart: with their spaces, and broken bytes by number."""

    def __init__(self, tokenizer):
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        self.tokenizer = tokenizer
        self.byte = {char: byte for byte, char in bytes_to_unicode().items()}
        self.text = cache(self._text)

    def _text(self, number: int) -> str:
        token = self.tokenizer.convert_ids_to_tokens(number)
        text = self.tokenizer.convert_tokens_to_string([token])
        if "\ufffd" in text and all(char in self.byte for char in token):
            values = (self.byte[char] for char in token)
            return "".join(chr(v) if 32 <= v < 127 else f"<0x{v:02X}>" for v in values)
        return f" {text}" if token.startswith("▁") and not text.startswith(" ") else text


# ┌────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Probing tasks                                                                                  │
# └────────────────────────────────────────────────────────────────────────────────────────────────┘


@torch.no_grad()
def best_latents(scale: Scale, lm: LanguageModel, layer: int, sae) -> Iterator[dict]:
    """Of every class of every probing task the latent whose mean over the class's training texts
    differs most from its mean over the other classes', as SAE-Bench chooses one for k = 1."""
    artifacts = probing_artifacts(scale, lm)
    for task in scale.tasks:
        file = f"blocks.{layer}.hook_resid_post/{task.replace('/', '_')}_activations.pt"
        handles = torch.load(next(artifacts.rglob(file)), weights_only=True)["train"]
        means = {
            label: text_means(
                scale, lm, layer, artifacts / f"{handle.split('/')[1]}.safetensors", sae
            )
            for label, handle in handles.items()
        }
        for label, own in means.items():
            others = [means[other] for other in means if other != label]
            elsewhere = torch.stack([other.mean(0) for other in others]).mean(0)
            latent = int((own.mean(0) - elsewhere).abs().argmax())
            a, b = own[:, latent], torch.cat([other[:, latent] for other in others])
            above = (a[:, None] > b).float().mean() + (a[:, None] == b).float().mean() / 2
            yield {
                "task": task, "class": str(label), "latent": latent, "texts": len(a),
                "mean": short(a.mean()), "mean_others": short(elsewhere[latent]),
                "auc": short(above),
            }  # fmt: skip


def text_means(scale: Scale, lm: LanguageModel, layer: int, path: Path, sae) -> torch.Tensor:
    """Mean latents [texts, F] of one class's texts, the first TEXTS where a language model has to
    read them again."""
    held, at = load_file(path), lm.layers.index(layer)
    if "residuals" in held:
        n, owners, rows = len(held["tokens"]), held["owners"], held["residuals"][:, at]
    else:
        tokens = held["tokens"][:TEXTS]
        n, owners = len(tokens), (~lm.is_special(tokens)).nonzero()[:, 0]
        rows = harvest(lm, tokens, scale.lm_batch)[:, at]
    mean = MeanByText(n, sae.cfg.d_sae, lm.device)
    for owner, x in in_cache(zip(owners.split(4096), rows.split(4096), strict=True)):
        mean.add(owner.to(lm.device), sae.encode(x.to(lm.device)))
    return mean.result().cpu()


# ┌────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Latents                                                                                        │
# └────────────────────────────────────────────────────────────────────────────────────────────────┘


def roles_of(
    letters: list[dict], tasks: list[dict], scale: Scale, layer: int, d_sae: int, most: int
) -> dict[int, list[dict]]:
    """{latent: why it is shown}: as a letter's main latent, as the best of a task, at random, and
    as one that absorbs, those of most words first, up to `most` latents in all."""
    roles: dict[int, list[dict]] = {}
    for letter in letters:
        for main in letter["main"]:
            role = {"role": "main", "letter": letter["letter"], "cos": main["cos"]}
            roles.setdefault(main["latent"], []).append(role)
    for task in tasks:
        role = {"role": "task", "task": task["task"], "class": task["class"], "auc": task["auc"]}
        roles.setdefault(task["latent"], []).append(role)
    generator = torch.Generator().manual_seed(seed_for("features", "random", scale.name, layer))
    for latent in torch.randperm(d_sae, generator=generator)[:AT_RANDOM].tolist():
        roles.setdefault(latent, []).append({"role": "random"})
    absorbers = [
        (-absorber["words"], letter["letter"], absorber["latent"], absorber["cos"])
        for letter in letters
        for absorber in letter["absorbers"]
    ]
    for words, letter, latent, cos in sorted(absorbers):
        if latent in roles or len(roles) < most:
            role = {"role": "absorbs", "letter": letter, "cos": cos, "words": -words}
            roles.setdefault(latent, []).append(role)
    return roles


class Corpus:
    """The chosen latents on held-out text: acts_NLC, NaN where a token is not scored (special ones
    and outliers, which the SAE was not trained on)."""

    @torch.no_grad()
    def __init__(self, sae, held: HeldOut, chosen: list[int]):
        scored_N, x_ND = held.scored_NL.flatten(), held.residuals_NLD.flatten(0, 1)
        fired_F, acts = torch.zeros(sae.cfg.d_sae, device=x_ND.device), []
        for scored, x in in_cache(zip(scored_N.split(4096), x_ND.split(4096), strict=True)):
            f = sae.encode(x)
            fired_F += (f[scored] > 0).sum(0)
            acts.append(f[:, chosen].masked_fill(~scored[:, None], torch.nan).cpu())
        self.acts_NLC = torch.cat(acts).view(*held.scored_NL.shape, len(chosen))
        self.tokens = int(scored_N.sum())
        self.l0, self.dead = fired_F.sum() / self.tokens, (fired_F == 0).float().mean()

    def of_latent(self, i: int) -> dict:
        """How often and how strongly it fires; nulls where it never does."""
        acts = self.acts_NLC[..., i].flatten()
        fires = acts[acts > 0]
        most = float(fires.max()) if len(fires) else None
        counts = torch.histc(fires, BINS, 0, most).int().tolist() if len(fires) else None
        return {
            "fires": len(fires),
            "density": short(len(fires) / self.tokens),
            "mean": short(fires.mean()) if len(fires) else None,
            "max": most and short(most),
            "histogram": counts,  # of what fires, between 0 and max
        }


class Texts:
    """Held-out text around the tokens on which latents fire."""

    def __init__(self, acts_NLC: torch.Tensor, tokens_NL: torch.Tensor, pieces: Pieces):
        self.acts_NLC, self.pieces = acts_NLC, pieces
        self.tokens = tokens_NL.tolist()
        self.peaks_CN, self.places_CN = (
            found.T.contiguous() for found in acts_NLC.nan_to_num(-1).max(dim=1)
        )

    def of_latent(self, i: int) -> dict:
        """{"examples": its strongest tokens, one of a context, "middle": those nearest to half of
        its maximum}, each with the text around it and the latent's activation on that."""
        peaks = self.peaks_CN[i]
        order = peaks.argsort(descending=True, stable=True)
        order = order[peaks[order] > 0]
        best, others = order[:EXAMPLES], order[EXAMPLES:]
        to_half = (peaks[others] - peaks[order[:1]] / 2).abs()
        middle = others[to_half.argsort(stable=True)[:FROM_THE_MIDDLE]]
        return {
            name: [self._around(i, n) for n in contexts.tolist()]
            for name, contexts in (("examples", best), ("middle", middle))
        }

    def _around(self, i: int, n: int) -> dict:
        at = int(self.places_CN[i, n])
        first, last = max(1, at - BEFORE), at + AFTER + 1  # BOS is in front of every context
        acts = self.acts_NLC[n, first:last, i].tolist()
        return {
            "tokens": [self.pieces.text(token) for token in self.tokens[n][first:last]],
            "acts": [None if a != a else short(a, 3) for a in acts],
            "at": at - first,
            "context": n,
        }


@torch.no_grad()
def promoted(lm: LanguageModel, rows_CD: torch.Tensor, pieces: Pieces) -> list[dict]:
    """The tokens whose logits a decoder row raises and lowers most, less its mean over tokens."""
    found, n = [], len(pieces.tokenizer)
    for some in rows_CD.split(64):
        logits_CV = lm.logits_of(some)[:, :n]
        logits_CV = logits_CV - logits_CV.mean(-1, keepdim=True)
        ends = [logits_CV.topk(PROMOTED, largest=largest) for largest in (True, False)]
        for values in zip(*(part.tolist() for top in ends for part in top), strict=True):
            up, up_tokens, down, down_tokens = values
            pairs = {"promoted": (up_tokens, up), "suppressed": (down_tokens, down)}
            found.append({
                name: [[pieces.text(t), short(x, 3)] for t, x in zip(*pair, strict=True)]
                for name, pair in pairs.items()
            })  # fmt: skip
    return found


@torch.no_grad()
def nearest(W_dec: torch.Tensor, chosen: list[int]) -> list[dict]:
    """{"nearest": [[latent, cosine]] by decoder rows, which are unit}, of each."""
    cos_CF = W_dec[chosen] @ W_dec.T
    cos_CF.scatter_(1, torch.tensor(chosen, device=cos_CF.device)[:, None], -2)  # not itself
    top = cos_CF.topk(min(NEAREST, len(W_dec) - 1))
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return [{"nearest": [[i, short(c)] for i, c in zip(*p, strict=True)]} for p in pairs]


@torch.no_grad()
def in_other_seeds(rows_CD: torch.Tensor, decoders: list[torch.Tensor]) -> list[dict]:
    """{"seeds": for each other seed [its most similar latent, the cosine]}, of each."""
    found = [(rows_CD @ W_dec.to(rows_CD.device).T).max(dim=-1) for W_dec in decoders]
    return [
        {"seeds": [[int(best.indices[c]), short(best.values[c])] for best in found]}
        for c in range(len(rows_CD))
    ]
