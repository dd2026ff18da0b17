"""Layer norm of pre-activations within groups of latents: between tiers, or before a mask.

B rows, F latents, G groups. Each row's pre-activations of a group are centred and scaled to variance
one, then each latent has a gain and a bias of its own. What a row says by its size is lost to the
codes, so this is a setting to compare with, not a default.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..side_inputs import Side
from .shaped import Shape

EPSILON = 1e-5


class PreNorm(Shape):
    """Layer norm within the groups that `group_F` names."""

    changes_pre = True
    sets_scale = True
    group: Tensor

    def __init__(self, group_F: Tensor, num_groups: int, rectifies: bool = False) -> None:
        super().__init__()
        self.num_groups = num_groups
        self.rectifies = rectifies
        """Of what ReLU leaves, in place of the pre-activations: what has no say is alike to the norm."""
        self.register_buffer("group", group_F.clone())
        self.gain = nn.Parameter(torch.ones(group_F.numel()))
        self.bias = nn.Parameter(torch.zeros(group_F.numel()))

    def change_pre(self, pre: Tensor, side: Side) -> Tensor:
        groups = torch.arange(self.num_groups, device=pre.device)
        member_FG = (self.group[:, None] == groups).to(pre.dtype)
        share_FG = member_FG / member_FG.sum(0).clamp_min(1.0)
        pre = pre.relu() if self.rectifies else pre
        centred = pre - (pre @ share_FG) @ member_FG.t()
        variance = (centred.square() @ share_FG) @ member_FG.t()
        return centred * (variance + EPSILON).rsqrt() * self.gain + self.bias

    def lower(self, amount: float) -> None:
        self.bias.sub_(amount)

    def rescale(self, factor: float) -> None:
        self.gain.mul_(factor)
        self.bias.mul_(factor)

    def follow(self, membership_F: Tensor) -> None:
        self.group.copy_(membership_F)
