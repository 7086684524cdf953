"""Muon for the matrices of a network, AdamW for the rest."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def orthogonalize(matrix: Tensor, iterations: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix, nearly, by Newton–Schulz iterations in bfloat16 (Jordan et al. 2024)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrix.shape[0] > matrix.shape[1]
    X = (matrix.T if tall else matrix).bfloat16()
    X = X / (X.norm() + 1e-7)
    for _ in range(iterations):
        A = X @ X.T
        X = torch.addmm(X, torch.addmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X.T if tall else X


class Muon(torch.optim.Optimizer):
    """Groups with `matrices` set get Muon on weights flattened to output × inputs, others AdamW, at rates of one scale.

    Updates are scaled to AdamW's root mean square, 0.2 √max(rows, columns) (Liu et al. 2025, "Muon is scalable").
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "momentum": momentum, "betas": betas, "weight_decay": weight_decay, "matrices": False},
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter; each process of several orthogonalizes its share of the matrices."""
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        matrices: list[tuple[Tensor, float]] = []
        updates: list[Tensor] = []
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                if not group["matrices"]:
                    self._adamw(parameter, group)
                    continue
                direction = self._momentum(parameter, group)
                mine = len(updates) % world == rank
                updates.append(orthogonalize(direction) if mine else torch.zeros_like(direction, dtype=torch.bfloat16))
                matrices.append((parameter, group["lr"] * 0.2 * max(direction.shape) ** 0.5))
        if world > 1 and updates:
            flat = torch.cat([update.flatten() for update in updates])
            dist.all_reduce(flat)
            updates = list(flat.split([update.numel() for update in updates]))
        for (parameter, rate), update in zip(matrices, updates, strict=True):
            parameter.add_(update.view_as(parameter), alpha=-rate)

    def _momentum(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """Nesterov's direction, as a matrix."""
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(gradient, 1 - group["momentum"])
        return gradient.lerp(state["momentum"], group["momentum"]).flatten(1)

    def _adamw(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if not state:
            state["step"] = torch.zeros(())
            state["first"], state["second"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        first, second = group["betas"]
        state["step"] += 1
        step = int(state["step"])
        state["first"].lerp_(gradient, 1 - first)
        state["second"].lerp_(gradient.square(), 1 - second)
        scale = (state["second"] / (1 - second**step)).sqrt_().add_(1e-8)
        parameter.addcdiv_(state["first"], scale, value=-group["lr"] / (1 - first**step))


def groups(module: nn.Module, matrices: bool = True, scale: float = 1.0) -> list[dict[str, Any]]:
    """Parameter groups: hidden matrices for Muon (`matrices`), and embeddings, first and last layers, norms and biases.

    `scale` multiplies the rate of all of them.
    """
    chosen: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        outer = "embeddings" in name or "conv_in" in name or "conv_out" in name or min(parameter.shape[:2]) < 16
        (chosen if matrices and parameter.ndim >= 2 and not outer else rest).append(parameter)
    named = [{"params": rest, "matrices": False}, {"params": chosen, "matrices": True}]
    return [group | {"scale": scale} for group in named if group["params"]]
