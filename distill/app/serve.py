"""A local web page that shows depth: drop in a photo, see the map beside it, download files.

Python's own server and one page (assets/serve.html) suffice: Gradio 6 brings two dozen packages, and holds Pillow
below the version that this project is tested with. The server listens on this machine alone unless told otherwise,
keeps the last few results in memory, for an hour at most and under ids that cannot be guessed, and writes nothing. A
request must name the machine as a stranger's page cannot: by its address, `localhost`, its own name, or one that was
allowed. Otherwise a page whose domain is pointed at 127.0.0.1 once it is loaded (DNS rebinding) could read what this
machine's user sees.

    GET /                      the page
    POST /predict?fov=         an image file's bytes -> {"id", "width", "height", "kind", "seconds", "takes_fov"}; fov:
                               the camera's, on which the metric depth of some models depends
    GET /ID/colour.png?cmap=   the map in colours; /ID/depth.png, /ID/depth.npy, /ID/depth.glb?fov=, /ID/view.html?fov=
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import html
import io
import ipaddress
import json
import re
import secrets
import socket
import sys
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qs, urlsplit

from PIL import Image

from distill.core.wording import first_line
from distill.data.photos import BadImageError
from distill.inference.api import Depth, Model
from distill.inference.solid import FOV

MOST_BYTES = 64 << 20
"""The largest photo file, in bytes."""
KEPT, KEPT_S = 8, 3600.0
"""The number of results that stay in memory, and for how many seconds."""
MOST_WAITING = 16
"""The number of uploads that are in memory at once."""
_PIECE = 1 << 16
"""Bytes of an answer that are written at once."""
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""What a browser lets an answer do; a page's own script is added by its hash, so that no other script runs in it."""
TYPES = {
    ".png": "image/png",
    ".npy": "application/octet-stream",
    ".glb": "model/gltf-binary",
    ".html": "text/html; charset=utf-8",
}


class DepthServer(ThreadingHTTPServer):
    """Serves one model; `results` are the last maps by id, each with the time when it was made.

    load: called once the port is bound, since loading a model takes a while. names: by which requests may call this
    machine, besides addresses, localhost, `host` and its own name.
    """

    daemon_threads = True

    def __init__(
        self, load: Callable[[], Model], name: str, *, host: str, port: int, names: Collection[str] = ()
    ) -> None:
        """Raises OSError if the port cannot be bound."""
        self.name = name
        own = socket.gethostname()
        short = own.partition(".")[0]
        known = (*names, host, socket.getfqdn(host), own, short, f"{short}.local", "localhost")
        self.names = {_host(text) for text in known} - {""}
        self.turn, self.making = threading.Lock(), threading.Lock()
        self.waiting = threading.BoundedSemaphore(MOST_WAITING)
        self.results: OrderedDict[str, tuple[float, Depth]] = OrderedDict()
        super().__init__((host, port), _Handler)
        try:
            self.model = load()
        except BaseException:
            self.server_close()
            raise

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Reports an error, but not a browser that disconnected before its answer."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def is_called(self, host: str) -> bool:
        """Whether a request's Host is an address or one of the names of this machine, with or without a port."""
        name = _host(host)
        with contextlib.suppress(ValueError):
            return bool(ipaddress.ip_address(name.partition("%")[0]))
        return name in self.names or name.endswith(".localhost")  # browsers resolve those to this machine alone

    def predict(self, data: bytes, fov: float = FOV) -> dict[str, Any]:
        """Predicts and keeps the map of an image file's bytes; its id and what it is. Raises BadImageError, ValueError.

        fov: the horizontal field of view in degrees, for a model that takes it.
        """
        takes_fov = self.model.estimator.takes_focal
        with self.turn:  # one at a time: memory is planned for one image
            start = time.perf_counter()
            depth = self.model(data, **({"fov": fov} if takes_fov else {}))
            seconds = time.perf_counter() - start
            key = secrets.token_urlsafe(16)  # a visitor must not find the photographs of others by counting
            self.results[key] = time.monotonic(), depth
            while len(self.results) > KEPT or self.result(next(iter(self.results))) is None:
                self.results.popitem(last=False)
        height, width = depth.values.shape
        about = {"id": key, "width": width, "height": height, "kind": str(depth.kind), "seconds": round(seconds, 3)}
        return {**about, "licence": depth.licence, "takes_fov": takes_fov}

    def result(self, key: str) -> Depth | None:
        """The map of this id; None where there is none, or it is too old."""
        made, depth = self.results.get(key, (-KEPT_S, None))
        return depth if time.monotonic() - made < KEPT_S else None


class _Handler(BaseHTTPRequestHandler):
    server: DepthServer
    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds without a byte from the browser: its thread ends

    def log_message(self, *_: Any) -> None:
        """Logs nothing: the terminal is for the address and for errors."""

    def do_GET(self) -> None:  # noqa: N802
        """Sends the page, or a result's file."""
        if not self._is_for_us():
            return
        url = _split(self.path)
        if url.path == "/":
            page = resources.files("distill").joinpath("assets/serve.html").read_text(encoding="utf-8")
            self._send(200, page.replace("[[MODEL]]", html.escape(self.server.name)).encode(), ".html")
            return
        _, key, name = [*url.path.split("/"), "", ""][:3]
        depth = self.server.result(key)
        if depth is None:
            self._fault(404, "this result is no longer kept: send the photo again")
            return
        try:
            with self.server.making:  # a surface of a large photo takes gigabytes
                data, suffix = _file(depth, name, _options(url.query))
        except (ValueError, LookupError) as error:
            self._fault(400, str(error))
            return
        except OSError as error:  # the file is first written to a temporary folder
            self._fault(500, str(error))
            return
        self._send(200, data, suffix)

    def do_POST(self) -> None:  # noqa: N802
        """Predicts the depth of a photo."""
        if not self._is_for_us():
            return
        origin = self.headers.get("Origin")
        if origin is not None and _split(origin).netloc != self.headers.get("Host"):
            self._refuse(403, "requests from another site's page are refused")
            return
        length = self.headers.get("Content-Length", "")
        size = int(length[:20]) if length.isdecimal() else 0  # Python refuses numbers of thousands of digits
        url = _split(self.path)
        if url.path != "/predict" or not 0 < size <= MOST_BYTES:
            usage = f"POST /predict takes a photo of at most {MOST_BYTES >> 20} MB"
            self._refuse(413 if length.isdecimal() else 400, usage)
            return
        if not self.server.waiting.acquire(blocking=False):
            self._refuse(503, f"{MOST_WAITING} photos are waiting: try again later")
            return
        try:
            about = self.server.predict(self.rfile.read(size), _degrees(_options(url.query)))
        except (ConnectionError, TimeoutError):
            raise
        except (BadImageError, ValueError, OSError) as error:
            self._fault(400, str(error))
        except (RuntimeError, MemoryError) as error:
            reason = first_line(error)
            self._fault(500, f"the model failed on this photo: {reason}")
        else:
            self._send(200, json.dumps(about).encode(), ".json")
        finally:
            self.server.waiting.release()

    def _is_for_us(self) -> bool:
        """Whether the request names this machine; otherwise it is refused. Programs of old name none."""
        host = self.headers.get("Host")
        if host is None or self.server.is_called(host):
            return True
        self._refuse(403, f"{host} is no name of this machine: use its address, or distill serve --allow-name NAME")
        return False

    def _refuse(self, code: int, text: str) -> None:
        """Sends an error without reading the body, and closes the connection: the body would block another request."""
        self.close_connection = True
        self._fault(code, text)

    def _fault(self, code: int, text: str) -> None:
        self._send(code, json.dumps({"error": text}).encode(), ".json")

    def _send(self, code: int, data: bytes, suffix: str) -> None:
        self.send_response(code)
        self.send_header("Content-Type", TYPES.get(suffix, "application/json"))
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Content-Security-Policy", _policy(data) if suffix == ".html" else POLICY)
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.end_headers()
        for start in range(0, len(data), _PIECE):  # the time limit is that of one write, however much it sends
            self.wfile.write(memoryview(data)[start : start + _PIECE])


def _policy(page: bytes) -> str:
    """The policy of a page: its own scripts may run."""
    scripts = re.findall(rb"<script>(.*?)</script>", page, re.DOTALL)
    hashes = [f"'sha256-{base64.b64encode(hashlib.sha256(script).digest()).decode()}'" for script in scripts]
    return f"{POLICY}; script-src {' '.join(hashes)}"


def _file(depth: Depth, name: str, options: dict[str, str]) -> tuple[bytes, str]:
    """A result's file and its suffix. Raises LookupError for an unknown name, ValueError for invalid options."""
    if name == "colour.png":
        file = io.BytesIO()
        Image.fromarray(depth.colorize(options.get("cmap", "distill"))).save(file, "PNG")
        return file.getvalue(), ".png"
    names = {"depth.png": ".png", "depth.npy": ".npy", "depth.glb": ".glb", "view.html": ".html"}
    if name not in names:
        raise LookupError(f"no {name}; there are colour.png, {', '.join(names)}")
    is_3d = names[name] in (".glb", ".html")
    with tempfile.TemporaryDirectory() as folder:
        camera: dict[str, Any] = {"fov": _degrees(options)} if is_3d else {}
        return depth.save(Path(folder) / f"depth{names[name]}", **camera).read_bytes(), names[name]


def _split(address: str) -> SplitResult:
    """The parts of an address; without any where it is none."""
    try:
        return urlsplit(address)
    except ValueError:
        return SplitResult("", "", "", "", "")


def _host(address: str) -> str:
    """The host in lower case of an address that is a name with or without a port, or a URL; "" where it has none."""
    try:
        return (urlsplit(address if "://" in address else f"//{address}").hostname or "").rstrip(".")
    except ValueError:
        return ""


def _options(query: str) -> dict[str, str]:
    return {name: values[-1] for name, values in parse_qs(query).items()}


def _degrees(options: dict[str, str]) -> float:
    """The field of view that the query asks for."""
    text = options.get("fov", str(FOV))
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"fov must be a number of degrees, not {text!r}") from None
