"""The node AgentSD by ComfyUI's current schema."""

from typing import Any

from comfy_api.latest import ComfyExtension, io

from .nodes import CATEGORY, DESCRIPTION, INPUTS, MODEL_TOOLTIP, Input, accelerate


def _input(item: Input) -> Any:
    kind = {"BOOLEAN": io.Boolean, "COMBO": io.Combo, "FLOAT": io.Float, "INT": io.Int}[item.kind]
    limits = {name: list(value) if name == "options" else value for name, value in item.limits.items()}
    return kind.Input(item.name, tooltip=item.tooltip, **limits)


class AgentSD(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AgentSD",
            display_name="AgentSD",
            category=CATEGORY,
            description=DESCRIPTION,
            inputs=[io.Model.Input("model", tooltip=MODEL_TOOLTIP), *map(_input, INPUTS)],
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
