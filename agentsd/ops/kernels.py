"""Which fused softmax attention runs where: torch's own, blocks of plain products on some CPUs, xformers."""

import itertools
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from agentsd.ops.attention import Attend, sdpa

# The scores of a block stay in the cache.
_SCORES_AT_ONCE = 1 << 21
_ROWS_AT_ONCE = 512


@cache
def plain_products_are_faster() -> bool:
    """Whether torch's fused kernel does not profit from bfloat16 on this CPU, where plain matrix products do."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") and not capabilities.get("amx_tile"))


def choose() -> Attend:
    """The attention of this machine where a processor names none: `scaled_dot_product_attention` or `attention`."""
    return attention if plain_products_are_faster() else sdpa


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *, scale: float | None = None
) -> Tensor:
    """`blockwise_attention` for bfloat16 on a CPU, `scaled_dot_product_attention` for everything else."""
    blockwise = query.dtype == torch.bfloat16 and query.device.type == "cpu" and not torch.is_grad_enabled()
    return (blockwise_attention if blockwise else sdpa)(query, key, value, attn_mask, scale=scale)


@torch.library.custom_op(
    "agentsd::blockwise_attention",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, *, float? scale=None) -> Tensor",
)
def blockwise_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *, scale: float | None = None
) -> Tensor:
    """Softmax attention by plain matrix products, a block of queries and heads at a time.

    Scores are rounded to the tensors' type before the softmax, as in unfused attention.

    Args:
        query: B×H×M×d.
        key, value: B×H×N×d.
        attn_mask: added to the scores, broadcastable to B×H×M×N.
        scale: of the scores; None is d^-0.5.

    Returns:
        B×H×M×d.
    """
    batch, heads, queries, size = query.shape
    keys = key.shape[2]
    q, k, v = (tensor.flatten(0, 1) for tensor in (query, key, value))
    bias = None if attn_mask is None else attn_mask.expand(batch, heads, -1, keys).flatten(0, 1)
    scale = size**-0.5 if scale is None else scale
    rows = min(queries, _ROWS_AT_ONCE)
    group = min(batch * heads, max(1, _SCORES_AT_ONCE // (rows * keys)))
    scores = q.new_empty(group * rows * keys)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for head, row in itertools.product(range(0, batch * heads, group), range(0, queries, rows)):
        part = slice(head, head + group)
        block = part, slice(row, row + rows)
        s = scores[: q[block].shape[:2].numel() * keys].view(*q[block].shape[:2], keys)
        if bias is None:
            torch.baddbmm(s, q[block], k[part].mT, beta=0, alpha=scale, out=s)
        else:
            rows_of = bias[part] if bias.shape[1] == 1 else bias[block]
            torch.baddbmm(rows_of, q[block], k[part].mT, alpha=scale, out=s)
        torch.bmm(torch.softmax(s, -1, out=s), v[part], out=out[block])
    return out.view(batch, heads, queries, size)


@blockwise_attention.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *, scale: float | None = None
) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


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
