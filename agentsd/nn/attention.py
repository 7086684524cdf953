"""The trainable module of *Agent Attention: On the Integration of Softmax and Linear Attention* (arXiv 2312.08874)."""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agentsd import checks
from agentsd.ops.attention import agent_attention

Grid = tuple[int, int]


class AgentBias(nn.Module):
    """A learned term for every agent and token: a 7×7 map, a row and a column term, resized to the grid of the tokens.

    Args:
        num_heads: H.
        agent_num: n.
        grid: height and width of the token grid that the row and column terms are made for.
        prefix: number of tokens before the grid, such as a class token; each agent has a term of its own for each.
    """

    def __init__(self, num_heads: int, agent_num: int, grid: Grid, prefix: int = 0) -> None:
        super().__init__()
        self.map = nn.Parameter(torch.empty(num_heads, agent_num, 7, 7))
        self.rows = nn.Parameter(torch.empty(num_heads, agent_num, grid[0]))
        self.columns = nn.Parameter(torch.empty(num_heads, agent_num, grid[1]))
        self.prefix = nn.Parameter(torch.empty(num_heads, agent_num, prefix)) if prefix else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The paper's initialisation: truncated normal."""
        for term in self.parameters():
            nn.init.trunc_normal_(term, std=0.02)

    def forward(self, grid: Grid) -> Tensor:
        """The terms for the tokens of a grid, H×n×(prefix + tokens)."""
        rows = F.interpolate(self.rows, size=grid[0], mode="linear")
        columns = F.interpolate(self.columns, size=grid[1], mode="linear")
        bias = F.interpolate(self.map, size=grid, mode="bilinear") + rows[..., None] + columns[..., None, :]
        bias = bias.flatten(2)
        return bias if self.prefix is None else torch.cat([self.prefix, bias], dim=2)


class AgentAttention(nn.Module):
    """Self-attention of B×N×C tokens by way of n agents, linear in N (Agent Attention, section 4).

    `O = softmax(Q Aᵀ d^-0.5 + B2ᵀ) softmax(A Kᵀ d^-0.5 + B1) V + DWC(V)`, then the output projection. Both products are
    fused attention.

    Args:
        dim: channels C.
        num_heads: attention heads H; C must be a multiple of it.
        agent_num: agents n, the queries averaged over a √n×√n grid of cells: a square number.
        grid: height and width of the token grid (of the whole grid, where there are windows too). Any other grid can
            be given in the call; the bias is resized to it.
        agent_bias: add B1 and B2, an `AgentBias` each.
        dwc: add a depthwise 3×3 convolution of V.
        class_token: the tokens start with a class token (True), or with this number of tokens that are not on the grid.
            They are attended to and attend, and take no part in pooling and convolution.
        qkv_bias: the projections to Q, K and V have a bias.
        window: height and width (or the side) of windows that attend each to itself, with agents of its own; B1 and B2
            are for one window. A grid that is not a multiple of it is padded with masked tokens.
        sr_ratio: keys and values come from a grid reduced by this factor (the spatial reduction of PVT).
        attn_drop: dropout of both attention maps.
        proj_drop: dropout of the output.

    Raises:
        ValueError: an option is out of range, or two do not go together.

    Example:
        ```python
        attention = AgentAttention(dim=192, num_heads=3, agent_num=49, grid=(14, 14), class_token=True)
        y = attention(torch.randn(2, 1 + 14 * 14, 192))
        y = attention(torch.randn(2, 1 + 20 * 30, 192), grid=(20, 30))
        ```
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        agent_num: int,
        grid: Grid,
        *,
        agent_bias: bool = True,
        dwc: bool = True,
        class_token: bool | int = False,
        qkv_bias: bool = True,
        window: int | Grid | None = None,
        sr_ratio: int = 1,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            checks.refuse("num_heads", num_heads, f"a divisor of dim, {dim}")
        if agent_num < 1 or math.isqrt(agent_num) ** 2 != agent_num:
            checks.refuse("agent_num", agent_num, "a square number")
        if bool(class_token) + (window is not None) + (sr_ratio > 1) > 1:
            raise ValueError(
                f"class_token is {class_token}, window is {window} and sr_ratio is {sr_ratio}; "
                "only one of the three can be set"
            )
        self.dim = dim
        self.num_heads = num_heads
        self.agent_num = agent_num
        self.grid = grid
        self.prefix = int(class_token)
        self.window = (window, window) if isinstance(window, int) else window
        self.sr_ratio = sr_ratio
        self.attn_drop = attn_drop
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj: nn.Module = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        seen = self.window or grid
        self.b1 = AgentBias(num_heads, agent_num, self._reduced(seen), self.prefix) if agent_bias else None
        self.b2 = AgentBias(num_heads, agent_num, seen, self.prefix) if agent_bias else None
        self.dwc = nn.Conv2d(dim, dim, 3, padding=1, groups=dim) if dwc else None
        if sr_ratio > 1:
            self.sr = nn.Conv2d(dim, dim, sr_ratio, stride=sr_ratio)
            self.norm = nn.LayerNorm(dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The paper's initialisation: truncated normal of 0.02, no bias; convolutions as PyTorch makes them."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d | nn.LayerNorm | AgentBias):
                module.reset_parameters()

    def forward(self, x: Tensor, grid: Grid | None = None, mask: Tensor | None = None) -> Tensor:
        """Attention among the tokens.

        Args:
            x: B×N×C, the class token (if any) first, then the grid row by row.
            grid: height and width; None is the grid of the constructor, enlarged or shrunk to N where N differs.
            mask: B×N, False for tokens that nobody is to see: they are no key, are not pooled into agents and are zero
                to the convolution. What they themselves receive means nothing.

        Returns:
            B×N×C.

        Raises:
            ValueError: the grid does not have N tokens, or there is a mask beside a spatial reduction.
        """
        H, W = self._grid_of(x.shape[1] - self.prefix, grid)
        if mask is not None and self.sr_ratio > 1:
            raise ValueError(f"mask is given and sr_ratio is {self.sr_ratio}; reduced keys and values cannot be masked")
        if self.window is None:
            return self._attend(x, (H, W), mask)
        h, w = self.window
        below, beside = -H % h, -W % w
        if below or beside:
            mask = torch.ones_like(x[..., 0], dtype=torch.bool) if mask is None else mask
        x = self._partition(x, (H, W), below, beside)
        if mask is not None:
            mask = self._partition(mask[..., None], (H, W), below, beside)[..., 0]
        x = self._attend(x, self.window, mask)
        rows, columns = (H + below) // h, (W + beside) // w
        x = x.view(-1, rows, columns, h, w, self.dim).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return x[:, :H, :W].flatten(1, 2)

    def _grid_of(self, tokens: int, grid: Grid | None) -> Grid:
        H, W = grid or self.grid
        if grid is None:
            scale = math.sqrt(tokens / (H * W))
            H, W = round(H * scale), round(W * scale)
        if tokens != H * W:
            raise ValueError(f"grid is {grid or self.grid}; it must have the {tokens} tokens of x")
        return H, W

    def _reduced(self, grid: Grid) -> Grid:
        return grid[0] // self.sr_ratio, grid[1] // self.sr_ratio

    def _partition(self, x: Tensor, grid: Grid, below: int, beside: int) -> Tensor:
        """B×N×C → (B·windows)×(tokens of a window)×C."""
        assert self.window is not None
        h, w = self.window
        x = F.pad(x.unflatten(1, grid), (0, 0, 0, beside, 0, below))
        x = x.unflatten(2, (-1, w)).unflatten(1, (-1, h))
        return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)

    def _project(self, x: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
        if self.sr_ratio == 1:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
            return q, k, v
        (Wq, Wk, Wv), bias = self.qkv.weight.chunk(3), self.qkv.bias
        bq, bk, bv = (None, None, None) if bias is None else bias.chunk(3)
        y = self.norm(self.sr(_image(x, grid)).flatten(2).transpose(1, 2))
        return F.linear(x, Wq, bq), F.linear(y, Wk, bk), F.linear(y, Wv, bv)

    def _pool(self, q: Tensor, grid: Grid, keep: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Means of the queries over the cells, B×n×C, and which cells have any token, B×n."""
        side = math.isqrt(self.agent_num)
        image = _image(q[:, self.prefix :], grid)
        if keep is None:
            return F.adaptive_avg_pool2d(image, side).flatten(2).transpose(1, 2), None
        kept = _image(keep[:, self.prefix :, None], grid)
        share = F.adaptive_avg_pool2d(kept.to(q.dtype), side)
        mean = F.adaptive_avg_pool2d(image.masked_fill(~kept, 0), side) / share.masked_fill(share == 0, 1)
        return mean.flatten(2).transpose(1, 2), share.flatten(1) > 0

    def _attend(self, x: Tensor, grid: Grid, keep: Tensor | None) -> Tensor:
        q, k, v = self._project(x, grid)
        pooled, alive = self._pool(q, grid, keep)
        # Fused kernels want the channels side by side.
        A, Q, K, V = map(self._heads, (pooled.contiguous(), q, k, v))
        B1 = _hide(None if self.b1 is None else self.b1(self._reduced(grid)), keep, q)
        B2 = _hide(None if self.b2 is None else self.b2(grid).mT.contiguous(), alive, q)
        attend = partial(F.scaled_dot_product_attention, dropout_p=self.attn_drop if self.training else 0.0)
        out = agent_attention(Q, K, V, A, biases=(B1, B2), attend=attend).transpose(1, 2).flatten(2)
        if self.dwc is not None:
            if keep is not None:
                v = v.masked_fill(~keep[..., None], 0)
            image = _image(v[:, self.prefix :], self._reduced(grid))
            if self.sr_ratio > 1:
                image = F.interpolate(image, size=grid, mode="bilinear")
            out = out + F.pad(self.dwc(image).flatten(2).transpose(1, 2), (0, 0, self.prefix, 0))
        return self.proj_drop(self.proj(out))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)

    def extra_repr(self) -> str:
        options = f"agent_num={self.agent_num}, num_heads={self.num_heads}, grid={self.grid}"
        return f"{options}, window={self.window}, class_token={self.prefix}, sr_ratio={self.sr_ratio}"


def _image(x: Tensor, grid: Grid) -> Tensor:
    """B×N×C → B×C×H×W."""
    return x.transpose(1, 2).unflatten(2, grid)


def _hide(bias: Tensor | None, keep: Tensor | None, like: Tensor) -> Tensor | None:
    """The bias of each query and key with the keys that are not kept hidden, as a mask of the fused attention."""
    bias = None if bias is None else bias.to(like.dtype)[None]
    if keep is None:
        return bias
    hidden = like.new_zeros(keep.shape).masked_fill(~keep, float("-inf"))[:, None, None]
    return hidden if bias is None else bias + hidden
