"""The pocket model's optimizer: Muon for matrices, AdamW for the rest, bfloat16 arithmetic.

1. The model computes in bfloat16; a float32 master copy of each weight takes the updates.
2. Gradients are clipped by their common norm.
3. Matrices inside the layers go to Muon, embedding and gains to AdamW.
4. The masters are rounded back into the model.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .team import Team

MATRIX_RATE = 6e-3
EMBEDDING_RATE = 3e-3
GAIN_RATE = 3e-3
CLIP_NORM = 1.0


@dataclass(frozen=True)
class Optimizer:
    """Master weights by name, and the two optimizers that move them."""

    team: Team
    model: torch.nn.Module
    masters: dict[str, Tensor]
    muon: torch.optim.Optimizer
    adam: torch.optim.Optimizer

    def step(self, rate: float) -> float:
        """One update at `rate` times the full learning rates; returns the gradient's norm."""
        self._collect_gradients()
        norm = torch.nn.utils.clip_grad_norm_(self.masters.values(), CLIP_NORM, error_if_nonfinite=True)
        for optimizer in (self.muon, self.adam):
            for group in optimizer.param_groups:
                group["lr"] = rate * group["full_rate"]
            optimizer.step()
        self.write_back()
        return norm.item()

    def _collect_gradients(self) -> None:
        """Move the model's gradients to the masters, averaged over the team."""
        weights = dict(self.model.named_parameters())
        gradients = [weight.grad for weight in weights.values() if weight.grad is not None]
        flat = torch.cat([gradient.float().flatten() for gradient in gradients])
        self.team.average_(flat)
        sizes = [weight.numel() for weight in weights.values()]
        for (name, weight), part in zip(weights.items(), flat.split(sizes), strict=True):
            self.masters[name].grad = part.view_as(weight)
            weight.grad = None

    @torch.no_grad()
    def write_back(self) -> None:
        """Round the masters into the model."""
        for name, weight in self.model.named_parameters():
            weight.copy_(self.masters[name])

    def state(self) -> dict[str, Tensor]:
        """Every tensor a resumed run needs, by flat names."""
        flat = {f"master/{name}": tensor.detach() for name, tensor in self.masters.items()}
        for kind, optimizer in (("muon", self.muon), ("adam", self.adam)):
            for index, slots in optimizer.state_dict()["state"].items():
                flat |= {f"{kind}/{index}/{slot}": tensor for slot, tensor in slots.items()}
        return flat

    @torch.no_grad()
    def load_state(self, flat: dict[str, Tensor]) -> None:
        for name, master in self.masters.items():
            master.copy_(flat[f"master/{name}"])
        for kind, optimizer in (("muon", self.muon), ("adam", self.adam)):
            state: dict[int, dict[str, Tensor]] = {}
            for key in (key for key in flat if key.startswith(f"{kind}/")):
                _, index, slot = key.split("/")
                state.setdefault(int(index), {})[slot] = flat[key]
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        self.write_back()


def make_optimizer(model: torch.nn.Module, team: Team) -> Optimizer:
    """Takes a float32 model, and leaves it in bfloat16."""
    masters = {name: weight.detach().clone().requires_grad_() for name, weight in model.named_parameters()}
    model.to(torch.bfloat16)
    matrices = [w for name, w in masters.items() if w.ndim == 2 and ".layers." in name]
    tables = [w for name, w in masters.items() if w.ndim == 2 and ".layers." not in name]
    gains = [w for w in masters.values() if w.ndim == 1]
    muon = torch.optim.Muon(
        [{"params": matrices, "full_rate": MATRIX_RATE}], weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    adam = torch.optim.AdamW(
        [
            {"params": tables, "full_rate": EMBEDDING_RATE, "weight_decay": 0.01},
            {"params": gains, "full_rate": GAIN_RATE, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        fused=True,
    )
    return Optimizer(team, model, masters, muon, adam)
