"""SAE-Bench's absorption of saved SAEs, and the first-letter probes that it needs."""

from pathlib import Path

import torch

from lab.bench import evaluation_key, sae_bench
from lab.language_model import LanguageModel
from lab.process import require, say
from lab.quick_absorption import AbsorptionOfWords, shares_of_words
from lab.quick_k_sparse import F1_JUMP
from lab.saved_sae import load_sae
from lab.scales import Scale
from lab.seeds import seed_everything
from lab.storage import cached, disjoint, save_tensors


def first_letter_probes(scale: Scale, lm: LanguageModel, layer: int) -> Path:
    """SAE-Bench's first-letter probes of one layer, trained once; probe.safetensors is ours."""
    lm = lm.reading_in(getattr(torch, scale.evaluation_dtype))

    def build(folder: Path) -> None:
        from sae_bench.evals.absorption.eval_config import AbsorptionEvalConfig
        from sklearn.metrics import f1_score

        config = AbsorptionEvalConfig(model_name=lm.name)
        say(f"training SAE-Bench's first-letter probes at layer {layer} (once)")
        with sae_bench(scale, lm) as bench:
            # The same prompts at every layer: the language model reads them once for all.
            seed = scale.evaluation_seed, "first-letter probes", scale.layers[-1]
            seed_everything("evaluation", *seed)
            where = {
                "base_template": config.prompt_template,
                "pos_idx": config.prompt_token_pos,
                "layer": layer,
                "probes_dir": folder,
                "device": str(lm.device),
            }
            probe = bench.common.load_or_train_probe(bench.model, **where)
            parts = {}
            for split in ("train", "test"):
                X, words = bench.common.load_probe_data_split_or_train(
                    bench.model, **where | {"device": "cpu"}, split=split
                )
                parts[split] = X.float(), torch.tensor([letter for _, letter in words])
        present = set(parts["train"][1].tolist())
        require(
            len(present) == 26,
            f"{26 - len(present)} letters have no word among those that probes are trained on: "
            "raise absorption_words, or choose a model that knows more words",
        )
        weight, bias = (p.detach().float().cpu() for p in (probe.weights, probe.biases))
        X, y = parts["test"]
        found = X @ weight.T + bias > 0
        f1 = [f1_score(y == i, found[:, i], zero_division=0) for i in range(26)]
        tensors = {"weight": weight, "bias": bias, "f1": torch.tensor(f1)}
        tensors |= {"X": parts["train"][0].contiguous(), "y": parts["train"][1]}
        save_tensors(tensors, folder / "probe.safetensors")

    about = {"layer": layer, "prompts_of": scale.layers[-1], "words": scale.absorption_words}
    key = disjoint(evaluation_key(scale, lm), about)
    return cached("first-letter-probes", key, build)


def absorption_config(scale: Scale, lm: LanguageModel):
    from sae_bench.evals.absorption.eval_config import AbsorptionEvalConfig

    return AbsorptionEvalConfig(
        model_name=lm.name,
        random_seed=scale.evaluation_seed,
        llm_batch_size=scale.lm_batch,
        llm_dtype=scale.evaluation_dtype,
        precalc_k_sparse_probe_sae_acts=True,  # else the words are encoded 260 times
        eval_k_sparse_probe_batch_size=1024,
        f1_jump_threshold=F1_JUMP,
    )


def evaluate_absorption(
    scale: Scale,
    lm: LanguageModel,
    layer: int,
    saved: dict[str, Path],
    folder: Path,
    of_words: AbsorptionOfWords | None = None,
) -> list[dict]:
    """Absorption of the saved SAEs: {"sae_bench": its own result, "words": what becomes of words of
    the letters that it scores}, both None where the model knows too few letters for it.

    SAE-Bench's JSON files land in `folder`.  `of_words`: who is asked for the words, and may keep
    more of them than is scored.
    """
    lm = lm.reading_in(getattr(torch, scale.evaluation_dtype))
    probes, config = first_letter_probes(scale, lm, layer), absorption_config(scale, lm)
    saes = [(name, load_sae(path).to(lm.device)) for name, path in saved.items()]
    words = of_words or AbsorptionOfWords()
    with sae_bench(scale, lm, folder, probes, of_words=words) as bench:
        found = bench.absorption.run_eval(
            config, saes, str(lm.device), str(bench.folder), force_rerun=True
        )
    results = []
    for name, sae in saes:
        its, shares = found.get(f"{name}_custom_sae"), None
        if its:
            letters = [letter["first_letter"] for letter in its["eval_result_details"]]
            shares = shares_of_words(letters, words.found[id(sae)], words.residuals)
        results.append({"sae_bench": its, "words": shares})
    return results
