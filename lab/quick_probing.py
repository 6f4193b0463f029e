"""SAE-Bench's sparse probing with its own results in less time: what nobody reads is not computed.

Each function stands for one of SAE-Bench's of the same name and draws the same random numbers in
the same order.
"""

import copy
import math
from collections.abc import Callable

import torch

from lab.adam import adam_, moments_of


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
    moments = moments_of(weight, bias)
    targets, step = train_labels.to(train_inputs.dtype), 0
    best, best_probe, waited = 0.0, None, 0
    for _epoch in range(epochs):
        for rows in torch.randperm(len(train_inputs)).split(batch_size):
            x_BD = train_inputs[rows]
            z_B1 = torch.nn.functional.linear(x_BD, weight, bias)
            error_B1 = (z_B1.sigmoid() - targets[rows, None]) / len(rows)
            step += 1
            grads = error_B1.T @ x_BD, error_B1.sum(0)
            for p in (weight, bias):
                p.mul_(1 - lr * 0.01)
            adam_(moments, grads, lr, step)
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


class Drawn:
    """The texts that SAE-Bench's prepare_probe_data draws for one class, and their order, without
    their latents: it copies all of those six times, where a k-sparse probe reads k of them."""

    def __init__(self, means: dict[str, torch.Tensor], label: str):
        others = [name for name in means if name != label]
        self.n, positive = len(means[label]), means[label]
        share = math.ceil(self.n / len(others))
        rows = [torch.randperm(len(means[other]))[:share] for other in others]
        chosen = torch.randperm(sum(map(len, rows)))[: self.n]
        order = torch.randperm(2 * self.n)
        self.is_positive = order < self.n
        # Parts of either kind: (means of a class, rows of it, their places among the kind's).
        self.positive = [(positive, order[self.is_positive], slice(None))]
        drawn, self.negative, start = chosen[order[~self.is_positive] - self.n], [], 0
        for other, of_class in zip(others, rows, strict=True):
            places = ((drawn >= start) & (drawn < start + len(of_class))).nonzero()[:, 0]
            self.negative.append((means[other], of_class[drawn[places] - start], places))
            start += len(of_class)

    def latents(self, columns: torch.Tensor | None = None) -> list[torch.Tensor]:
        """Latents of the texts of the class, and of the others [n, F], or some columns of them."""
        found = []
        for parts in (self.positive, self.negative):
            like = parts[0][0]
            taken = like.new_empty(self.n, like.shape[1] if columns is None else len(columns))
            for means, rows, places in parts:
                rows = rows.to(means.device)
                taken[places] = means[rows] if columns is None else means[rows[:, None], columns]
            found.append(taken)
        return found

    def in_order(self, positive: torch.Tensor, negative: torch.Tensor) -> tuple:
        """(latents [2n, k], whether each is of the class), as scikit-learn wants them."""
        x = torch.empty(2 * self.n, positive.shape[1])
        x[self.is_positive], x[~self.is_positive] = positive.float().cpu(), negative.float().cpu()
        return x.numpy(), self.is_positive.int().numpy()


def train_probe_on_activations(
    theirs: Callable,
    train_activations: dict[str, torch.Tensor],
    test_activations: dict[str, torch.Tensor],
    select_top_k: int | None = None,
    **how,
) -> tuple[dict, dict[str, float]]:
    """Test accuracy of a probe for each class.  With k, on the k latents whose means differ most;
    without, on all, that is SAE-Bench's own function (`theirs`) around train_probe_gpu()."""
    if select_top_k is None:
        return theirs(train_activations, test_activations, None, **how)
    from sklearn.linear_model import LogisticRegression

    assert not how, "SAE-Bench gives k-sparse probes no other settings"
    accuracies = {}
    for label in train_activations:
        train, test = Drawn(train_activations, label), Drawn(test_activations, label)
        positive, negative = train.latents()
        apart_F = (positive.mean(dim=0) - negative.mean(dim=0)).abs()
        columns = torch.argsort(apart_F, descending=True)[:select_top_k].sort().values
        x, y = train.in_order(positive[:, columns], negative[:, columns])
        probe = LogisticRegression(max_iter=1000).fit(x, y)
        x, y = test.in_order(*test.latents(columns))
        accuracies[label] = float((probe.predict(x) == y).mean())
    return {}, accuracies
