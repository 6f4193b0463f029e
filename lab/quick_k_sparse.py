"""SAE-Bench's k-sparse probes of first letters with its own results in less time.

What nobody reads is not computed.

Each function stands for one of SAE-Bench's of the same name and draws the same random numbers in
the same order.
"""

from math import exp, log

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, TensorDataset

from lab.adam import adam_, moments_of

F1_JUMP = 0.03  # SAE-Bench's f1_jump_threshold: less than this, and another latent is no split
SPARSE = 1 / 8  # fewer latents fire: products with rows of nonzero latents alone are faster


def in_whole_batches(dataset: Dataset, batch_size: int, shuffle: bool) -> DataLoader:
    """torch's DataLoader that takes a batch's rows at once, and not one by one to stack them."""
    assert shuffle
    batches = BatchSampler(RandomSampler(dataset), batch_size, drop_last=False)
    return DataLoader(dataset, batch_size=None, sampler=batches)


# ── The l1 probe, which ranks a letter's latents ────────────────────────────────────────────────


class Rows:
    """Some rows of latents, for the two products that a step takes."""

    def __init__(self, x_BF: torch.Tensor):
        self.x_BF = x_BF

    def logits(self, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(self.x_BF, weight, bias)

    def gradient(self, error_BK: torch.Tensor) -> torch.Tensor:
        return error_BK.T @ self.x_BF


class SparseRows(Rows):
    """The same of a scipy.sparse.csr_matrix: sums of fewer numbers, in another order."""

    def logits(self, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.x_BF @ weight.T.contiguous().numpy()) + bias

    def gradient(self, error_BK: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.x_BF.T @ error_BK.numpy()).T


def train_sparse_multi_probe(
    x_train: torch.Tensor,
    y_train: torch.Tensor,
    device: torch.device,
    l1_decay: float = 0.01,
    batch_size: int = 4096,
    num_epochs: int = 50,
    lr: float = 0.01,
    end_lr: float = 1e-5,
    l2_decay: float = 1e-6,
):
    """The l1 probe [letters, F] of latents x_train [N, F], which lie on `device`, and of the words'
    letters y_train [N, letters]: Adam, written out.

    A batch of latents is copied and read twice in every step, and there is little else to do.  On a
    CPU most of that is zeros where few latents fire, and is left out.  Sums in another order move
    weights by up to 1e-4 at 3,200 words and 1e-3 at 25,600, of .3 for the largest; the ten best
    latents of every letter were SAE-Bench's own, in its order, for all trained SAEs that were
    tried.  Otherwise weights are the same to the bit.
    """
    from sae_bench.evals.absorption import probing as theirs

    (n, d_sae), dtype = x_train.shape, x_train.dtype
    letters_NK = y_train.to(device, dtype)
    loss = torch.nn.BCEWithLogitsLoss(pos_weight=theirs._calc_pos_weights(y_train).to(device))
    order = in_whole_batches(TensorDataset(torch.arange(n)), batch_size, shuffle=True)
    probe = theirs.LinearProbe(d_sae, num_outputs=y_train.shape[-1]).to(device, dtype)
    weight, bias = probe.weights.data, probe.biases.data
    moments = moments_of(weight, bias)
    sparse = device.type == "cpu" and dtype == torch.float32
    if sparse := sparse and x_train.count_nonzero().item() < SPARSE * x_train.numel():
        from scipy.sparse import csr_matrix

        x_train = csr_matrix(x_train.numpy())
    l1 = torch.tensor(l1_decay, dtype=dtype, device=device) / len(weight)
    decay, step = exp(log(end_lr / lr) / num_epochs), 0
    for _epoch in range(num_epochs):
        for (rows,) in order:
            x = SparseRows(x_train[rows.numpy()]) if sparse else Rows(x_train[rows.to(device)])
            logits_BK = x.logits(weight, bias).requires_grad_()
            with torch.enable_grad():
                loss(logits_BK, letters_NK[rows.to(device)]).backward()
            error_BK = logits_BK.grad
            step += 1
            grads = x.gradient(error_BK) + l1 * weight.sign(), error_BK.sum(0)
            decayed = [g.add(p, alpha=l2_decay) for g, p in zip(grads, (weight, bias), strict=True)]
            adam_(moments, decayed, lr, step)
        lr *= decay
    return probe


# ── The probes on a letter's best k latents ─────────────────────────────────────────────────────


class KSparseProbes:
    """The k-sparse probes of 26 letters, each fitted when it is asked for."""

    def __init__(self, acts_NF: torch.Tensor, letters_N: np.ndarray, weights_KF: torch.Tensor, ks):
        self.acts_NF, self.letters_N, self.weights_KF = acts_NF, letters_N, weights_KF
        self.ks, self.fitted, self.f1 = list(ks), {}, {}

    def __call__(self, letter: int, k: int):
        from sae_bench.evals.absorption.k_sparse_probing import KSparseProbe

        if (letter, k) not in self.fitted:
            latents = self.weights_KF[letter].topk(k).indices
            x_Nk = self.acts_NF[:, latents.to(self.acts_NF.device)].float().cpu().numpy()
            weight_k, bias = fit_balanced(x_Nk, self.letters_N == letter)
            weight, bias = torch.tensor(weight_k).float(), torch.tensor(bias).float()
            self.fitted[letter, k] = KSparseProbe(weight, bias, latents)
        return self.fitted[letter, k]


def fit_balanced(x_Nk: np.ndarray, is_letter_N: np.ndarray) -> tuple[np.ndarray, float]:
    """LogisticRegression(max_iter=500, class_weight="balanced"): weights [k] and bias.  Most words
    have none of the latents: they are alike but for their class, and fitted as two of weight."""
    from sklearn.linear_model import LogisticRegression

    y_N = is_letter_N.astype(int)
    balanced = len(y_N) / (2 * np.bincount(y_N, minlength=2))
    fires_N = x_Nk.any(axis=1)
    silent = np.bincount(y_N[~fires_N], minlength=2)
    x = np.concatenate([x_Nk[fires_N], np.zeros((2, x_Nk.shape[1]), x_Nk.dtype)])
    y = np.append(y_N[fires_N], [0, 1])
    weight = balanced[y] * np.append(np.ones(fires_N.sum()), silent)
    fit = LogisticRegression(max_iter=500).fit(x, y, sample_weight=weight)
    return fit.coef_[0], fit.intercept_[0]


def f1(is_letter_N: np.ndarray, found_N: np.ndarray) -> float:
    """sklearn's f1_score, which checks its input at greater length than it counts."""
    both = is_letter_N.sum() + found_N.sum()
    return float(2 * (is_letter_N & found_N).sum() / both) if both else 0.0


@torch.no_grad()
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
    assert precalc_sae_acts
    letters_N = np.array([letter for _, letter in train_labels])
    batches = train_activations.split(batch_size)
    acts_NF = torch.cat([sae.encode(x.to(sae.device, sae.dtype)) for x in batches])
    ranking = train_sparse_multi_probe(
        acts_NF,
        torch.nn.functional.one_hot(torch.from_numpy(letters_N)),
        acts_NF.device,
        l1_decay,
        batch_size,
        num_epochs,
    )
    return KSparseProbes(acts_NF, letters_N, ranking.weights.detach().float().cpu(), ks)


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
    for k up to the first that is no split: SAE-Bench looks no further, and the others are left out.
    """
    from pandas import DataFrame
    from sae_bench.evals.absorption.vocab import LETTERS

    batches = eval_activations.to(sae.device).split(eval_batch_size)
    acts_NF = torch.cat([sae.encode(x.to(sae.dtype)).float().cpu() for x in batches])
    found_NK = torch.cat([probe.to(sae.device)(x).float().cpu() for x in batches])
    answers_N = np.array([answer for _, answer in eval_labels])
    columns = {
        "token": [token for token, _ in eval_labels],
        "answer_letter": [LETTERS[answer] for answer in answers_N],
    }
    for i, letter in enumerate(LETTERS):
        columns[f"score_probe_{letter}"] = found_NK[:, i].double().numpy()
        best = -100.0
        for k in k_sparse_probes.ks:
            k_probe = k_sparse_probes(i, k)
            scores_N = acts_NF[:, k_probe.feature_ids] @ k_probe.weight + k_probe.bias
            columns[f"score_sparse_sae_{letter}_k_{k}"] = scores_N.double().numpy()
            score = k_sparse_probes.f1[i, k] = f1(answers_N == i, scores_N.numpy() > 0)
            if score <= best + F1_JUMP:
                break
            best = score
    return DataFrame(columns)


def sae_k_sparse_metadata(sae, probe, k_sparse_probes: KSparseProbes, sae_name: str, layer: int):
    """Which latents the fitted probes read, and how well."""
    from pandas import DataFrame
    from sae_bench.evals.absorption.vocab import LETTERS

    rows = [
        {"layer": layer, "sae_name": sae_name, "letter": LETTERS[letter], "k": k}
        | {"feats": k_probe.feature_ids.numpy(), "f1": k_sparse_probes.f1[letter, k]}
        for (letter, k), k_probe in k_sparse_probes.fitted.items()
    ]
    return DataFrame(rows)


def build_metrics_df(results_df, metadata_df, max_k_value: int):
    """F1 of the probes and the latents that they read: what absorption goes on with."""
    from pandas import DataFrame

    fitted = {(row.letter, row.k): row for row in metadata_df.itertuples()}
    about = {name: metadata_df[name].iloc[0] for name in ("layer", "sae_name")}
    rows = []
    for letter in dict.fromkeys(metadata_df["letter"]):
        is_letter = (results_df["answer_letter"] == letter).to_numpy()
        found = results_df[f"score_probe_{letter}"].to_numpy() > 0.0
        row = about | {"letter": letter, "f1_probe": f1(is_letter, found)}
        for k in range(1, max_k_value + 1):
            known = fitted.get((letter, k))
            row[f"f1_sparse_sae_{k}"] = known.f1 if known else np.nan
            row[f"sparse_sae_k_{k}_feats"] = known.feats if known else np.empty(0, int)
        rows.append(row)
    return DataFrame(rows)
