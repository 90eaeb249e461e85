"""Muon for many small matrices: the matrices of one shape are orthogonalised together.

`torch.optim.Muon` works one matrix at a time and in bfloat16, which processors without bfloat16 units run some fifty
times slower than float32; this one stays in float32.
"""

from collections import defaultdict

import torch

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic coefficients of https://kellerjordan.github.io/posts/muon/


def orthogonalise(stack: torch.Tensor, rounds: int = 5) -> torch.Tensor:
    """Approximate the nearest semi-orthogonal matrix of each (R, C) matrix in `stack` (n, R, C), R <= C."""
    a, b, c = NEWTON_SCHULZ
    x = stack / (stack.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(rounds):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, scaled so that a step has the size of one of AdamW's (0.2 root mean square)."""

    def __init__(self, params, lr: float, weight_decay: float = 0.05, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for p in group["params"]:
                if p.grad is None:
                    continue
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(average, group["momentum"])
                wide = update if update.shape[0] <= update.shape[1] else update.mT
                by_shape[wide.shape].append((p, wide))
            for shape, pairs in by_shape.items():
                updates = orthogonalise(torch.stack([u for _, u in pairs]))
                for (p, _), u in zip(pairs, updates, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(u if p.shape == shape else u.mT, alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)
