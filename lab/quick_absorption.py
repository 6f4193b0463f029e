"""SAE-Bench's absorption of words with its own results in less time: a letter's words at once.

The prompts of a layer are asked of the language model once.  Beside SAE-Bench's scores it is noted
what becomes of each word, and how well the SAE does on the words that absorption is scored on.

Each function stands for one of SAE-Bench's of the same name and draws the same random numbers in
the same order.
"""

import re
from typing import NamedTuple

import numpy as np
import torch


def _parse_probe_data_split(
    tokenizer, split_activations: torch.Tensor, split_labels: list[int], df
) -> tuple[torch.Tensor, list[tuple[str, int]]]:
    """Activations of words, and (word, letter); tokens such as <0x6A> are left out."""
    rows, words = [], []
    for i, (token, label) in enumerate(zip(df["token"].tolist(), split_labels, strict=True)):
        if isinstance(token, str) and not re.match(r"[\d<>]", token):
            rows.append(i)
            words.append((tokenizer.convert_tokens_to_string([token]), label))
    return split_activations[rows], words


def fraction_and_full(
    main_N: torch.Tensor,
    absorbed_N: torch.Tensor,
    top_N: torch.Tensor,
    aligned_N: torch.Tensor,
    silent_N: torch.Tensor,
    projection_N: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """SAE-Bench's absorption of N words (feature_absorption_calculator.py): (fraction, full) [N].

    Args:
        main_N: what the letter's main latents carry of the residual's projection on its probe.
        absorbed_N: what the top 3 other aligned latents carry.
        top_N, aligned_N: what the latent that carries most does, and whether it is aligned.
        silent_N: whether no main latent fires.
        projection_N: the residual's projection itself.
    """
    missing_N = torch.minimum(absorbed_N, projection_N - main_N)
    fraction_N = (missing_N / (missing_N + main_N)).clamp(0, 1)
    fraction_N = torch.where(main_N <= 0, torch.ones_like(main_N), fraction_N)
    not_absorbed_N = (main_N >= projection_N) | (absorbed_N / projection_N < 0.4)
    fraction_N = fraction_N.masked_fill(not_absorbed_N, 0)
    full_N = silent_N & aligned_N & (projection_N >= 0) & (top_N / projection_N >= 0.4)
    return fraction_N, full_N


class OfWords(NamedTuple):
    """What an SAE makes of N words, each read at its last token."""

    fraction_N: np.ndarray  # SAE-Bench's absorption fraction
    full_N: np.ndarray  # SAE-Bench's full absorption: main latents are silent, another carries it
    silent_N: np.ndarray  # whether the letter's main latents are silent
    carrier_N: np.ndarray  # the latent that carries most of the projection on the letter's probe
    rate_F: np.ndarray  # share of the words on which a latent fires
    l0_N: np.ndarray  # latents that fire
    error_N: np.ndarray  # ||x - x_hat||^2


class AbsorptionOfWords:
    """Absorption of the words that each letter's probe finds, all of a letter's at once.

    The words are those of the first-letter probe, the same for every SAE of a layer, and so are
    their prompts, for which the seed is set anew: they are asked of the language model once.
    """

    def __init__(self):
        self.asked: tuple[int, dict[str, list[str]]] | None = None  # (layer, words by letter)
        self.residuals: dict[str, torch.Tensor] = {}  # letter -> [words, D]
        self.found: dict[int, dict[str, OfWords]] = {}  # id(sae) -> letter -> what it makes of them

    @torch.no_grad()
    def calculate_projection_and_cos_sims(
        self, calculator, sae, probe, layer: int, likely_negs: dict
    ):
        from pandas import DataFrame, concat
        from sae_bench.evals.absorption.vocab import LETTERS

        words = {letter: stats.potential_false_negatives for letter, stats in likely_negs.items()}
        if (layer, words) != self.asked:
            self.residuals = self._residuals(calculator, words, f"blocks.{layer}.hook_resid_post")
            self.asked = layer, words
        tables, own = [], self.found.setdefault(id(sae), {})
        for letter, stats in likely_negs.items():
            if not words[letter]:
                continue
            batches = self.residuals[letter].split(calculator.batch_size)
            direction = probe.weights[LETTERS.index(letter)]
            found = own[letter] = absorption(sae, batches, direction, stats.split_feats)
            columns = {
                "letter": letter,
                "token": words[letter],
                "num_probe_true_positives": stats.probe_true_positives,
                "split_feats": [stats.split_feats] * len(words[letter]),
                "absorption_fraction": found.fraction_N,
                "is_full_absorption": found.full_N,
            }
            tables.append(DataFrame(columns))
        return concat(tables, ignore_index=True)

    @staticmethod
    def _residuals(calculator, words: dict[str, list[str]], hook: str) -> dict[str, torch.Tensor]:
        """At the last token of each word, in a prompt of its own with ten examples."""
        model, found = calculator.model, {}
        for letter, of_letter in words.items():
            prompts = [prompt.base for prompt in calculator._build_prompts(of_letter)]
            if not prompts:
                continue
            tokens = model.tokenizer(prompts).input_ids
            if len({*map(len, tokens)}) > 1:
                raise ValueError("All prompts must have the same token length!")
            batches = torch.tensor(tokens).split(calculator.batch_size)
            read = (model.run_with_cache(batch, names_filter=[hook])[1][hook] for batch in batches)
            found[letter] = torch.cat([acts[:, calculator.word_token_pos] for acts in read])
        return found


@torch.no_grad()
def absorption(
    sae, batches: list[torch.Tensor], direction: torch.Tensor, main: list[int]
) -> OfWords:
    """Of one letter's words, their residuals in batches [B, D], from the same batches and in the
    same precision as SAE-Bench's, one word after the other."""
    direction = direction / direction.norm()
    cos_F = torch.nn.functional.cosine_similarity(direction.to(sae.device), sae.W_dec, dim=-1)
    cos_F = cos_F.float()
    acts_NF = torch.cat([sae.encode(x) for x in batches])
    along = direction.to(acts_NF.device, acts_NF.dtype)
    projection_N = torch.cat([x @ along for x in batches]).double()
    part_NF = acts_NF * cos_F
    main_N = part_NF[:, main].cpu().sum(-1).double()  # there, as SAE-Bench: in the same order
    others_NF = part_NF.index_fill(1, torch.tensor(main, device=cos_F.device), 0)
    others_NF = others_NF.masked_fill(cos_F < 0.1, 0).clamp_min(0)
    absorbed_N = others_NF.topk(min(3, others_NF.shape[-1])).values.sum(-1).double()
    index_N = part_NF.argmax(-1)
    top_N = acts_NF.gather(1, index_N[:, None])[:, 0].double() * cos_F[index_N].double()
    silent_N = (acts_NF[:, main] < 1e-8).all(-1)
    scores = fraction_and_full(
        main_N.to(top_N.device), absorbed_N, top_N, cos_F[index_N] >= 0.025, silent_N, projection_N
    )
    x_hat_ND = sae.decode(acts_NF)
    error_N = (torch.cat(batches).to(x_hat_ND.device) - x_hat_ND).double().square().sum(-1)
    fires_NF = acts_NF > 0
    found = *scores, silent_N, index_N, fires_NF.float().mean(0), fires_NF.sum(-1), error_N
    return OfWords(*(of_words.cpu().numpy() for of_words in found))


def of_the_letter(letter: str, found: dict[str, OfWords]) -> np.ndarray:
    """Which latents [F] follow a letter: they fire on at least half of its words, and at most half
    as often on those of the other letters of `found`."""
    others = [(words.rate_F, len(words.full_N)) for name, words in found.items() if name != letter]
    off_F = sum(rate_F * n for rate_F, n in others) / max(1, sum(n for _, n in others))
    on_F = found[letter].rate_F
    return (on_F >= 0.5) & (off_F <= on_F / 2)


def shares_of_words(
    letters: list[str], found: dict[str, OfWords], residuals: dict[str, torch.Tensor]
) -> dict[str, float]:
    """What becomes of the words of some letters: each letter's shares, then their mean over letters
    as SAE-Bench has it, so that `absorbed` is its full absorption; of all words together the L0
    and FVU.

    A word's main latents fire, or it is absorbed (they are silent, and another latent carries at
    least 0.4 of the residual's projection on the probe), or lost (silent, and none does).  Of the
    absorbed, those that went to a latent of the letter itself say which main latent the sparse
    probe chose, and nothing of a feature that another has swallowed.
    """
    found = {letter: found[letter] for letter in letters}
    of_letters = list(found.values())
    to_letters = [
        (words.full_N & of_the_letter(letter, found)[words.carrier_N]).mean()
        for letter, words in found.items()
    ]
    fires = float(np.mean([1 - words.silent_N.mean() for words in of_letters]))
    absorbed = float(np.mean([words.full_N.mean() for words in of_letters]))
    x_ND = torch.cat([residuals[letter] for letter in letters]).double()
    spread = (x_ND - x_ND.mean(0)).square().sum().item()
    return {
        "absorption_main_fires": fires,
        "absorption_absorbed": absorbed,
        "absorption_absorbed_by_its_letter": float(np.mean(to_letters)),
        "absorption_lost": 1 - fires - absorbed,
        "l0_on_words": float(np.concatenate([words.l0_N for words in of_letters]).mean()),
        "fvu_on_words": float(sum(words.error_N.sum() for words in of_letters)) / spread,
    }
