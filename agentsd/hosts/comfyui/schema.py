"""The node AgentSD by ComfyUI's current schema."""

from typing import Any

from comfy_api.latest import ComfyExtension, io

from .nodes import CATEGORY, DESCRIPTION, INPUTS, accelerate

TYPES = {"MODEL": io.Model, "BOOLEAN": io.Boolean, "FLOAT": io.Float, "INT": io.Int}


def _input(name: str, kind: Any, limits: dict[str, Any]) -> Any:
    if isinstance(kind, list):
        return io.Combo.Input(name, options=kind, **limits)
    return TYPES[kind].Input(name, **limits)


class AgentSD(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AgentSD",
            display_name="AgentSD",
            category=CATEGORY,
            description=DESCRIPTION,
            inputs=[_input(name, *rest) for name, rest in INPUTS.items()],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: Any, **inputs: Any) -> io.NodeOutput:
        return io.NodeOutput(accelerate(model, **inputs))


class AgentSDExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [AgentSD]


async def comfy_entrypoint() -> ComfyExtension:
    """What ComfyUI calls when it loads the folder."""
    return AgentSDExtension()
