"""The attention processor that puts merging and agent attention in the place of a UNet layer's self-attention."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

from agentsd.attention import Attend, agent_attention, log_size_bias, sdpa, size_weighted_attention
from agentsd.config import Phase
from agentsd.merging import Match, match

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention


@dataclass(frozen=True)
class Plan:
    """What the layers of one level do in one call of the model.

    Attributes:
        phase: the phase in force.
        ratio: share of the tokens merged away.
        grid: height and width of the token grid.
        destinations: token indices of the destinations, int64.
    """

    phase: Phase
    ratio: float
    grid: tuple[int, int]
    destinations: Tensor

    @property
    def tokens(self) -> int:
        """Number of tokens of the grid."""
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class Counts:
    """What is done in one layer: the attention, and how many queries, keys and agents (0: none) it has."""

    attention: str
    queries: int
    keys: int
    agents: int

    def work(self) -> int:
        """Multiply-adds per channel of both matrix products."""
        return 4 * self.agents * self.queries if self.agents else 2 * self.queries * self.keys


def counts(phase: Phase, ratio: float, grid: tuple[int, int]) -> Counts:
    """What a phase makes of a layer on a token grid."""
    tokens = grid[0] * grid[1]
    cells = (grid[0] // phase.cell[0]) * (grid[1] // phase.cell[1])
    if phase.attention == "stock" or not cells:
        return Counts("stock", tokens, tokens, 0)
    if phase.attention == "kv":
        return Counts("kv", tokens, cells, 0)
    merged = tokens - min(int(tokens * ratio), tokens - cells)
    if phase.attention == "agent":
        pooled = phase.agents == "pool"
        agents = cells if pooled else tokens - min(int(tokens * phase.agent_ratio), tokens - cells)
        if 2 * agents < merged:
            return Counts("agent", merged, merged, agents)
    return Counts("merge" if merged < tokens else "stock", merged, merged, 0)


def xformers_attention(op: Any) -> Attend:
    """xformers' memory-efficient attention with the signature of `scaled_dot_product_attention`."""
    from xformers.ops import memory_efficient_attention

    def attend(
        query: Tensor, key: Tensor, value: Tensor, *, attn_mask: Tensor | None = None, scale: float | None = None
    ) -> Tensor:
        q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
        if attn_mask is not None:
            length = attn_mask.shape[-1]
            # xformers takes rows of a bias whose stride is a multiple of 8.
            attn_mask = F.pad(attn_mask, (0, -length % 8)).expand(*query.shape[:3], -1)[..., :length]
        return memory_efficient_attention(q, k, v, attn_bias=attn_mask, scale=scale, op=op).transpose(1, 2)

    return attend


class AgentSDProcessor:
    """Wraps the processor of one self-attention layer (AgentSD).

    Whatever it does not handle goes to the wrapped processor untouched: cross-attention, attention masks, a level
    that the phase does
    not cover, a token count that is not the level's grid.
    """

    def __init__(self, inner: Any, plans: dict[int, Plan], level: int) -> None:
        self.inner = inner
        self.attend = attend_like(inner)
        self.plans = plans
        self.level = level
        self.metric: Tensor | None = None

    def remember(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of the block's first norm: its input is the metric of the matching."""
        self.metric = args[0]

    def __call__(
        self,
        attn: "Attention",
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The output of the attention layer, B×N×C."""
        x, self.metric = self.metric, None
        plan = self.plans.get(self.level)
        if (
            plan is None
            or x is None
            or encoder_hidden_states is not None
            or attention_mask is not None
            or hidden_states.shape[1:-1] != (plan.tokens,)
        ):
            return self.inner(
                attn,
                hidden_states,
                encoder_hidden_states=encoder_hidden_states,
                attention_mask=attention_mask,
                **kwargs,
            )
        phase = plan.phase
        todo = counts(phase, plan.ratio, plan.grid)
        if todo.attention == "stock":
            return self.inner(attn, hidden_states, **kwargs)
        if todo.attention == "kv":
            return self._kv(attn, hidden_states, match(x, plan.destinations))
        if todo.attention == "agent":
            return self._agent(attn, hidden_states, x, plan, todo)
        merged = match(x, plan.destinations).fold(plan.tokens - todo.queries)
        f = merged.merge(hidden_states)
        mask = log_size_bias(merged.sizes, f)[:, 0] if phase.proportional else None
        return merged.unmerge(self.inner(attn, f, attention_mask=mask, **kwargs))

    def _kv(self, attn: "Attention", y: Tensor, matched: Match) -> Tensor:
        groups = matched.fold(y.shape[1])
        a = groups.merge(y)
        q, k, v = _query(attn, y), _key(attn, a), _heads(attn, attn.to_v(a))
        return _out(attn, size_weighted_attention(q, k, v, groups.sizes, attend=self.attend))

    def _agent(self, attn: "Attention", y: Tensor, x: Tensor, plan: Plan, todo: Counts) -> Tensor:
        phase, merged, f = plan.phase, None, y
        if todo.queries < plan.tokens or phase.agents == "merge":
            matched = match(x, plan.destinations)
            if todo.queries < plan.tokens:
                merged = matched.fold(plan.tokens - todo.queries)
                f = merged.merge(y)
        if phase.agents == "merge":
            a = matched.fold(plan.tokens - todo.agents).merge(y)
        else:
            image = y.transpose(1, 2).unflatten(2, plan.grid)
            cells = plan.grid[0] // phase.cell[0], plan.grid[1] // phase.cell[1]
            a = F.adaptive_avg_pool2d(image, cells).flatten(2).transpose(1, 2)
        q, k, v = _query(attn, f), _key(attn, f), _heads(attn, attn.to_v(f))
        out = agent_attention(
            q,
            k,
            v,
            _query(attn, a),
            scale2=q.shape[-1] ** (-0.5 * phase.k_scale2),
            shortcut=phase.k_shortcut,
            bias=log_size_bias(merged.sizes, f) if phase.proportional and merged else None,
            attend=self.attend,
        )
        out = _out(attn, out)
        return merged.unmerge(out) if merged else out


def _heads(attn: "Attention", tokens: Tensor) -> Tensor:
    return tokens.unflatten(-1, (attn.heads, -1)).transpose(1, 2)


def _query(attn: "Attention", tokens: Tensor) -> Tensor:
    query = _heads(attn, attn.to_q(tokens))
    return query if attn.norm_q is None else attn.norm_q(query)


def _key(attn: "Attention", tokens: Tensor) -> Tensor:
    key = _heads(attn, attn.to_k(tokens))
    return key if attn.norm_k is None else attn.norm_k(key)


def _out(attn: "Attention", heads: Tensor) -> Tensor:
    out = attn.to_out[1](attn.to_out[0](heads.transpose(1, 2).flatten(2)))
    return out / attn.rescale_output_factor if attn.rescale_output_factor != 1 else out


def attend_like(inner: Any) -> Attend:
    """The softmax attention of the backend that a processor uses."""
    from diffusers.models.attention_processor import XFormersAttnProcessor

    return xformers_attention(inner.attention_op) if isinstance(inner, XFormersAttnProcessor) else sdpa


def obstacle(attn: "Attention", inner: Any) -> str | None:
    """Why a layer has to be left alone, or None."""
    from diffusers.models import attention_processor as stock

    known = (
        stock.AttnProcessor2_0,
        stock.AttnProcessor,
        stock.FusedAttnProcessor2_0,
        stock.SlicedAttnProcessor,
        stock.XFormersAttnProcessor,
    )
    if type(inner) not in known:
        return type(inner).__name__
    for name in ("group_norm", "spatial_norm", "norm_cross", "residual_connection"):
        if getattr(attn, name, None):
            return name
    return None
