"""ComfyUI custom node: link or copy this folder into ComfyUI/custom_nodes. It needs the installed package agentsd."""

try:
    from .schema import comfy_entrypoint

    __all__ = ["comfy_entrypoint"]
except ModuleNotFoundError as error:
    # ComfyUI before August 2025 has no comfy_api.latest and knows nodes by these names.
    if not (error.name or "").startswith("comfy_api"):
        raise
    from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

    __all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
