"""What the web server answers: the page, its queue and the pictures. Everything else that gradio offers is refused."""

from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

_API = ("info", "app_id", "startup-events", "queue/join", "queue/data", "cancel", "reset")
_EXACT = {"/", "/config", "/favicon.ico", "/manifest.json", "/theme.css", *(f"/gradio_api/{name}" for name in _API)}
_BELOW = ("/assets/", "/static/", "/svelte/", "/gradio_api/heartbeat/", "/gradio_api/run/")
_FILE = "/gradio_api/file="
# The page is to take nothing from elsewhere and to tell nothing elsewhere.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; frame-ancestors 'self'"
)
_MOST = 1 << 20


class Access:
    """ASGI middleware around the gradio application that answers the page's requests alone.

    Args:
        app: the application.
        folder: the only folder from which files are served.
    """

    def __init__(self, app: App, folder: Path) -> None:
        self.app = app
        self.folder = folder.resolve()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer 403 to what is not allowed, 411 and 413 to what is too large or may be; pass on the rest."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"0")
        if not self.is_allowed(scope["path"]):
            await _refuse(send, 403, "Not allowed.")
        elif b"transfer-encoding" in headers:
            await _refuse(send, 411, "Length required.")
        elif not length.isdigit() or int(length) > _MOST:
            await _refuse(send, 413, "Too large.")
        else:
            await self.app(scope, receive, _with_policy(send))

    def is_allowed(self, path: str) -> bool:
        """Whether a request's path is one that the page needs."""
        if path.startswith(_FILE):
            # Once as it is and once more decoded: whichever of the two is looked up, it lies in the folder.
            names = {path.removeprefix(_FILE), unquote(path.removeprefix(_FILE))}
            return all("\0" not in name and Path(name).resolve().is_relative_to(self.folder) for name in names)
        return path in _EXACT or path.startswith(_BELOW)


def _with_policy(send: Send) -> Send:
    async def send_with_policy(message: Message) -> None:
        if message["type"] == "http.response.start":
            added = [(b"content-security-policy", _POLICY.encode()), (b"x-content-type-options", b"nosniff")]
            message["headers"] = [*message.get("headers", []), *added]
        await send(message)

    return send_with_policy


async def _refuse(send: Send, status: int, text: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})
