"""What each word's projection on its letter's probe is made of: the absorption score, seen.

SAE-Bench says how many words of a letter are absorbed; here is which, by which latent, and how
much of the projection every part of the SAE's reconstruction carries.
"""

import itertools
from collections import Counter
from collections.abc import Iterable

import torch

from lab.metrics import rounded
from lab.quick_absorption import AbsorptionOfWords

CARRIERS = 4  # latents named for each word, beside the main ones
BEST_WORDS = 10


def short(x: float | torch.Tensor, digits: int = 4) -> float:
    """To so many significant digits."""
    return rounded(float(x), digits)


class WordsSeen(AbsorptionOfWords):
    """SAE-Bench's absorption of one SAE, and of each letter what its words' projections are made
    of.  At most `most` words of a letter are listed, drawn with `seed`; all of them are counted."""

    def __init__(self, most: int, seed: int):
        super().__init__()
        self.most, self.seed = most, seed
        self.letters: dict[str, dict] = {}
        self.listed: dict[str, tuple[list[str], torch.Tensor]] = {}  # letter -> words, residuals

    @torch.no_grad()
    def calculate_projection_and_cos_sims(self, calculator, sae, probe, layer, likely_negs):
        from sae_bench.evals.absorption.vocab import LETTERS

        table = super().calculate_projection_and_cos_sims(
            calculator, sae, probe, layer, likely_negs
        )
        for letter, stats in likely_negs.items():
            if words := stats.potential_false_negatives:
                of_letter = table[table["letter"] == letter]
                scores = of_letter["absorption_fraction"], of_letter["is_full_absorption"]
                x_ND, direction = self.residuals[letter], probe.weights[LETTERS.index(letter)]
                seen = word_by_word(sae, x_ND, direction, stats.split_feats, words, *scores)
                generator = torch.Generator().manual_seed(self.seed)
                kept = torch.randperm(len(words), generator=generator)[: self.most].sort().values
                seen["words"] = [seen["words"][i] for i in kept]
                self.letters[letter] = seen
                self.listed[letter] = [words[i] for i in kept], x_ND[kept.to(x_ND.device)]
        return table


def word_by_word(
    sae,
    x_ND: torch.Tensor,
    direction: torch.Tensor,
    main: list[int],
    words: list[str],
    fraction: Iterable[float],
    full: Iterable[bool],
) -> dict:
    """One letter's words with what their residuals' projections on the probe are sums of:

        x . d = sum over latents of f_i cos_i  +  b_dec . d  +  (x - x_hat) . d

    where d is the unit probe and cos_i the cosine with a (unit) decoder row; `fraction` and `full`
    are SAE-Bench's scores of the words.  Words whose main latents are silent are absorbed (full) or
    lost."""
    d = direction.float().to(x_ND.device)
    d = d / d.norm()
    cos_F, bias = sae.W_dec.float() @ d, float(sae.b_dec.float() @ d)
    lines, fates, absorbed_by = [], Counter(), Counter()
    scores = zip(words, fraction, full, strict=True)
    for x_BD in x_ND.split(1024):
        f_BF = sae.encode(x_BD).float()
        part_BF, projection_B = f_BF * cos_F, x_BD.float() @ d
        main_B, silent_B = part_BF[:, main].sum(-1), (f_BF[:, main] < 1e-8).all(-1)
        others_BF = part_BF.index_fill(1, torch.tensor(main, device=d.device), 0)
        top = others_BF.topk(min(CARRIERS, others_BF.shape[1]))
        rest_B = others_BF.sum(-1) - top.values.clamp_min(0).sum(-1)
        error_B = projection_B - main_B - others_BF.sum(-1) - bias
        columns = [projection_B, main_B, rest_B, error_B, silent_B, top.indices, top.values]
        rows = zip(
            *(c.tolist() for c in columns), f_BF.gather(1, top.indices).tolist(), strict=True
        )
        for row, (word, of_word, is_full) in zip(
            rows, itertools.islice(scores, len(x_BD)), strict=True
        ):
            projection, of_main, rest, error, silent, latents, parts, acts = row
            fate = "absorbed" if is_full else "lost" if silent else "fires"
            fates[fate] += 1
            if is_full:
                absorbed_by[latents[0]] += 1
            carried = [
                [latent, short(act), short(part)]
                for latent, act, part in zip(latents, acts, parts, strict=True)
                if part > 0
            ]
            lines.append({
                "word": word, "fate": fate, "fraction": short(of_word),
                "projection": short(projection), "main": short(of_main), "carried": carried,
                "rest": short(rest), "bias": short(bias), "error": short(error),
            })  # fmt: skip
    return {
        "main": [{"latent": latent, "cos": short(cos_F[latent])} for latent in main],
        "counts": {"words": len(words)} | {f: fates[f] for f in ("fires", "absorbed", "lost")},
        "fraction": short(sum(fraction) / len(words)),
        "absorbers": [
            {"latent": latent, "cos": short(cos_F[latent]), "words": n}
            for latent, n in sorted(absorbed_by.items(), key=lambda item: (-item[1], item[0]))
        ],
        "words": lines,
    }


@torch.no_grad()
def on_words(sae, seen: WordsSeen, chosen: list[int]) -> list[dict]:
    """Of each chosen latent {"words": [[word, activation]], those of the absorption prompts it
    fires on most, "letters": {letter: share of its words on which it fires}}."""
    if not seen.listed:
        return [{"words": [], "letters": {}} for _ in chosen]
    names = [word for found, _ in seen.listed.values() for word in found]
    acts = [
        torch.cat([sae.encode(x)[:, chosen].float().cpu() for x in x_ND.split(1024)])
        for _, x_ND in seen.listed.values()
    ]
    shares_LC = torch.stack([(acts_NC > 0).float().mean(0) for acts_NC in acts])
    top = torch.cat(acts).topk(min(BEST_WORDS, len(names)), dim=0)
    pairs = zip(top.indices.T.tolist(), top.values.T.tolist(), strict=True)
    best = [[[names[i], short(a)] for i, a in zip(*p, strict=True) if a > 0] for p in pairs]
    shares = [
        dict(zip(seen.listed, map(short, of_latent), strict=True)) for of_latent in shares_LC.T
    ]
    return [{"words": w, "letters": s} for w, s in zip(best, shares, strict=True)]


def add_rates(letters: list[dict], words: dict[int, dict]) -> None:
    """Add to each letter's main and absorbing latents on how many of its own words ("on") and of
    the other scored letters' ("off") they fire: whether a latent is one of the letter at all."""
    counts = {letter["letter"]: letter["counts"]["words"] for letter in letters}
    for letter in letters:
        for latent in letter["main"] + letter["absorbers"]:
            shares = words.get(latent["latent"], {}).get("letters", {})
            others = {n: counts[n] for n in counts.keys() & shares.keys() - {letter["letter"]}}
            off = sum(shares[n] * counts[n] for n in others) / max(1, sum(others.values()))
            known = bool(shares)  # null of an absorbing latent that is not among those shown
            latent["on"] = shares[letter["letter"]] if known else None
            latent["off"] = short(off) if known else None
