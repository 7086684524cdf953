"""Token merging: destinations, the most similar destination of each token, and merge and unmerge on that token map.

After *Token Merging for Fast Stable Diffusion* (Bolya & Hoffman, 2023, arXiv 2303.17604, section 4).
"""

import struct
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_SCORES_AT_ONCE = 1 << 22


def _mix(value: int) -> int:
    """MurmurHash3's 32-bit finaliser."""
    value = ((value ^ value >> 16) * 0x85EBCA6B) & 0xFFFFFFFF
    value = ((value ^ value >> 13) * 0xC2B2AE35) & 0xFFFFFFFF
    return value ^ value >> 16


def step_key(seed: int, timestep: float) -> int:
    """The key of one step's random destinations: a function of the seed and the timestep alone."""
    low, high = struct.unpack("<II", struct.pack("<d", timestep))
    key = 0
    for word in (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF, low, high):
        key = _mix(key ^ word) + 0x9E3779B9 & 0xFFFFFFFF
    return key


def destinations(grid: tuple[int, int], stride: tuple[int, int], key: int | None, device: torch.device | str) -> Tensor:
    """One destination token per stride×stride cell of the token grid.

    Randomness is a hash of the key and the cell, computed on the device: no generator is read, and every device gives
    the same.

    Args:
        grid: height and width of the token grid.
        stride: height and width of a cell. Rows and columns left over belong to no cell.
        key: decides the place in each cell; None takes the top-left corner.
        device: where to put the result.

    Returns:
        Row-major token indices, int64, one per cell in row-major order.
    """
    (height, width), (sy, sx) = grid, stride
    rows, columns = height // sy, width // sx
    corners = torch.arange(rows, device=device)[:, None] * (sy * width) + torch.arange(columns, device=device) * sx
    corners = corners.flatten()
    if key is None:
        return corners
    noise = torch.arange(rows * columns, device=device) * 0x9E3779B1 + key & 0xFFFFFFFF
    noise = ((noise ^ noise >> 16) * 0x85EBCA6B) & 0xFFFFFFFF
    noise = ((noise ^ noise >> 13) * 0xC2B2AE35) & 0xFFFFFFFF
    place = (noise ^ noise >> 16) % (sy * sx)
    return corners + place // sx * width + place % sx


@dataclass(frozen=True)
class TokenMap:
    """A partition of N tokens into m groups, per batch element.

    Attributes:
        index: group of each token, B×N int64.
        groups: m.
    """

    index: Tensor
    groups: int

    @property
    def _flat(self) -> Tensor:
        offsets = torch.arange(len(self.index), device=self.index.device)[:, None] * self.groups
        return (self.index + offsets).flatten()

    @property
    def sizes(self) -> Tensor:
        """Number of tokens in each group, B×m float32."""
        ones = torch.ones(self.index.shape, device=self.index.device)
        return torch.zeros(len(ones), self.groups, device=ones.device).scatter_add_(1, self.index, ones)

    def merge(self, tokens: Tensor) -> Tensor:
        """The mean of each group: B×N×C → B×m×C."""
        batch, _, channels = tokens.shape
        flat = tokens.reshape(-1, channels)
        means = flat.new_zeros(batch * self.groups, channels)
        if torch.are_deterministic_algorithms_enabled():
            # scatter_reduce adds in no fixed order on CUDA and has no deterministic form there; index_add has.
            exact = torch.promote_types(flat.dtype, torch.float32)
            sums = means.to(exact).index_add(0, self._flat, flat.to(exact))
            means = (sums / self.sizes.to(exact).flatten()[:, None]).to(flat.dtype)
        else:
            rows = self._flat[:, None].expand(-1, channels)
            means = means.scatter_reduce(0, rows, flat, "mean", include_self=False)
        return means.view(batch, self.groups, channels)

    def unmerge(self, merged: Tensor) -> Tensor:
        """Every token receives what its group has: B×m×C → B×N×C."""
        batch, tokens = self.index.shape
        return merged.reshape(batch * self.groups, -1).index_select(0, self._flat).view(batch, tokens, -1)


@dataclass(frozen=True)
class Match:
    """The most similar destination of every token.

    Attributes:
        best: number of the destination, B×N int64; a destination's is its own.
        score: cosine similarity to it, B×N; -inf for destinations, which are never merged away.
        destinations: their number n.
    """

    best: Tensor
    score: Tensor
    destinations: int

    def token_map(self, count: int) -> TokenMap:
        """Merge the `count` sources with the highest similarity (at most all of them) into their destinations.

        Groups 0 … n−1 are the destinations; each of the other sources is a group of its own after them.
        """
        batch, tokens = self.best.shape
        sources = tokens - self.destinations
        if count >= sources:
            return TokenMap(self.best, self.destinations)
        kept = self.score.argsort(dim=1, descending=True, stable=True)[:, count:sources]
        groups = torch.arange(self.destinations, tokens - count, device=kept.device).expand(batch, -1)
        return TokenMap(self.best.scatter(1, kept, groups), tokens - count)


def match(x: Tensor, dst: Tensor) -> Match:
    """Find the destination that each token is most similar to, by cosine similarity.

    Args:
        x: the metric, B×N×C; AgentSD and ToMe for SD take the block's input before its norm.
        dst: token indices of the n destinations.
    """
    x = x.detach()
    anchors = F.normalize(x[:, dst], dim=-1).transpose(1, 2)
    rows = max(1, _SCORES_AT_ONCE // (len(x) * len(dst)))
    best = [(part @ anchors).max(dim=-1) for part in x.split(rows, dim=1)]
    index = torch.cat([part.indices for part in best], dim=1)
    score = torch.cat([part.values for part in best], dim=1) / x.norm(dim=-1).clamp_min(torch.finfo(x.dtype).tiny)
    numbers = torch.arange(len(dst), device=x.device).expand(len(x), -1)
    places = dst.expand(len(x), -1)
    return Match(index.scatter(1, places, numbers), score.scatter(1, places, float("-inf")), len(dst))
