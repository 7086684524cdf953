"""Pictures of what the acceleration does in one layer and one step, drawn over the image that comes out."""

import colorsys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from agentsd import checks
from agentsd.api import is_applied
from agentsd.describe import describe
from agentsd.drawing import draw
from agentsd.hosts.diffusers_unet import AgentSDProcessor, find_layers, networks
from agentsd.ops.merging import TokenMap
from agentsd.planning import LayerPlan

_SIDE = 512
_ROWS, _COLUMNS = 3, 4
# Black to yellow over violet and orange, equal steps in lightness.
_HEAT = ((0, 0, 0), (61, 10, 92), (145, 35, 104), (216, 76, 62), (249, 157, 15), (252, 250, 150))


@dataclass(frozen=True)
class View:
    """What the acceleration does in one layer and one step: pictures, and the numbers behind them.

    Attributes:
        image: the image that the run made.
        layer: name of the layer, as in `agentsd.describe`.
        step: the denoising step, from 0.
        attention: what is in force: `agent`, `merge` or `kv`.
        grid: height and width of the token grid.
        destination_tokens: row-major token indices of the n destinations, int64.
        index: group of each token, N int64. Group i < n is that of destination i, in `agent` and `kv` the tokens for
            which agent i stands; each token that is not merged is a group after them.
        weights: what a destination attends to, of its number, mean over the heads: N weights of sum 1.
    """

    image: Image.Image
    layer: str
    step: int
    attention: str
    grid: tuple[int, int]
    destination_tokens: Tensor
    index: Tensor
    weights: Callable[[int], Tensor]

    def attention_map(self, agent: int) -> Tensor:
        """What one agent attends to, height×width weights of sum 1, mean over the heads.

        In `agent` this is a row of the first product, softmax(A Kᵀ d^-0.5): from where the agent gathers. `kv` and
        `merge` have no agents that look: there it is what the query at destination number `agent` attends to. The
        weight of a group is shared equally by its tokens.

        Raises:
            ValueError: there is no such agent.
        """
        checks.whole("agent", agent, 0, len(self.destination_tokens) - 1)
        return self.weights(agent).view(self.grid)

    def nearest(self, x: float, y: float) -> int:
        """The number of the destination that is nearest to the point (x, y) of the image, in pixels."""
        height, width = self.grid
        across = (self.destination_tokens % width + 0.5) * (self.image.width / width) - x
        down = (self.destination_tokens // width + 0.5) * (self.image.height / height) - y
        return int((across**2 + down**2).argmin())

    @cached_property
    def destinations(self) -> Image.Image:
        """The destination tokens, each in the colour of its group, over the image."""
        picture = self._dimmed(0.55)
        pen = ImageDraw.Draw(picture)
        for number, token in enumerate(self.destination_tokens.tolist()):
            pen.rectangle(self._box(token, picture), fill=colour(number), outline="white")
        return picture

    @cached_property
    def groups(self) -> Image.Image:
        """A colour for each group of several tokens over the image, with lines between groups; tokens that are not
        merged keep the image's colours."""
        picture = self._zoomed()
        width, height = picture.size
        rows = np.arange(height) * self.grid[0] // height
        columns = np.arange(width) * self.grid[1] // width
        group = self.index.view(self.grid).numpy()[rows[:, None], columns]
        sizes = self.index.bincount().numpy()
        palette = np.array([colour(number) for number in range(len(sizes))], dtype=np.float32)
        image = np.asarray(picture, dtype=np.float32)
        merged = (sizes > 1)[group]
        out = np.where(merged[..., None], 0.35 * image + 0.65 * palette[group], image)
        edge = np.zeros(group.shape, dtype=bool)
        edge[1:] |= group[1:] != group[:-1]
        edge[:, 1:] |= group[:, 1:] != group[:, :-1]
        out[edge & merged] *= 0.4
        return Image.fromarray(out.astype(np.uint8))

    @cached_property
    def agents(self) -> Image.Image:
        """What agents attend to, a tile for each of twelve that are spread as the tiles are: `heat` of each."""
        width, height = (max(96, side // 2) for side in self._zoomed().size)
        gap = 4
        sheet = Image.new("RGB", (_COLUMNS * (width + gap) - gap, _ROWS * (height + gap) - gap), "white")
        for row in range(_ROWS):
            for column in range(_COLUMNS):
                x = (column + 0.5) / _COLUMNS * self.image.width
                y = (row + 0.5) / _ROWS * self.image.height
                tile = self.heat(self.nearest(x, y)).resize((width, height), Image.Resampling.LANCZOS)
                sheet.paste(tile, (column * (width + gap), row * (height + gap)))
        return sheet

    def heat(self, agent: int) -> Image.Image:
        """What one agent attends to (see `attention_map`) over the image; the agent's destination has a ring."""
        weights = self.attention_map(agent)
        share = Image.fromarray((weights / weights.max()).float().numpy(), mode=None)
        picture = self._dimmed(0.5).convert("L").convert("RGB")
        strength = np.asarray(share.resize(picture.size, Image.Resampling.BILINEAR)).clip(0, 1) ** 0.5
        stops = np.linspace(0, 1, len(_HEAT))
        heat = np.stack([np.interp(strength, stops, channel) for channel in zip(*_HEAT, strict=True)], axis=-1)
        over = (0.85 * strength)[..., None]
        picture = Image.fromarray(((1 - over) * np.asarray(picture) + over * heat).astype(np.uint8))
        left, top, right, bottom = self._box(int(self.destination_tokens[agent]), picture)
        pen = ImageDraw.Draw(picture)
        for grow, ink in ((6, "black"), (5, "white"), (4, "white"), (3, "black")):
            pen.ellipse((left - grow, top - grow, right + grow, bottom + grow), outline=ink)
        return picture

    def _zoomed(self) -> Image.Image:
        zoom = max(1, round(_SIDE / min(self.image.size)))
        size = self.image.width * zoom, self.image.height * zoom
        return self.image.convert("RGB").resize(size, Image.Resampling.BICUBIC)

    def _dimmed(self, share: float) -> Image.Image:
        return self._zoomed().point(lambda value: int(value * share))

    def _box(self, token: int, picture: Image.Image) -> tuple[int, int, int, int]:
        row, column = divmod(token, self.grid[1])
        left, right = (number * picture.width // self.grid[1] for number in (column, column + 1))
        top, bottom = (number * picture.height // self.grid[0] for number in (row, row + 1))
        return left, top, right - 1, bottom - 1


def colour(number: int) -> tuple[int, int, int]:
    """A colour for a group: hues a golden section apart, so that neighbours differ."""
    shade = colorsys.hsv_to_rgb(number * 0.6180339887 % 1, (0.9, 0.6, 0.75)[number % 3], (1.0, 0.85, 0.7)[number % 3])
    red, green, blue = (round(255 * part) for part in shade)
    return red, green, blue


class _Watch:
    """Looks at one layer during one step of a run.

    Attributes:
        ran: whether the layer was computed in that step.
        seen: what was done in it, its destinations and groups; None if it was unmodified.
        weights: of `View`; None if the processor that is wrapped computes its softmax by itself.
    """

    def __init__(self, pipe: Any, step: int) -> None:
        self.pipe = pipe
        self.step = step
        self.ran = False
        self.seen: tuple[LayerPlan, Tensor, TokenMap] | None = None
        self.weights: Callable[[int], Tensor] | None = None
        self._keys: TokenMap | None = None  # groups that share a key
        self._now = 0

    def step_ends(self, pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        """`callback_on_step_end` of the pipeline."""
        self._now = step + 1
        return {}

    def before(self, attn: Any, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of the layer: what is planned, and a record of the softmax that comes."""
        if self.step >= self.pipe.num_timesteps:
            raise ValueError(f"step is {self.step}; it must be from 0 to {self.pipe.num_timesteps - 1} in this run")
        if self._now != self.step:
            return
        self.ran, self.seen, self.weights = True, None, None
        if not isinstance(processor := attn.processor, AgentSDProcessor):
            return
        state, plan = processor.state, processor.state.plan(args[0])
        if plan and plan.attention and plan.destinations is not None:
            if plan.attention == "kv":
                self._keys = groups = state.token_map(plan, plan.tokens - plan.keys)
            else:
                self._keys = state.merged(plan)
                groups = state.token_map(plan, plan.tokens - plan.agents if plan.agents else plan.merged)
            self.seen = plan, plan.destinations, groups
            self._attend, processor.attend = processor.attend, self.record

    def record(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *, scale: float | None = None
    ) -> Tensor:
        """The layer's softmax attention; of the two of agent attention the first is remembered."""
        if self.seen and self.weights is None:
            plan, destinations, _ = self.seen
            rows = destinations if plan.attention == "kv" else slice(len(destinations))
            bias = None if attn_mask is None else attn_mask[-1]
            used = query.shape[-1] ** -0.5 if scale is None else scale
            self.weights = _weights(query[-1][:, rows], key[-1], bias, used, self._keys)
        return self._attend(query, key, value, attn_mask, scale=scale)

    def after(self, attn: Any, args: tuple[Any, ...], out: Tensor) -> None:
        """Forward hook of the layer."""
        if self._now == self.step and self.seen:
            attn.processor.attend = self._attend


def _weights(
    query: Tensor, key: Tensor, bias: Tensor | None, scale: float, keys: TokenMap | None
) -> Callable[[int], Tensor]:
    """What one row of H×n×d queries attends to among H×m×d keys; tokens of a group of keys share its weight.

    The bias, of one row for all or one for each, is added to the scores.
    """
    exact = torch.promote_types(query.dtype, torch.float32)
    query, key = (tensor.detach().to("cpu", exact) for tensor in (query, key))
    added = torch.zeros(1, 1, 1, dtype=exact) if bias is None else bias.detach().to("cpu", exact)
    index = None if keys is None else keys.index[-1].cpu()

    def weights(row: int) -> Tensor:
        one = slice(row, row + 1)
        scores = query[:, one] @ key.mT * scale + (added if added.shape[1] == 1 else added[:, one])
        shares = scores.softmax(dim=-1).mean(dim=(0, 1))
        return shares if index is None else (shares / index.bincount())[index]

    return weights


def _layers(pipe: Any) -> dict[str, Any]:
    """The attention of each row of `describe`, by the row's name."""
    layers = [layer for net in networks(pipe) for layer in find_layers(net)]
    return {row.name: layer.block.attn1 for row, layer in zip(describe(pipe).layers, layers, strict=True)}


def visualize(pipe: Any, prompt: str, step: int, layer: str | int, *, seed: int = 0, **call: Any) -> View:
    """Run an accelerated pipeline and look at what the acceleration does in one layer and one step.

    What is shown is what the run does: the groups and the softmax are taken from the layer while it works. With
    guidance they are those of the prompt, not of the negative prompt.

    Args:
        pipe: a pipeline that `agentsd.apply` has accelerated.
        prompt: what it is to draw.
        step: the denoising step to look at, from 0.
        layer: the layer to look at: its name in the table of `agentsd.describe`, or the number of its row, from 0.
        seed: of the image's noise.
        **call: further arguments of the pipeline, for example `num_inference_steps=25`.

    Returns:
        Pictures of the destinations, of the groups and of what agents attend to, and the numbers behind them.

    Raises:
        ValueError: the pipeline is not accelerated, the layer or the step does not exist, or the layer is unmodified
            in that step.

    Example:
        ```python
        pipe = agentsd.apply(agentsd.pipelines.load("demo"))
        view = agentsd.visualize(pipe, "a large red circle on a striped green background", step=5, layer=0)
        view.groups.save("groups.png")
        view.agents.save("agents.png")
        ```
    """
    if not is_applied(pipe):
        raise ValueError("the pipeline is not accelerated; agentsd.apply(pipe) comes first")
    checks.whole("step", step, 0)
    if not isinstance(prompt, str):
        raise ValueError(f"prompt is {prompt!r}; it must be one text")
    layers = _layers(pipe)
    names = list(layers)
    if layer not in (names if isinstance(layer, str) else range(len(names))) or isinstance(layer, bool):
        raise ValueError(
            f"layer is {layer!r}; it must be a name in the table of agentsd.describe(pipe), such as {names[0]!r}, or "
            f"the number of a row, from 0 to {len(names) - 1}"
        )
    name = layer if isinstance(layer, str) else names[layer]
    watch = _Watch(pipe, step)
    before = layers[name].register_forward_pre_hook(watch.before)
    after = layers[name].register_forward_hook(watch.after, always_call=True)
    # Hooks would have a compiled model compiled again.
    with before, after, torch.compiler.set_stance("force_eager"):
        image = draw(pipe, prompt, seed, callback_on_step_end=watch.step_ends, **call).images[0]
    if not watch.ran:
        raise ValueError(f"layer {name} is not computed in step {step}")
    if watch.seen is None:
        raise ValueError(f"layer {name} is unmodified in step {step}: there is nothing to see")
    if watch.weights is None:
        inner = type(layers[name].processor.inner).__name__
        raise ValueError(f"layer {name} computes its attention by {inner} in step {step}, which does not show it")
    plan, destinations, groups = watch.seen
    return View(
        image=image,
        layer=name,
        step=step,
        attention=str(plan.attention),
        grid=plan.grid,
        destination_tokens=destinations.cpu(),
        index=groups.index[-1].cpu(),
        weights=watch.weights,
    )
