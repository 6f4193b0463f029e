"""What stands for SAE-Bench's absorption finds what its own finds, word by word; and a whole
evaluation with all that is quicker is SAE-Bench's own."""

from collections import defaultdict
from types import SimpleNamespace

import numpy
import pandas
import pytest
import torch
from tiny import scores

import lab.absorption
from lab import quick_absorption, quick_k_sparse, quick_probing


def prompted(words: dict[str, list[str]]) -> tuple[SimpleNamespace, list]:
    """A calculator whose model gives each word a residual of its own, and the batches it reads."""
    from sae_bench.evals.absorption.feature_absorption_calculator import FeatureAbsorptionCalculator

    every = [word for of_letter in words.values() for word in of_letter]
    g = torch.Generator().manual_seed(0)
    residuals, batches = torch.randn(len(every), 64, generator=g) * 3, []

    class Model:
        """Prompts are one token, the number of their word."""

        class tokenizer:
            def __new__(cls, prompts: list[str]):
                numbers = [[every.index(p.split("\n")[-1].split(":")[0])] for p in prompts]
                return SimpleNamespace(input_ids=numbers)

        def to_tokens(self, prompts):
            prompts = [prompts] if isinstance(prompts, str) else prompts
            return torch.tensor(self.tokenizer(prompts).input_ids)

        def run_with_cache(self, prompts, names_filter):
            tokens = prompts if isinstance(prompts, torch.Tensor) else self.to_tokens(prompts)
            batches.append(tokens[:, 0].tolist())
            return None, {names_filter[0]: residuals[tokens]}

    calculator = FeatureAbsorptionCalculator(
        Model(), icl_word_list=[f"word{i}" for i in range(30)], max_icl_examples=2,
        word_token_pos=-1, batch_size=7,
    )  # fmt: skip
    return calculator, batches


@pytest.fixture
def letters():
    """(two SAEs, a probe of three letters, their words, and SAE-Bench's statistics of those)."""
    from sae_bench.evals.absorption.feature_absorption import StatsAndLikelyFalseNegativeResults
    from sae_bench.evals.absorption.probing import LinearProbe

    torch.manual_seed(0)
    W_dec = torch.nn.functional.normalize(torch.randn(90, 64), dim=-1)
    saes = [
        SimpleNamespace(
            W_dec=W_dec,
            device="cpu",
            encode=lambda x, t=t: (x @ W_dec.T - t).relu(),
            decode=lambda f: f @ W_dec + 0.1,
        )
        for t in (0.0, 3.0)
    ]
    probe = LinearProbe(64, 26)
    probe.weights.data[:3] = W_dec[[5, 20, 40]] + 0.3 * W_dec[[6, 7, 8]]
    mains = {"a": [6], "b": [20], "c": [8, 1, 2, 3, 4, 60]}
    sizes = {"a": 33, "b": 0, "c": 40}
    words = {letter: [f"{letter}{i}" for i in range(n)] for letter, n in sizes.items()}
    stats = {
        letter: StatsAndLikelyFalseNegativeResults(99, 7, mains[letter], words[letter])
        for letter in words
    }
    return saes, probe, words, stats


def test_absorption_of_words_is_sae_benchs_own_to_the_bit_and_prompts_are_read_once(letters):
    from sae_bench.evals.absorption.feature_absorption import calculate_projection_and_cos_sims

    saes, probe, words, stats = letters
    ours, read = quick_absorption.AbsorptionOfWords(), None
    for sae in saes:
        (calculator, batches), (for_us, for_ours) = prompted(words), prompted(words)
        expected = calculate_projection_and_cos_sims(calculator, sae, probe, 1, stats)
        found = ours.calculate_projection_and_cos_sims(for_us, sae, probe, 1, stats)
        for name in found:
            assert found[name].tolist() == expected[name].tolist(), name
        assert {"letter", "split_feats", "num_probe_true_positives"} <= {*found}
        of_six = found["absorption_fraction"][found["letter"] == "c"]
        assert of_six.between(0.01, 0.99).sum() >= 5
        assert 0 < found["is_full_absorption"].sum() < len(found)
        assert for_ours == (batches if read is None else []), "by the first SAE alone"
        read = for_ours
    other = {letter: words[letter][1:] for letter in words}
    for letter in stats:
        stats[letter].potential_false_negatives = other[letter]
    calculator, batches = prompted(words)
    ours.calculate_projection_and_cos_sims(calculator, saes[0], probe, 1, stats)
    assert batches, "other words"


def test_what_becomes_of_words_is_what_sae_benchs_own_output_says_of_each(letters):
    """Shares, word by word from its table; L0 and FVU from the residuals, one word at a time."""
    from sae_bench.evals.absorption.feature_absorption import calculate_projection_and_cos_sims

    saes, probe, words, stats = letters
    calculator, _ = prompted(words)
    ours = quick_absorption.AbsorptionOfWords()
    for sae in saes:
        theirs = calculate_projection_and_cos_sims(calculator, sae, probe, 1, stats)
        ours.calculate_projection_and_cos_sims(calculator, sae, probe, 1, stats)
        shares = []
        for letter in "ac":
            fates = []
            for _, word in theirs[theirs["letter"] == letter].iterrows():
                fires = any(activation >= 1e-8 for activation in word["split_feat_acts"])
                assert not (fires and word["is_full_absorption"])
                fates.append([fires, word["is_full_absorption"]])
                fates[-1].append(not any(fates[-1]))
            shares.append(torch.tensor(fates).double().mean(0))
        expected = sum(shares) / 2
        assert expected.min() > 0 or sae is saes[0], "of the second SAE each happens"
        rows = [row for letter in "ac" for row in ours.residuals[letter]]
        fired = sum(int((sae.encode(x[None]) > 0).sum()) for x in rows)
        error = sum(((x - sae.decode(sae.encode(x[None]))[0]) ** 2).sum().double() for x in rows)
        mean = sum(rows) / len(rows)
        spread = sum(((x - mean) ** 2).sum().double() for x in rows)
        found = quick_absorption.shares_of_words(["a", "c"], ours.found[id(sae)], ours.residuals)
        shares = [found[f"absorption_{fate}"] for fate in ("main_fires", "absorbed", "lost")]
        assert shares == pytest.approx(expected.tolist())
        assert found["l0_on_words"] == pytest.approx(fired / len(rows))
        assert found["fvu_on_words"] == pytest.approx((error / spread).item(), rel=1e-5)


def of_words(full: list[int], carrier: list[int], rates: list[float]) -> quick_absorption.OfWords:
    nothing = numpy.zeros(len(full))
    parts = full, full, carrier, rates  # what is absorbed is silent
    full_N, silent_N, carrier_N, rate_F = (numpy.array(part) for part in parts)
    return quick_absorption.OfWords(
        nothing, full_N > 0, silent_N > 0, carrier_N, rate_F, nothing, nothing
    )


def test_of_the_absorbed_words_those_that_a_latent_of_the_letter_itself_carries():
    """By hand: of four latents 0 and 3 follow "a" (3 fires on just half of its words, and on the
    5 of "b" and the 1 of "c" a quarter of the time), 1 does too little, and 2 everywhere."""
    found = {
        "a": of_words([1, 1, 1, 1, 0, 0], [0, 1, 2, 3, 0, 0], [0.9, 0.4, 1.0, 0.5]),
        "b": of_words([1, 0, 0, 0, 0], [2, 0, 0, 0, 0], [0.0, 0.0, 1.0, 0.1]),
        "c": of_words([0], [0], [0.0, 0.0, 1.0, 1.0]),
    }
    follow = {letter: quick_absorption.of_the_letter(letter, found).tolist() for letter in found}
    assert follow["a"] == [True, False, False, True]
    assert follow["b"] == [False, False, False, False]
    residuals = {letter: torch.randn(len(words.full_N), 3) for letter, words in found.items()}
    shares = quick_absorption.shares_of_words(list(found), found, residuals)
    assert shares["absorption_absorbed"] == pytest.approx((4 / 6 + 1 / 5 + 0) / 3)
    assert shares["absorption_absorbed_by_its_letter"] == pytest.approx((2 / 6 + 0 + 0) / 3)


def test_prompts_of_unequal_length_are_refused_as_sae_bench_does(letters):
    saes, probe, words, stats = letters
    calculator, _ = prompted(words)
    calculator.model.tokenizer = lambda prompts: SimpleNamespace(
        input_ids=[[1] * (1 + i % 2) for i, _ in enumerate(prompts)]
    )
    with pytest.raises(ValueError, match="must have the same token length"):
        quick_absorption.AbsorptionOfWords().calculate_projection_and_cos_sims(
            calculator, saes[0], probe, 1, stats
        )


def test_words_and_their_letters_are_parsed_as_sae_bench_does(trained):
    from sae_bench.evals.absorption import common

    tokens = [" cat", "<0x6A>", "dog", "7up", float("nan"), "Über"]
    arguments = (
        trained.lm.tokenizer,
        torch.randn(6, 4),
        list(range(6)),
        pandas.DataFrame({"token": tokens}),
    )
    expected = common._parse_probe_data_split(*arguments)
    found = quick_absorption._parse_probe_data_split(*arguments)
    assert torch.equal(found[0], expected[0])
    assert found[1] == expected[1]
    assert [letter for _, letter in found[1]] == [0, 2, 5]


def test_whole_evaluations_are_sae_benchs_own_to_the_last_digit(
    evaluated, trained, tmp_path, monkeypatch
):
    """With its own functions put back, from the same texts and first-letter probes."""
    from sae_bench.evals.absorption import common, feature_absorption, k_sparse_probing
    from sae_bench.evals.sparse_probing import probe_training
    from torch.utils.data import DataLoader

    monkeypatch.setenv("COSINE_SAE_CACHE", str(evaluated.cache))
    own = {
        name: getattr(k_sparse_probing, name)
        for name in ("train_k_sparse_probes", "eval_probe_and_sae_k_sparse_raw_scores",
                     "sae_k_sparse_metadata", "build_metrics_df")
    }  # fmt: skip
    for name, function in own.items():
        monkeypatch.setattr(quick_k_sparse, name, function)
    monkeypatch.setattr(quick_k_sparse, "in_whole_batches", DataLoader)
    monkeypatch.setattr(quick_absorption, "_parse_probe_data_split", common._parse_probe_data_split)
    words = feature_absorption.calculate_projection_and_cos_sims
    stock = SimpleNamespace(
        calculate_projection_and_cos_sims=words, found=defaultdict(dict), residuals={}
    )
    monkeypatch.setattr(lab.absorption, "shares_of_words", lambda *_: None)
    monkeypatch.setattr(lab.absorption, "AbsorptionOfWords", lambda: stock)
    monkeypatch.setattr(quick_probing, "train_probe_gpu", probe_training.train_probe_gpu)
    monkeypatch.setattr(quick_probing, "ProbesOnActivations", lambda theirs: theirs)
    name, folder = next(iter(trained.saved.items()))
    (found,) = scores(trained, {name: folder}, tmp_path / "theirs")
    (probing, absorption), (our_probing, our_absorption) = found, evaluated.scores[0]
    assert probing["sae_bench"] == our_probing["sae_bench"]
    assert absorption["sae_bench"] == our_absorption["sae_bench"]
