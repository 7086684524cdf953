"""The trainable module of Agent Attention, for networks that are trained."""

from agentsd.nn.attention import AgentAttention, AgentBias
from agentsd.nn.vit import convert_vit
from agentsd.nn.weights import convert_state_dict

__all__ = ["AgentAttention", "AgentBias", "convert_state_dict", "convert_vit"]
