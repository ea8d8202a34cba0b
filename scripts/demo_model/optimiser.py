"""Muon for the layers' matrices, AdamW for the rest, in state that safetensors can hold.

Muon: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks".
"""

from collections import defaultdict

import torch
from torch import Tensor

from scripts.demo_model.model import Llama

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
MUON_LR, MUON_MOMENTUM, MUON_DECAY = 0.01, 0.95, 0.1
RECALL_LAYERS = ("layers.0.self_attn", "layers.1.self_attn")
RECALL_LR_SHARE = 0.1  # what `write_recall` wrote is to be tuned, not overwritten
ADAM_LR = {"embed_tokens.weight": 6e-3, "lm_head.weight": 1e-3}
ADAM_LR_NORMS = 3e-3
ADAM_BETAS, ADAM_EPS = (0.9, 0.97), 1e-8


def orthogonalise(matrices: Tensor) -> Tensor:
    """Newton-Schulz steps from [n, rows, columns] towards the nearest semi-orthogonal matrices."""
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    out: Tensor = x.mT if tall else x
    return out.float()


def gradient(parameter: Tensor) -> Tensor:
    """A parameter's gradient, which the backward pass must have left."""
    assert parameter.grad is not None
    return parameter.grad


class Optimiser:
    """Updates a model's parameters from their gradients."""

    def __init__(self, model: Llama) -> None:
        self.parameters = dict(model.named_parameters())
        self.by_shape: dict[torch.Size, list[str]] = defaultdict(list)  # matrices, orthogonalised together
        self.others: list[str] = []
        self.state: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            matrix = parameter.ndim == 2 and name.startswith("layers.")
            (self.by_shape[parameter.shape] if matrix else self.others).append(name)
            for moment in ("momentum",) if matrix else ("mean", "square"):
                self.state[f"{name}.{moment}"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, count: int, scale: float) -> None:
        """Update number `count`, from 1, at `scale` times the learning rates; gradients are dropped."""
        for names in self.by_shape.values():
            self._muon(names, MUON_LR * scale)
        for name in self.others:
            self._adam(name, count, ADAM_LR.get(name, ADAM_LR_NORMS) * scale)
        for parameter in self.parameters.values():
            parameter.grad = None

    def _muon(self, names: list[str], lr: float) -> None:
        updates = []
        for name in names:
            grad, momentum = gradient(self.parameters[name]), self.state[f"{name}.momentum"]
            momentum.lerp_(grad, 1 - MUON_MOMENTUM)
            updates.append(grad.lerp(momentum, MUON_MOMENTUM))
        for name, update in zip(names, orthogonalise(torch.stack(updates)), strict=True):
            parameter = self.parameters[name]
            rate = lr * (RECALL_LR_SHARE if name.startswith(RECALL_LAYERS) else 1.0)
            parameter.mul_(1 - rate * MUON_DECAY)
            parameter.add_(update, alpha=-rate * max(1.0, update.shape[0] / update.shape[1]) ** 0.5)

    def _adam(self, name: str, count: int, lr: float) -> None:
        parameter, grad = self.parameters[name], gradient(self.parameters[name])
        mean, square = self.state[f"{name}.mean"], self.state[f"{name}.square"]
        mean.lerp_(grad, 1 - ADAM_BETAS[0])
        square.mul_(ADAM_BETAS[1]).addcmul_(grad, grad, value=1 - ADAM_BETAS[1])
        root = (square / (1 - ADAM_BETAS[1] ** count)).sqrt_().add_(ADAM_EPS)
        parameter.addcdiv_(mean, root, value=-lr / (1 - ADAM_BETAS[0] ** count))
