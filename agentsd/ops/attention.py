"""The attention of the method: the equations as functions of tensors.

Agent attention is from *Agent Attention: On the Integration of Softmax and Linear Attention* (Han et al., ECCV 2024,
arXiv 2312.08874),
proportional attention from *Token Merging: Your ViT But Faster* (Bolya et al., ICLR 2023, arXiv 2210.09461, section 3).
"""

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


def log_size_bias(sizes: Tensor, dtype_of: Tensor) -> Tensor:
    """The term log s of proportional attention, as a bias on keys that stand for `sizes` tokens: B×n → B×1×1×n."""
    return sizes.to(torch.promote_types(dtype_of.dtype, torch.float32)).log().to(dtype_of.dtype)[:, None, None]


def agent_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    agents: Tensor,
    *,
    biases: tuple[Tensor | None, Tensor | None] = (None, None),
    scale2: float | None = None,
    shortcut: float = 0.0,
    attend: Attend = sdpa,
) -> Tensor:
    """Agent attention, linear in the number of tokens (Agent Attention, equation 5, without convolution).

    Aggregation: `V_A = softmax(A Kᵀ d^-0.5 + B1) V`. Broadcast: `O = softmax(Q Aᵀ scale2 + B2) V_A + shortcut · V`.

    Args:
        q, k, v: queries, keys and values, B×H×N×d.
        agents: agent tokens, B×H×n×d with n ≪ N.
        biases: B1 and B2, broadcastable to B×H×n×N and B×H×N×n; AgentSD has none.
        scale2: scale of the second product; None is d^-0.5. AgentSD takes d^(-0.5·k_scale2).
        shortcut: share of V added to the output, AgentSD's k_shortcut.
        attend: the fused attention to call.

    Returns:
        B×H×N×d.
    """
    aggregated = attend(agents, k, v, attn_mask=biases[0])
    out = attend(q, agents, aggregated, attn_mask=biases[1], scale=scale2)
    return out.add(v, alpha=shortcut) if shortcut else out


def size_weighted_attention(q: Tensor, k: Tensor, v: Tensor, sizes: Tensor, *, attend: Attend = sdpa) -> Tensor:
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
