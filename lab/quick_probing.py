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
        self.n = len(means[label])
        share = math.ceil(self.n / len(others))
        rows = [torch.randperm(len(means[other]))[:share] for other in others]
        chosen = torch.randperm(sum(map(len, rows)))[: self.n]
        order = torch.randperm(2 * self.n)
        self.is_positive = order < self.n
        # Parts of either kind: (a class, rows of its means, their places among the kind's).
        self.positive = [(label, order[self.is_positive], slice(None))]
        drawn, self.negative, start = chosen[order[~self.is_positive] - self.n], [], 0
        for other, of_class in zip(others, rows, strict=True):
            places = ((drawn >= start) & (drawn < start + len(of_class))).nonzero()[:, 0]
            self.negative.append((other, of_class[drawn[places] - start], places))
            start += len(of_class)

    def latents(
        self, means: dict[str, torch.Tensor], columns: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """Latents of the texts of the class, and of the others [n, F], or some columns of them."""
        found = []
        for parts in (self.positive, self.negative):
            like = means[parts[0][0]]
            taken = like.new_empty(self.n, like.shape[1] if columns is None else len(columns))
            for label, rows, places in parts:
                rows = rows.to(like.device)
                at = (rows,) if columns is None else (rows[:, None], columns)
                taken[places] = means[label][at]
            found.append(taken)
        return found

    def in_order(self, positive: torch.Tensor, negative: torch.Tensor) -> tuple:
        """(latents [2n, k], whether each is of the class), as scikit-learn wants them."""
        x = torch.empty(2 * self.n, positive.shape[1])
        x[self.is_positive], x[~self.is_positive] = positive.float().cpu(), negative.float().cpu()
        return x.numpy(), self.is_positive.int().numpy()


class ProbesOnActivations:
    """SAE-Bench's train_probe_on_activations: test accuracy of a probe for each class.  With k, on
    the k latents whose means differ most; without, on all, that is SAE-Bench's own function
    (`theirs`) around train_probe_gpu().

    What is drawn for each k is remembered until it is drawn anew: the generator has moved by as
    many epochs as the probe on all latents took, and other latents can be asked on the same texts.
    """

    def __init__(self, theirs: Callable):
        self.theirs = theirs
        self.drawn: dict[int, dict[str, tuple[Drawn, Drawn]]] = {}  # {k: {class: (train, test)}}

    def __call__(
        self,
        train_activations: dict[str, torch.Tensor],
        test_activations: dict[str, torch.Tensor],
        select_top_k: int | None = None,
        **how,
    ) -> tuple[dict, dict[str, float]]:
        if select_top_k is None:
            return self.theirs(train_activations, test_activations, None, **how)
        assert not how, "SAE-Bench gives k-sparse probes no other settings"
        self.drawn[select_top_k] = {
            label: (Drawn(train_activations, label), Drawn(test_activations, label))
            for label in train_activations
        }
        return {}, self.again(train_activations, test_activations, select_top_k)

    def again(
        self, train_means: dict[str, torch.Tensor], test_means: dict[str, torch.Tensor], k: int
    ) -> dict[str, float]:
        """{class: test accuracy on k latents}, on the texts that were last drawn for this k."""
        from sklearn.linear_model import LogisticRegression

        accuracies = {}
        for label, (train, test) in self.drawn[k].items():
            positive, negative = train.latents(train_means)
            apart_F = (positive.mean(dim=0) - negative.mean(dim=0)).abs()
            columns = torch.argsort(apart_F, descending=True)[:k].sort().values
            x, y = train.in_order(positive[:, columns], negative[:, columns])
            probe = LogisticRegression(max_iter=1000).fit(x, y)
            x, y = test.in_order(*test.latents(test_means, columns))
            accuracies[label] = float((probe.predict(x) == y).mean())
        return accuracies
