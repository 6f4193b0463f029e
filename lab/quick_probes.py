"""SAE-Bench's probes with its own results in less time: what nobody reads is not computed.

Each function stands for one of SAE-Bench's of the same name and draws the same random numbers in
the same order.
"""

import copy

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

F1_JUMP = 0.03  # SAE-Bench's f1_jump_threshold: less than this, and another latent is no split


# ── Sparse probing ──────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def train_probe_gpu(
    train_inputs: torch.Tensor,
    train_labels: torch.Tensor,
    test_inputs: torch.Tensor,
    test_labels: torch.Tensor,
    dim: int,
    batch_size: int,
    epochs: int,
    lr: float,
    verbose: bool = False,
    l1_penalty: float | None = None,
    early_stopping_patience: int = 10,
) -> tuple[object, float]:
    """The probe on all latents and its best test accuracy: AdamW on the mean cross-entropy, written
    out.  It is trained 100 epochs of a few small steps for every class of every SAE, which are
    mostly the optimiser's and autograd's own time; accuracy on the training set is left out."""
    from sae_bench.evals.sparse_probing.probe_training import Probe

    assert l1_penalty is None, "SAE-Bench's sparse probing has none"
    probe = Probe(dim, train_inputs.dtype).to(train_inputs.device)
    weight, bias = probe.net.weight.data, probe.net.bias.data
    moments = [(p, torch.zeros_like(p), torch.zeros_like(p)) for p in (weight, bias)]
    targets, step = train_labels.to(train_inputs.dtype), 0
    best, best_probe, waited = 0.0, None, 0
    for _epoch in range(epochs):
        for rows in torch.randperm(len(train_inputs)).split(batch_size):
            x_BD = train_inputs[rows]
            z_B1 = torch.nn.functional.linear(x_BD, weight, bias)
            error_B1 = (z_B1.sigmoid() - targets[rows, None]) / len(rows)
            step += 1
            correction = (1 - 0.999**step) ** 0.5
            for (p, mean, square), grad in zip(
                moments, (error_B1.T @ x_BD, error_B1.sum(0)), strict=True
            ):
                p.mul_(1 - lr * 0.01)
                mean.lerp_(grad, 0.1)
                square.mul_(0.999).addcmul_(grad, grad, value=0.001)
                scale = (square.sqrt() / correction).add_(1e-8)
                p.addcdiv_(mean, scale, value=-lr / (1 - 0.9**step))
        z_N = torch.cat([probe(x) for x in test_inputs.split(batch_size)])
        accuracy = ((z_N > 0).long() == test_labels).float().mean().item()
        if accuracy > best:
            best, best_probe, waited = accuracy, copy.deepcopy(probe), 0
        else:
            waited += 1
        if waited >= early_stopping_patience:
            break
    assert best_probe is not None
    return best_probe, best


# ── Absorption ──────────────────────────────────────────────────────────────────────────────────


def in_whole_batches(dataset: Dataset, batch_size: int, shuffle: bool) -> DataLoader:
    """torch's DataLoader that takes a batch's rows at once, and not one by one to stack them."""
    assert shuffle
    batches = BatchSampler(RandomSampler(dataset), batch_size, drop_last=False)
    return DataLoader(dataset, batch_size=None, sampler=batches)


class KSparseProbes:
    """The k-sparse probes of 26 letters, each fitted when it is asked for."""

    def __init__(self, acts_NF: torch.Tensor, letters_N: np.ndarray, weights_KF: torch.Tensor, ks):
        self.acts_NF, self.letters_N, self.weights_KF = acts_NF, letters_N, weights_KF
        self.ks, self.fitted = list(ks), {}

    def __call__(self, letter: int, k: int):
        from sae_bench.evals.absorption.k_sparse_probing import KSparseProbe
        from sklearn.linear_model import LogisticRegression

        if (letter, k) not in self.fitted:
            latents = self.weights_KF[letter].topk(k).indices
            fit = LogisticRegression(max_iter=500, class_weight="balanced").fit(
                self.acts_NF[:, latents].float().numpy(), (self.letters_N == letter).astype(int)
            )
            weight, bias = torch.tensor(fit.coef_[0]), torch.tensor(fit.intercept_[0])
            self.fitted[letter, k] = KSparseProbe(weight.float(), bias.float(), latents)
        return self.fitted[letter, k]


def train_k_sparse_probes(
    sae,
    train_labels: list[tuple[str, int]],
    train_activations: torch.Tensor,
    ks: list[int],
    l1_decay: float = 0.01,
    batch_size: int = 4096,
    num_epochs: int = 50,
    precalc_sae_acts: bool = True,
) -> KSparseProbes:
    """The l1 probe, which ranks latents; the probes on its best k wait until they are asked for."""
    from sae_bench.evals.absorption import k_sparse_probing as theirs

    assert precalc_sae_acts
    letters_N = np.array([letter for _, letter in train_labels])
    with torch.no_grad():
        acts_NF = theirs._get_sae_acts(sae, train_activations, batch_size=batch_size)
    ranking = theirs.train_sparse_multi_probe(
        acts_NF,
        torch.nn.functional.one_hot(torch.from_numpy(letters_N)),
        l1_decay=l1_decay,
        num_epochs=num_epochs,
        batch_size=batch_size,
        device=sae.device,
        probe_dim=sae.cfg.d_sae,
    )
    weights = ranking.float().cpu().weights.detach()
    return KSparseProbes(acts_NF, letters_N, weights, ks)


@torch.no_grad()
def eval_probe_and_sae_k_sparse_raw_scores(
    sae,
    probe,
    k_sparse_probes: KSparseProbes,
    eval_labels: list[tuple[str, int]],
    eval_activations: torch.Tensor,
    eval_batch_size: int = 24,
):
    """Scores of every word, a column at a time (cell by cell they are 260 tiny products a word),
    for k up to the first that is no split: SAE-Bench looks no further.  The others are NaN."""
    from pandas import DataFrame
    from sae_bench.evals.absorption.vocab import LETTERS
    from sklearn.metrics import f1_score

    batches = eval_activations.to(sae.device).split(eval_batch_size)
    acts_NF = torch.cat([sae.encode(x.to(sae.dtype)).float().cpu() for x in batches])
    found_NK = torch.cat([probe.to(sae.device)(x).float().cpu() for x in batches])
    answers_N = np.array([answer for _, answer in eval_labels])
    nothing = np.full(len(answers_N), np.nan)
    columns = {
        "token": [token for token, _ in eval_labels],
        "answer_letter": [LETTERS[answer] for answer in answers_N],
    }
    for i, letter in enumerate(LETTERS):
        columns[f"score_probe_{letter}"] = found_NK[:, i].double().numpy()
        names = {k: f"score_sparse_sae_{letter}_k_{k}" for k in k_sparse_probes.ks}
        columns |= dict.fromkeys(names.values(), nothing)
        best = -100.0
        for k, name in names.items():
            k_probe = k_sparse_probes(i, k)
            scores_N = acts_NF[:, k_probe.feature_ids] @ k_probe.weight + k_probe.bias
            columns[name] = scores_N.double().numpy()
            f1 = f1_score(answers_N == i, columns[name] > 0, zero_division=0.0)
            if f1 <= best + F1_JUMP:
                break
            best = f1
    return DataFrame(columns)


def sae_k_sparse_metadata(sae, probe, k_sparse_probes: KSparseProbes, sae_name: str, layer: int):
    """Which latents the fitted probes read."""
    from pandas import DataFrame
    from sae_bench.evals.absorption.vocab import LETTERS

    rows = [
        {"layer": layer, "sae_name": sae_name, "letter": LETTERS[letter], "k": k}
        | {"feats": k_probe.feature_ids.numpy()}
        for (letter, k), k_probe in k_sparse_probes.fitted.items()
    ]
    return DataFrame(rows)


def build_metrics_df(results_df, metadata_df, max_k_value: int):
    """F1 of the probes and the latents that they read: what absorption goes on with."""
    from pandas import DataFrame
    from sklearn.metrics import f1_score

    latents = {(row.letter, row.k): row.feats for row in metadata_df.itertuples()}
    rows = []
    for letter in dict.fromkeys(metadata_df["letter"]):
        is_letter = (results_df["answer_letter"] == letter).to_numpy()

        def f1(column: str, is_letter: np.ndarray = is_letter) -> float:
            return f1_score(is_letter, results_df[column].to_numpy() > 0.0, zero_division=0.0)

        row = {"letter": letter, "f1_probe": f1(f"score_probe_{letter}")}
        row |= {name: metadata_df[name].iloc[0] for name in ("layer", "sae_name")}
        for k in range(1, max_k_value + 1):
            fitted = (letter, k) in latents
            score = f1(f"score_sparse_sae_{letter}_k_{k}") if fitted else np.nan
            row[f"f1_sparse_sae_{k}"] = score
            row[f"sparse_sae_k_{k}_feats"] = latents.get((letter, k), np.empty(0, int))
        rows.append(row)
    return DataFrame(rows)
