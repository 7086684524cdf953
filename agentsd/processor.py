"""The attention processor that puts merging and agent attention in the place of a UNet layer's self-attention."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from agentsd.attention import Attend, agent_attention, attention, log_size_bias, size_weighted_attention
from agentsd.config import Phase
from agentsd.merging import Match, TokenMap, match

if TYPE_CHECKING:
    from diffusers.models.attention import BasicTransformerBlock
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
    """What is done in one layer: the attention, and how many queries, keys and agents (0: none) it has.

    `also` names the other parts of the block whose tokens are merged: `crossattn`, `mlp`. `few` tells that the layer is
    left alone because the grid has too few tokens.
    """

    attention: str
    queries: int
    keys: int
    agents: int
    also: tuple[str, ...] = ()
    few: bool = False

    def work(self) -> int:
        """Multiply-adds per channel of both matrix products."""
        return 4 * self.agents * self.queries if self.agents else 2 * self.queries * self.keys


def cell_count(phase: Phase, grid: tuple[int, int]) -> int:
    """How many cells a grid has, each with one destination."""
    sy, sx = phase.cell_on(grid)
    return (grid[0] // sy) * (grid[1] // sx)


def merge_count(phase: Phase, ratio: float, grid: tuple[int, int]) -> int:
    """How many tokens of a grid the ratio merges away: at most all sources."""
    tokens, cells = grid[0] * grid[1], cell_count(phase, grid)
    return min(int(tokens * ratio), tokens - cells) if cells else 0


def counts(phase: Phase, ratio: float, grid: tuple[int, int]) -> Counts:
    """What a phase makes of a layer on a token grid."""
    tokens, cells = grid[0] * grid[1], cell_count(phase, grid)
    if phase.acts and not phase.pays_on(grid):
        return Counts("stock", tokens, tokens, 0, few=True)
    merged = tokens - merge_count(phase, ratio, grid)
    also = tuple(part for part in ("crossattn", "mlp") if getattr(phase, f"merge_{part}") and merged < tokens)
    if phase.attention == "stock" or not cells:
        return Counts("stock", tokens, tokens, 0, also)
    if phase.attention == "kv":
        return Counts("kv", tokens, tokens - min(int(tokens * phase.kv_ratio), tokens - cells), 0, also)
    queries = merged if phase.merge_attn else tokens
    if phase.attention == "agent":
        pooled = phase.agents == "pool"
        agents = cells if pooled else tokens - min(int(tokens * phase.agent_ratio), tokens - cells)
        if 2 * agents < queries:
            return Counts("agent", queries, queries, agents, also)
    return Counts("merge" if queries < tokens else "stock", queries, queries, 0, also)


def xformers_attention(op: Any) -> Attend:
    """xformers' memory-efficient attention with the signature of `scaled_dot_product_attention`."""
    from xformers.ops import memory_efficient_attention

    def attend(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *, scale: float | None = None
    ) -> Tensor:
        q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
        if attn_mask is not None:
            length = attn_mask.shape[-1]
            # xformers takes rows of a bias whose stride is a multiple of 8.
            attn_mask = F.pad(attn_mask, (0, -length % 8)).expand(*query.shape[:3], -1)[..., :length]
        return memory_efficient_attention(q, k, v, attn_bias=attn_mask, scale=scale, op=op).transpose(1, 2)

    return attend


class Block:
    """What the parts of one transformer block share in a call: the block's input, by which tokens are matched.

    Where a match serves several steps, `kept` is one of an earlier call, and `made` is this call's.
    """

    def __init__(self, plans: dict[int, Plan], level: int, phases: tuple[Phase, ...]) -> None:
        self.plans = plans
        self.level = level
        self.several = any(phase.match_interval > 1 for phase in phases)
        self.kept: Match | None = None
        self.made: Match | None = None
        self.crossattn = any(phase.merge_crossattn for phase in phases)
        self.mlp = any(phase.merge_mlp for phase in phases)
        self.forget()

    def forget(self, *_: Any) -> None:
        """Hold no tensor longer than the block runs."""
        self.x: Tensor | None = None
        self._matched: Match | None = None
        self.map: TokenMap | None = None

    def remember(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of the block's first norm."""
        self.forget()
        self.x = args[0]

    def plan(self, tokens: Tensor) -> Plan | None:
        """The plan in force for a part of the block that is called with `tokens`; None leaves it alone."""
        plan = self.plans.get(self.level)
        known = self.x is not None and self.x.shape[:-1] == tokens.shape[:-1]
        return plan if plan and known and tokens.shape[1:-1] == (plan.tokens,) else None

    def matched(self, plan: Plan) -> Match:
        """The most similar destinations, found once per call."""
        if self._matched is None:
            assert self.x is not None
            self._matched = self.kept or match(self.x, plan.destinations, plan.phase.kmeans_steps)
            if self.several and self.kept is None:
                self.made = self._matched
        return self._matched

    def merged(self, plan: Plan) -> TokenMap | None:
        """The map of ToMe for SD, made once per call; None where nothing is merged."""
        count = merge_count(plan.phase, plan.ratio, plan.grid)
        if self.map is None and count:
            self.map = self.matched(plan).fold(count)
        return self.map

    def merge_crossattn(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Forward pre-hook of the cross-attention: its queries are merged tokens."""
        plan = self.plan(args[0])
        # An IP-Adapter's masks are laid out on the whole grid.
        whole = kwargs.get("encoder_hidden_states") is None or kwargs.get("ip_adapter_masks") is not None
        merged = self.merged(plan) if plan and plan.phase.merge_crossattn and not whole else None
        return ((merged.merge(args[0]), *args[1:]), kwargs) if merged else None

    def merge_mlp(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Forward pre-hook of the feed-forward part."""
        plan = self.plan(args[0])
        merged = self.merged(plan) if plan and plan.phase.merge_mlp else None
        return (merged.merge(args[0]), *args[1:]) if merged else None

    def unmerge(self, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
        """Forward hook of a part that may have been called with merged tokens."""
        return self.map.unmerge(out) if self.map and args[0].shape[1] == self.map.groups else None

    def hook(self, block: "BasicTransformerBlock") -> list[RemovableHandle]:
        """Put on a transformer block the hooks that the phases need."""
        handles = [block.norm1.register_forward_pre_hook(self.remember)]
        if self.crossattn and block.attn2 is not None:
            handles.append(block.attn2.register_forward_pre_hook(self.merge_crossattn, with_kwargs=True))
            handles.append(block.attn2.register_forward_hook(self.unmerge))
        if self.mlp:
            handles.append(block.ff.register_forward_pre_hook(self.merge_mlp))
            handles.append(block.ff.register_forward_hook(self.unmerge))
        last = block.ff if self.crossattn or self.mlp else block.attn1
        handles.append(last.register_forward_hook(self.forget))
        return handles


class AgentSDProcessor:
    """Wraps the processor of one self-attention layer (AgentSD).

    Whatever it does not handle goes to the wrapped processor untouched: cross-attention, attention masks, a level that
    the phase does not cover, a token count that is not the level's grid.
    """

    def __init__(self, inner: Any = None, block: Block | None = None) -> None:
        from diffusers.models.attention_processor import AttnProcessor2_0

        # Loading an IP-Adapter makes new processors without arguments; the next call puts them to work.
        self.inner = AttnProcessor2_0() if inner is None else inner
        self.attend = attend_like(self.inner)
        self.block = block or Block({}, 0, ())

    def __call__(
        self,
        attn: "Attention",
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The output of the attention layer, B×N×C."""
        plan = self.block.plan(hidden_states)
        if plan is None or encoder_hidden_states is not None or attention_mask is not None:
            out: Tensor = self.inner(
                attn,
                hidden_states,
                encoder_hidden_states=encoder_hidden_states,
                attention_mask=attention_mask,
                **kwargs,
            )
        else:
            todo = counts(plan.phase, plan.ratio, plan.grid)
            if todo.attention == "kv":
                out = self._kv(attn, hidden_states, plan, todo)
            elif todo.attention == "agent":
                out = self._agent(attn, hidden_states, plan, todo)
            elif todo.attention == "merge":
                out = self._merge(attn, hidden_states, plan, kwargs)
            else:
                out = self.inner(attn, hidden_states, **kwargs)
        return out

    def _merge(self, attn: "Attention", y: Tensor, plan: Plan, kwargs: dict[str, Any]) -> Tensor:
        from diffusers.models.attention_processor import AttnProcessor2_0

        merged = self.block.merged(plan)
        assert merged is not None
        f = merged.merge(y)
        bias = log_size_bias(merged.sizes, f) if plan.phase.proportional else None
        if type(self.inner) is AttnProcessor2_0:
            q, k, v = _query(attn, f), _key(attn, f), _heads(attn, attn.to_v(f))
            out = _out(attn, self.attend(q, k, v, attn_mask=bias))
        else:
            out = self.inner(attn, f, attention_mask=None if bias is None else bias[:, 0], **kwargs)
        return merged.unmerge(out)

    def _kv(self, attn: "Attention", y: Tensor, plan: Plan, todo: Counts) -> Tensor:
        groups = self.block.matched(plan).fold(plan.tokens - todo.keys)
        a = groups.merge(y)
        q, k, v = _query(attn, y), _key(attn, a), _heads(attn, attn.to_v(a))
        return _out(attn, size_weighted_attention(q, k, v, groups.sizes, attend=self.attend))

    def _agent(self, attn: "Attention", y: Tensor, plan: Plan, todo: Counts) -> Tensor:
        phase = plan.phase
        merged = self.block.merged(plan) if todo.queries < plan.tokens else None
        f = merged.merge(y) if merged else y
        if phase.agents == "merge":
            a = self.block.matched(plan).fold(plan.tokens - todo.agents).merge(y)
        else:
            image = y.transpose(1, 2).unflatten(2, plan.grid)
            sy, sx = phase.cell_on(plan.grid)
            a = F.adaptive_avg_pool2d(image, (plan.grid[0] // sy, plan.grid[1] // sx)).flatten(2).transpose(1, 2)
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

    return xformers_attention(inner.attention_op) if isinstance(inner, XFormersAttnProcessor) else attention


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
