"""The gradio page over a studio, and its server."""

import inspect
import os
import threading
from collections.abc import Iterator
from html import escape
from typing import Any

import gradio as gr
import torch

from agentsd import AgentSDConfig, Report
from agentsd.generate.request import Settings
from agentsd.ui.access import Access
from agentsd.ui.studio import KINDS, Cancelled, Progress, Request, Result, Studio

PROMPT = "a large red circle on the left, a small blue star on the right, on a striped green background"
RATIO = "Share of the tokens merged away."
IN_GALLERY = 24
IN_QUEUE = 8
_CSS = """
#status progress { width: 100%; height: 0.6rem; accent-color: var(--color-accent); }
#status p, #numbers p, #layers p { margin: 0.2rem 0; }
#status .error { color: var(--error-text-color, #b91c1c); font-weight: 600; }
#numbers b { font-size: 1.25rem; }
#layers div { overflow-x: auto; }
#layers table { border-collapse: collapse; font-size: 0.85rem; white-space: nowrap; }
#layers th, #layers td { text-align: left; padding: 0.15rem 0.9rem 0.15rem 0; }
#layers tr { border-bottom: 1px solid var(--border-color-primary); }
"""


def build(studio: Studio) -> gr.Blocks:
    """The page: what to draw on one side, the images and what was measured on the other."""
    limits, models, presets = studio.limits, list(studio.models), list(AgentSDConfig.presets())
    first = Settings(model=models[0])
    running: dict[str, threading.Event] = {}

    def generate(visit: gr.Request, gallery: list[tuple[str, str]], *values: Any) -> Iterator[dict[Any, Any]]:
        session = str(visit.session_hash)
        cancelled = running[session] = threading.Event()
        yield {status: "<p>Loading the model …</p><progress></progress>"}
        try:
            request = Request(*values)
            for news in studio.draw(request, cancelled):
                if isinstance(news, Progress):
                    yield {status: _progress(news)}
                    continue
                short = request.prompt if len(request.prompt) <= 60 else request.prompt[:59] + "…"
                pairs = [
                    (str(path), f"{kind}, {short}, seed {request.seed}")
                    for kind, path in zip(KINDS, news.paths, strict=True)
                ]
                gallery = [*pairs, *gallery][:IN_GALLERY]
                yield {
                    status: _done(news),
                    slider: tuple(map(str, news.paths)),
                    numbers: _numbers(news),
                    layers: _table(news.report),
                    parameters: news.parameters,
                    pictures: gallery,
                    kept: gallery,
                }
        except Cancelled:
            yield {status: "<p>Cancelled.</p>"}
        except (ValueError, OSError) as error:
            yield {status: _error(" ".join(str(error).split()))}
        except (MemoryError, torch.OutOfMemoryError):
            yield {status: _error("out of memory; a smaller width and height need less")}
        finally:
            running.pop(session, None)

    def cancel(visit: gr.Request) -> str:
        event = running.get(str(visit.session_hash))
        if event:
            event.set()
        return "<p>Cancelled.</p>" if event else "<p>Nothing is running.</p>"

    def with_preset(preset: str) -> Any:
        used = AgentSDConfig.from_preset(preset).has("ratio")
        return gr.update(interactive=used, info=RATIO if used else f"Has no effect in preset {preset}.")

    def with_model(name: str) -> list[float]:
        settings = Settings(model=name)
        return [settings.steps, settings.guidance_scale]

    with gr.Blocks(title="AgentSD", analytics_enabled=False, fill_width=True) as page:
        gr.Markdown("# AgentSD\nOne prompt, drawn by stock Stable Diffusion and with accelerated self-attention.")
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=300):
                example = PROMPT if models[0] == "demo" else ""
                prompt = gr.Textbox(example, label="Prompt", lines=3, max_length=limits.letters, elem_id="prompt")
                model = gr.Dropdown(models, value=models[0], label="Model", elem_id="model")
                with gr.Row():
                    preset = gr.Dropdown(presets, value="paper", label="Preset", elem_id="preset")
                    ratio = gr.Slider(0, 0.9, 0.4, step=0.05, label="Ratio", info=RATIO, elem_id="ratio")
                with gr.Row():
                    most = f"At most {limits.steps}."
                    steps = gr.Number(first.steps, precision=0, label="Steps", info=most, elem_id="steps")
                    seed = gr.Number(0, precision=0, label="Seed", info="Of the noise.", elem_id="seed")
                with gr.Accordion("More", open=False):
                    negative = gr.Textbox("", label="Negative prompt", max_length=limits.letters, elem_id="negative")
                    guidance = gr.Number(first.guidance_scale, label="Guidance scale", elem_id="guidance")
                    with gr.Row():
                        width = gr.Number(0, precision=0, label="Width", info="0: by the model.", elem_id="width")
                        height = gr.Number(0, precision=0, label="Height", info="0: by the model.", elem_id="height")
                with gr.Row():
                    go = gr.Button("Generate", variant="primary", elem_id="generate")
                    stop = gr.Button("Cancel", variant="stop", elem_id="cancel")
                status = gr.HTML("<p>Ready.</p>", elem_id="status")
            with gr.Column(scale=3, min_width=320):
                sides = "Stock on the left, accelerated on the right"
                look: dict[str, Any] = {"type": "filepath", "max_height": 640}
                slider = gr.ImageSlider(label=sides, interactive=False, elem_id="slider", **look)
                numbers = gr.HTML(elem_id="numbers")
                with gr.Accordion("What is done in which layer", open=False):
                    layers = gr.HTML("<p>Nothing was drawn yet.</p>", elem_id="layers")
                look = {"lines": 3, "max_lines": 8, "buttons": ["copy"]}
                parameters = gr.Textbox(label="Generation parameters", interactive=False, elem_id="parameters", **look)
        look = {"columns": 6, "fit_columns": False, "height": "auto", "buttons": ["download", "fullscreen"]}
        pictures = gr.Gallery(label="Images of this session", interactive=False, elem_id="gallery", **look)
        kept = gr.State([])

        at_once: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        run = go.click(
            generate,
            [kept, prompt, negative, model, preset, ratio, steps, guidance, seed, width, height],
            [status, slider, numbers, layers, parameters, pictures, kept],
            show_progress="minimal",
            show_progress_on=status,
            concurrency_limit=1,
            api_visibility="private",
        )
        stop.click(cancel, None, status, cancels=[run], **at_once)
        preset.change(with_preset, preset, ratio, **at_once)
        model.change(with_model, model, [steps, guidance], **at_once)
    return page.queue(max_size=IN_QUEUE, api_open=False)


def serve(studio: Studio, host: str, port: int) -> tuple[gr.Blocks, str]:
    """Start the server in a thread; return the page, which closes it, and its address; OSError: the port is taken."""
    from starlette.middleware import Middleware

    folder = studio.output.folder.resolve()
    # gradio keeps copies of what it shows; they are to lie in the only folder that is served.
    os.environ["GRADIO_TEMP_DIR"] = str(folder / "cache")
    page = build(studio)
    # Not every gradio 6 has the last of them.
    off = ("share", "inbrowser", "ssr_mode", "mcp_server", "pwa", "enable_monitoring", "run_history")
    known = inspect.signature(page.launch).parameters
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=True,
        quiet=True,
        footer_links=[],
        max_file_size=1,
        allowed_paths=[str(folder)],
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=_CSS,
        app_kwargs={"middleware": [Middleware(Access, folder=folder)]},
        **{name: False for name in off if name in known},
    )
    return page, address


def _progress(news: Progress) -> str:
    done = news.step + (news.steps if news.kind == "accelerated" else 0)
    what = "Warming up" if news.steps == 1 else f"{news.kind.capitalize()}: step {news.step} of {news.steps}"
    return f'<p>{what}</p><progress value="{done}" max="{2 * news.steps}"></progress>'


def _done(result: Result) -> str:
    words = f" The embedded model does not know: {', '.join(result.unknown)}." if result.unknown else ""
    warnings = "".join(f'<p class="warning">Warning: {escape(text)}.</p>' for text in result.warnings)
    return f"<p>Done.{escape(words)}</p>{warnings}"


def _error(text: str) -> str:
    return f'<p class="error" role="alert">{escape(text[:1].upper() + text[1:].rstrip("."))}.</p>'


def _numbers(result: Result) -> str:
    before, after = result.seconds
    closeness = "identical images" if result.psnr == float("inf") else f"PSNR {result.psnr:.1f} dB to the stock image"
    return (
        f"<p>Stock {before:.2f} s, accelerated {after:.2f} s: <b>{before / after:.2f}×</b> the speed. {closeness}. "
        "Each timed once, after a warm-up.</p>"
    )


def _table(report: Report) -> str:
    head, *rows = [[escape(cell) for cell in line] for line in report.table()]
    cells = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    heads = "".join(f"<th>{cell}</th>" for cell in head)
    notes = "".join(f"<p>{escape(line)}</p>" for line in str(report).splitlines()[2 + len(rows) :])
    return f"<div><table><thead><tr>{heads}</tr></thead><tbody>{cells}</tbody></table></div>{notes}"
