"""A language model's blocks compiled for one shape of batch, if nothing but rounding changes."""

from collections.abc import Callable, Iterable

import torch

from lab.process import first_line, say

# How far a token's residuals may be off, relative to their norm: a bfloat16 has 8 bits, and twenty
# blocks add up their roundings (.012 was measured after 9 of them on a CPU).
AGREES = {torch.bfloat16: 0.03, torch.float32: 1e-4}


def compile_blocks(
    blocks: Iterable[torch.nn.Module],
    read: Callable[[torch.Tensor], dict[int, torch.Tensor]],
    tokens_BL: torch.Tensor,
) -> bool:
    """From here on batches of the shape of `tokens_BL` go through compiled blocks, and all others
    through the plain ones.  Returns whether they do.

    `read` gives the residuals [B, L, D] of some layers, which are asked for both ways: where
    compiling fails (it needs a C++ compiler, and Triton on a GPU), or they are others than before,
    the plain blocks stay, and that is said.
    """
    expected, plain = read(tokens_BL), {block: block.forward for block in blocks}
    try:
        for block, forward in plain.items():
            # Block by block, outside of their hooks: they are alike, and one is compiled for all.
            fast = torch.compile(forward, dynamic=False)
            block.forward = for_shape(tokens_BL.shape, fast, forward)
        found = read(tokens_BL)
        worst = max(difference(found[layer], expected[layer]) for layer in expected)
        limit = AGREES[found[next(iter(found))].dtype]
        lacking = "" if worst <= limit else f"its residuals would be {worst:.2g} off"
    except Exception as error:  # whatever a compiler raises
        lacking = f"it could not be compiled ({first_line(error)})"
    if lacking:
        for block, forward in plain.items():
            block.forward = forward
        say(f"the language model runs as it is: {lacking}")
        return False
    say(f"the language model is compiled: its residuals are the plain one's to {worst:.1g}")
    return True


def for_shape(shape: torch.Size, fast: Callable, plain: Callable) -> Callable:
    """A block's forward(): `fast` for hidden states [*shape, D], `plain` for all others."""

    def forward(hidden_BLD: torch.Tensor, *args, **kwargs):
        chosen = fast if hidden_BLD.shape[:2] == shape else plain
        return chosen(hidden_BLD, *args, **kwargs)

    return forward


def difference(found_BLD: torch.Tensor, expected_BLD: torch.Tensor) -> float:
    """How far the residuals are off, relative to their norm, at the worst position of a context;
    infinite where they are not finite."""
    expected = expected_BLD.float()
    off_BL = (found_BLD.float() - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-8)
    return off_BL.mean(0).nan_to_num(torch.inf, torch.inf).max().item()
