"""The attention of the method: pure functions of tensors, nothing about models.

Agent attention is from *Agent Attention: On the Integration of Softmax and Linear Attention* (Han et al., ECCV 2024,
arXiv 2312.08874),
proportional attention from *Token Merging: Your ViT But Faster* (Bolya et al., ICLR 2023, arXiv 2210.09461, section 3).
"""

import itertools
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Attend(Protocol):
    """Softmax attention of B×H×M×d queries to B×H×N×d keys and values, as `scaled_dot_product_attention` does it."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *, scale: float | None = None
    ) -> Tensor: ...


sdpa: Attend = F.scaled_dot_product_attention

# There torch's fused kernel does not profit from bfloat16, and plain matrix products do.
_PRODUCTS_ARE_FASTER = torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()
# The scores of a block stay in the cache.
_SCORES_AT_ONCE = 1 << 21
_ROWS_AT_ONCE = 512


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


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *, scale: float | None = None
) -> Tensor:
    """The faster of `scaled_dot_product_attention` and `blockwise_attention`, with the signature of both."""
    blockwise = (
        _PRODUCTS_ARE_FASTER
        and query.dtype == torch.bfloat16
        and query.device.type == "cpu"
        and not torch.is_grad_enabled()
    )
    attend = blockwise_attention if blockwise else sdpa
    return attend(query, key, value, attn_mask, scale=scale)


def log_size_bias(sizes: Tensor, dtype_of: Tensor) -> Tensor:
    """The term log s of proportional attention, as a bias on keys that stand for `sizes` tokens: B×n → B×1×1×n."""
    return sizes.to(torch.promote_types(dtype_of.dtype, torch.float32)).log().to(dtype_of.dtype)[:, None, None]


def agent_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    agents: Tensor,
    *,
    scale2: float | None = None,
    shortcut: float = 0.0,
    bias: Tensor | None = None,
    attend: Attend = attention,
) -> Tensor:
    """Agent attention, linear in the number of tokens (Agent Attention, equation 5, without bias and convolution).

    The agents gather from all tokens, `V_A = softmax(A Kᵀ d^-0.5 + bias) V`, and hand on to every token,
    `O = softmax(Q Aᵀ scale2) V_A + shortcut · V`.

    Args:
        q, k, v: queries, keys and values, B×H×N×d.
        agents: agent tokens, B×H×n×d with n ≪ N.
        scale2: scale of the second product; None is d^-0.5. AgentSD takes d^(-0.5·k_scale2).
        shortcut: share of V added to the output, AgentSD's k_shortcut.
        bias: added to the first product, broadcastable to B×H×n×N; see `log_size_bias`.
        attend: the fused attention to call.

    Returns:
        B×H×N×d.
    """
    gathered = attend(agents, k, v, attn_mask=bias)
    out = attend(q, agents, gathered, scale=scale2)
    return out.add(v, alpha=shortcut) if shortcut else out


def size_weighted_attention(q: Tensor, k: Tensor, v: Tensor, sizes: Tensor, *, attend: Attend = attention) -> Tensor:
    """Attention to groups of tokens by their mean keys and values, exact where the tokens of a group have equal keys.

    `O = softmax(Q Kᵀ d^-0.5 + log s) V`: a group of s equal tokens weighs as much as its tokens would (proportional
    attention).

    Args:
        q: queries, B×H×N×d.
        k, v: mean keys and values of the groups, B×H×n×d.
        sizes: number of tokens in each group, B×n.
        attend: the fused attention to call.

    Returns:
        B×H×N×d.
    """
    return attend(q, k, v, attn_mask=log_size_bias(sizes, q))
