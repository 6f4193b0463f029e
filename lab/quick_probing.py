"""SAE-Bench's sparse probing with its own results in less time: what nobody reads is not computed.

Each function stands for one of SAE-Bench's of the same name and draws the same random numbers in
the same order.
"""

import copy

import torch


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
