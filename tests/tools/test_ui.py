"""agentsd-ui: what may be asked for, what the server answers, and the page in a real browser."""

import http.client
import json
import os
import re
import shutil
import socket
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from agentsd import AgentSDConfig, StepCache
from agentsd.cli.generate import main as generate
from agentsd.cli.ui import build_parser, main
from agentsd.images import read_parameters
from agentsd.ui.page import _done, serve
from agentsd.ui.studio import Cancelled, Limits, Progress, Request, Result, Studio

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
PROMPT = "a red circle"
WAIT = 300_000  # milliseconds; a loaded machine is slow


def request(**changes: Any) -> Request:
    values: dict[str, Any] = {
        "prompt": PROMPT,
        "negative_prompt": "blue, dark",
        "model": "tiny",
        "preset": "paper",
        "ratio": 0.5,
        "steps": 3,
        "guidance_scale": 3.0,
        "seed": 7,
    }
    return Request(**values | changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ui")
    (folder / "secret.txt").write_text("not for visitors")
    return folder / "output"


@pytest.fixture(scope="module")
def studio(tiny_pipeline_folder: Path, folder: Path) -> Studio:
    return Studio([str(tiny_pipeline_folder), "demo"], folder, Limits(side=256, steps=400), device="cpu")


@pytest.fixture(scope="module")
def address(studio: Studio) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch, socket.socket() as probe:
        patch.setenv("GRADIO_TEMP_DIR", "")  # taken back afterwards
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        page, address = serve(studio, "127.0.0.1", port)
        yield address
        page.close()


def test_both_images_are_drawn_and_can_be_drawn_again(
    studio: Studio, tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    *steps, result = studio.draw(request(), threading.Event())
    assert isinstance(result, Result)
    timed = [(news.kind, news.step) for news in steps if isinstance(news, Progress) and news.steps == 3]
    assert timed == [(kind, step) for kind in ("stock", "accelerated") for step in range(4)]
    assert min(result.seconds) > 0
    assert read_parameters(result.paths[1])[2]["AgentSD"] != "off"
    for path, text in zip(result.paths, ("off", '"ratio": 0.5'), strict=True):
        assert text in read_parameters(path)[2]["AgentSD"]
        again = tmp_path / path.name
        options = ["--from-png", str(path), "--model", str(tiny_pipeline_folder), "--output", str(again), "--quiet"]
        assert generate(options) == 0
        assert np.array_equal(Image.open(again), Image.open(path))
    assert not np.array_equal(*(Image.open(path) for path in result.paths))
    assert str(tiny_pipeline_folder) not in result.parameters


def test_a_run_can_be_cancelled_and_the_next_one_works(studio: Studio) -> None:
    cancelled = threading.Event()
    run = studio.draw(request(steps=400), cancelled)
    seen = [next(run) for _ in range(3)]
    cancelled.set()
    with pytest.raises(Cancelled):
        seen.extend(run)
    assert len(seen) < 400
    assert isinstance(list(studio.draw(request(steps=1), threading.Event()))[-1], Result)


def test_a_run_of_few_steps_is_warned_of(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = AgentSDConfig(steps=(StepCache(interval=3),))
    with monkeypatch.context() as patch:
        patch.setattr(AgentSDConfig, "from_preset", lambda name: cached)
        *_, result = studio.draw(request(steps=6), threading.Event())
    assert isinstance(result, Result)
    assert [text.split(",")[0] for text in result.warnings] == ["interval of steps is 3: in a run of 6 steps"]
    assert '<p class="warning">Warning: interval of steps is 3: in a run of 6 steps, ' in _done(result)
    *_, result = studio.draw(request(), threading.Event())
    assert isinstance(result, Result)
    assert not result.warnings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": " \n"}, "the prompt is empty"),
        ({"prompt": "a" * 1001}, "the prompt has 1001 letters; it may have 1000"),
        ({"negative_prompt": "a" * 1001}, "the negative prompt has 1001 letters"),
        ({"model": "/etc/passwd"}, "model is '/etc/passwd'; it must be one of tiny, demo"),
        ({"model": "../tiny"}, "model is '../tiny'; it must be one of"),
        ({"preset": "../paper"}, "preset is '../paper'; it must be one of"),
        ({"ratio": 0.9}, "ratio is 0.9; with stride 2 it must be a number from 0 to 0.75"),
        ({"steps": 401}, "steps is 401; it must be a whole number from 1 to 400"),
        ({"steps": 1.5}, "steps is 1.5; it must be a whole number"),
        ({"steps": float("nan")}, "steps is nan; it must be"),
        ({"seed": -1}, "seed is -1; it must be"),
        ({"guidance_scale": float("nan")}, "guidance scale is nan; it must be a number from 0 to 50"),
        ({"width": 264}, "width is 264; it must be a whole number from 8 to 256"),
        ({"height": 68}, "height is 68; for this model it must be a multiple of 8"),
    ],
)
def test_bad_requests_get_one_sentence(studio: Studio, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        list(studio.draw(request(**changes), threading.Event()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", "0"], "argument --port: must be a whole number from 1 to 65535, not '0'"),
        (["--max-side", "many"], "argument --max-side: must be a whole number from 64 to 8192, not 'many'"),
        (["--model", "no/such/model"], "unknown model 'no/such/model'"),
        (["--model", "demo", "--model", "demo"], "--model 'demo': there is already a model of the name 'demo'"),
        (["--dtype", "int8"], "dtype must be one of"),
    ],
)
def test_the_command_says_what_is_wrong(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--output", str(tmp_path), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"agentsd-ui: error: {message}")
    assert error.count("\n") == 1


def test_only_this_machine_is_listened_to_unless_told_otherwise() -> None:
    assert build_parser().parse_args([]).host == "127.0.0.1"


def ask(address: str, path: str, method: str = "GET", body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    """The answer to one request whose path goes out as it is."""
    url = urllib.parse.urlsplit(address)
    connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=60)
    connection.putrequest(method, path, skip_accept_encoding=True)
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    if body is not None:
        connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(body)
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    return answer.status, text


def test_the_server_serves_its_folder_and_no_other_file(address: str, folder: Path) -> None:
    picture = folder / "shown.png"
    Image.new("RGB", (8, 8)).save(picture)
    assert ask(address, f"/gradio_api/file={picture}") == (200, picture.read_bytes())
    secret = folder.parent / "secret.txt"
    link = folder / "link.txt"
    link.symlink_to(secret)
    this = Path(__file__)
    attempts = [
        *(
            f"/gradio_api/file={path}"
            for path in ("/etc/passwd", secret, this, link, "tests/tools/test_ui.py", "setup.cfg")
        ),
        f"/gradio_api/file={folder}/../secret.txt",
        f"/gradio_api/file={folder}/%2e%2e/secret.txt",
        f"/gradio_api/file={folder}/..%2fsecret.txt",
        f"/gradio_api/file={folder}/%252e%252e/secret.txt",
        f"/gradio_api/file={folder}\\..\\secret.txt",
        f"/gradio_api/file={folder}",
        "/gradio_api/file=~/.bashrc",
        "/gradio_api/file=http://127.0.0.1:1/",
        "/gradio_api/file=file:///etc/passwd",
        f"/gradio_api/file=%00{secret}",
        f"/gradio_api/file/{secret}",
        f"/file={secret}",
        f"/static/../../../../../../../../../..{secret}",
        f"/static/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e{secret}",
        f"/assets/..%2f..%2f..%2f..%2f..%2f..%2f..%2f..%2f..%2f..%2f..{secret}",
        "/gradio_api/proxy=http://127.0.0.1:1/",
        "/monitoring",
        "/gradio_api/runs",
        "/gradio_api/stream/x/0/0/playlist-file",
        "/gradio_api/custom_component/x/client/component/..%2f..%2fx.py",
    ]
    for attempt in attempts:
        status, text = ask(address, attempt)
        assert status in (400, 403, 404), attempt
        assert b"not for visitors" not in text, attempt
        assert b"root:" not in text, attempt


def test_the_server_takes_no_files_and_no_large_requests(address: str, folder: Path) -> None:
    before = sorted(folder.parent.rglob("*"))
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="../../evil.png"\r\n\r\nx\r\n--x--\r\n'
    for path in ("/gradio_api/upload", "/upload", "/gradio_api/component_server", "/gradio_api/vibe-edit"):
        assert ask(address, path, "POST", body, Content_Type="multipart/form-data; boundary=x")[0] in (403, 404, 405)
    assert ask(address, "/gradio_api/queue/join", "POST", b"x" * ((1 << 20) + 1))[0] == 413
    assert ask(address, "/gradio_api/queue/join", "POST", Transfer_Encoding="chunked")[0] == 411
    assert sorted(folder.parent.rglob("*")) == before


def test_the_configuration_tells_no_path_and_no_unlisted_model(address: str, tiny_pipeline_folder: Path) -> None:
    status, text = ask(address, "/config")
    assert status == 200
    assert str(tiny_pipeline_folder) not in text.decode()
    config = json.loads(text)
    dropdown = next(part["props"] for part in config["components"] if part["props"].get("elem_id") == "model")
    assert [name for name, _ in dropdown["choices"]] == ["tiny", "demo"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET.split())
        yield browser
        browser.close()


class Visit:
    """The page in a window of its own, and what went over the wire."""

    def __init__(self, browser: Any, address: str, width: int = 1280, scheme: str = "light") -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.page = self.context.new_page()
        self.page.set_default_timeout(WAIT)
        self.hosts: set[str] = set()
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.hosts.add(urllib.parse.urlsplit(request.url).netloc))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("response", lambda answer: answer.status >= 400 and self.complaints.append(answer.url))
        self.page.on("console", lambda said: said.type == "error" and self.complaints.append(said.text))
        self.page.goto(address)
        self.page.wait_for_selector("#generate")

    def __enter__(self) -> "Visit":
        return self

    def __exit__(self, *_: Any) -> None:
        self.context.close()

    def generate(self, expect: str, **fields: str) -> str:
        """Fill fields in, ask for images and wait until the status says what is expected."""
        places = {f"#{name} textarea, #{name} input[type=number]": value for name, value in fields.items()}
        # Older gradio sets the fields once more when the page is there already.
        while any(self.page.input_value(place) != value for place, value in places.items()):
            for place, value in places.items():
                self.page.fill(place, value)
            self.page.wait_for_timeout(500)
        self.page.click("#generate")
        return self.status(expect)

    def status(self, expect: str) -> str:
        self.page.wait_for_selector(f"#status :text('{expect}')")
        return str(self.page.inner_text("#status"))

    def overflow(self) -> int:
        """How many pixels the page is wider than its window."""
        script = "document.scrollingElement.scrollWidth - document.scrollingElement.clientWidth"
        return int(self.page.evaluate(script))

    def brightness(self) -> float:
        """Of the page's background, 0 to 255."""
        style = self.page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(map(float, re.findall(r"[\d.]+", style)[:3])) / 3


@pytest.mark.slow
def test_a_visitor_draws_compares_and_copies(browser: Any, address: str, folder: Path) -> None:
    with Visit(browser, address) as visit:
        page = visit.page
        visit.generate("Done", prompt="a red circle", steps="3", seed="5")
        numbers = re.search(r"Stock ([\d.]+) s, accelerated ([\d.]+) s: ([\d.]+)×", page.inner_text("#numbers"))
        assert numbers
        before, after, speed = map(float, numbers.groups())
        assert min(before, after) >= 0
        assert speed > 0
        pictures = [page.get_attribute(f"#slider img >> nth={index}", "src") for index in (0, 1)]
        files = sorted({urllib.parse.unquote(str(url)).split("file=")[1] for url in pictures})
        assert all(Path(file).is_relative_to(folder) for file in files)
        assert len(files) == 2

        handle = page.locator("#slider .outer")
        box, start = handle.bounding_box(), handle.get_attribute("style")
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        page.mouse.down()
        page.mouse.move(box["x"] - 80, box["y"] + box["height"] / 2, steps=4)
        page.mouse.up()
        assert handle.bounding_box()["x"] < box["x"] - 40
        assert handle.get_attribute("style") != start

        parameters = page.input_value("#parameters textarea")
        assert parameters.startswith("a red circle\nSteps: 3, Sampler: DDIM, CFG scale: 7.5, Seed: 5, Size: 64x64")
        newest = max(folder.glob("*-accelerated.png"), key=lambda path: path.stat().st_mtime_ns)
        with Image.open(newest) as image:
            assert image.info["parameters"] == parameters
        page.click("text=What is done in which layer")
        table = page.inner_text("#layers table")
        assert "down_blocks.0.attentions.0" in table
        assert "16×16" in table
        assert page.locator("#layers tbody tr").count() == 7
        assert page.locator("#gallery img").count() == 2
        visit.generate("Done", seed="6")
        page.wait_for_function("document.querySelectorAll('#gallery img').length == 4")

        shown = visit.generate("Steps is 999", steps="999")
        assert shown.strip() == "Steps is 999; it must be a whole number from 1 to 400."
        assert visit.generate("empty", prompt="  ", steps="2").strip() == "The prompt is empty: it says what to draw."

        page.fill("#prompt textarea", "a blue ring")
        page.fill("#steps input", "400")
        page.click("#generate")
        page.wait_for_selector("#status progress[value]")
        page.click("#cancel")
        visit.status("Cancelled.")
        files_before = sorted(folder.glob("*.png"))
        visit.generate("Done", steps="1")
        assert len(sorted(folder.glob("*.png"))) == len(files_before) + 2, "the cancelled run wrote nothing"
        assert visit.hosts == {urllib.parse.urlsplit(address).netloc}
        assert visit.complaints == []
    with Visit(browser, address) as another:
        assert another.page.locator("#gallery img").count() == 0


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_narrow_and_wide_light_and_dark(browser: Any, address: str, width: int, scheme: str) -> None:
    with Visit(browser, address, width, scheme) as visit:
        visit.generate("Done", prompt="a red circle", steps="1")
        visit.page.click("text=What is done in which layer")
        visit.page.wait_for_selector("#layers table")
        assert visit.overflow() <= 0
        assert (visit.brightness() > 200) == (scheme == "light")
        if folder := os.environ.get("AGENTSD_SCREENSHOTS"):
            visit.page.screenshot(path=f"{folder}/ui-{width}-{scheme}.png", full_page=True)


@pytest.mark.slow
def test_the_embedded_model_draws_on_the_page(browser: Any, address: str) -> None:
    with Visit(browser, address) as visit:
        visit.page.click("#model input")
        visit.page.click("[role=option]:has-text('demo')")
        visit.page.wait_for_function("document.querySelector('#steps input').value == '25'")
        assert "not know: unicorn" in visit.generate("Done", prompt="a red unicorn", steps="2")
        assert "Size: 256x256" in visit.page.input_value("#parameters textarea")
