"""One step of torch's Adam for SAE-Bench's probes, written out: the same bits, less around them."""

from collections.abc import Iterable

import torch

# (parameter, moving mean of its gradients, moving mean of their squares)
Moments = list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def moments_of(*parameters: torch.Tensor) -> Moments:
    return [(p, torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]


def adam_(moments: Moments, grads: Iterable[torch.Tensor], lr: float, step: int) -> None:
    """Move the parameters, with torch's own betas and epsilon; `step` counts from 1."""
    correction = (1 - 0.999**step) ** 0.5
    for (p, mean, square), grad in zip(moments, grads, strict=True):
        mean.lerp_(grad, 0.1)
        square.mul_(0.999).addcmul_(grad, grad, value=0.001)
        scale = (square.sqrt() / correction).add_(1e-8)
        p.addcdiv_(mean, scale, value=-lr / (1 - 0.9**step))
