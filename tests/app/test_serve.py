"""The page's server: a photo in, its files out, one line for what is no photo, nothing for strangers."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import re
import socket
import socketserver
import struct
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
from PIL import Image

from distill.app import serve
from distill.app.cli import main
from distill.inference.api import Model
from tests.inference.fake import Fake


@pytest.fixture(scope="module")
def address():
    with serve.DepthServer(lambda: Model(Fake()), "a <model>", host="127.0.0.1", port=0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def ask(url: str, data: bytes | None = None, **headers: str) -> bytes:
    with urllib.request.urlopen(urllib.request.Request(url, data, headers)) as answer:
        return answer.read()


def fault(url: str, data: bytes | None = None, **headers: str) -> tuple[int, str]:
    with pytest.raises(urllib.error.HTTPError) as found:
        ask(url, data, **headers)
    with found.value as answer:
        return answer.code, json.loads(answer.read())["error"]


NO_FIELDS = ("999", "180", "0", "-5", "nan", "inf", "5e-324", "wide", "1e999")


def photo() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def test_a_photo_gives_its_files(address):
    page = ask(address).decode()
    assert "a &lt;model&gt;" in page and "://" not in page.replace("http://www.w3.org", "")
    said = json.loads(ask(f"{address}/predict", photo()))
    assert (said["width"], said["height"], said["kind"], said["licence"]) == (30, 20, "affine_disparity", "CC0")
    here = f"{address}/{said['id']}"
    assert Image.open(io.BytesIO(ask(f"{here}/colour.png?cmap=turbo"))).size == (30, 20)
    grey, last = (
        np.asarray(Image.open(io.BytesIO(ask(f"{here}/colour.png?{q}")))) for q in ("cmap=gray", "cmap=turbo&cmap=gray")
    )
    assert (np.ptp(grey, -1) == 0).all() and (grey == last).all()
    for name, kind in (
        ("colour.png", "image/png"),
        ("depth.npy", "application/octet-stream"),
        ("view.html", "text/html"),
    ):
        with urllib.request.urlopen(f"{here}/{name}") as answer:
            assert answer.headers["Content-Type"].startswith(kind)
            assert (answer.headers["Cache-Control"], answer.headers["X-Content-Type-Options"]) == (
                "no-store",
                "nosniff",
            )
    assert np.asarray(Image.open(io.BytesIO(ask(f"{here}/depth.png")))).max() == 65535
    assert np.load(io.BytesIO(ask(f"{here}/depth.npy"))).shape == (20, 30)
    assert struct.unpack_from("<4sI", ask(f"{here}/depth.glb?fov=70")) == (b"glTF", 2)
    assert b"70 degrees" in ask(f"{here}/view.html?fov=70")


def test_a_model_whose_metres_depend_on_the_camera_is_told_the_field_of_view():
    class Sees(Fake):
        takes_focal = True

        def predict(self, images, *, focal=None):
            self.focal = focal
            return super().predict(images)

    fake = Sees()
    with serve.DepthServer(lambda: Model(fake), "m", host="127.0.0.1", port=0) as server:
        assert server.predict(photo(), 90.0)["takes_fov"] and fake.focal == pytest.approx(15)
        assert server.predict(photo())["takes_fov"] and fake.focal == pytest.approx(15 * 3**0.5)


def test_what_cannot_be_is_one_line(address, monkeypatch):
    assert fault(f"{address}/predict", b"no photo")[0] == 400
    assert fault(f"{address}/predict?fov=wide", photo()) == (400, "fov must be a number of degrees, not 'wide'")
    code, told = fault(f"{address}/predict", photo(), Origin="http://elsewhere.example")
    assert code == 403 and "another site" in told
    key = json.loads(ask(f"{address}/predict", photo()))["id"]
    for path, words in (
        ("colour.png?cmap=x", "cmap must be"),
        *((f"{name}?fov={fov}", "fov must be") for name in ("depth.glb", "view.html") for fov in NO_FIELDS),
        ("../x", "there are colour"),
    ):
        assert words in fault(f"{address}/{key}/{path}")[1]
    for _ in range(serve.KEPT):
        ask(f"{address}/predict", photo())
    assert fault(f"{address}/{key}/depth.png") == (404, "this result is no longer kept: send the photo again")
    monkeypatch.setattr(serve, "MOST_BYTES", 10)
    assert fault(f"{address}/predict", photo())[0] == 413


def test_a_model_that_fails_on_a_photo_is_one_line():
    class Failing(Fake):
        def predict(self, images):
            raise RuntimeError("CUDA error: out of memory\nand more")

    with serve.DepthServer(lambda: Model(Failing()), "m", host="127.0.0.1", port=0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        told = fault(f"http://127.0.0.1:{server.server_address[1]}/predict", photo())
        server.shutdown()
    assert told == (500, "the model failed on this photo: CUDA error: out of memory")


def test_a_port_or_host_that_cannot_be_had_is_told(address, capsys, monkeypatch):
    assert main(["serve", "--port", address.rpartition(":")[2]]) == 2
    assert "give another --port" in capsys.readouterr().err
    assert main(["serve", "--port", "65536"]) == 2
    assert "--port is from 0 to 65535" in capsys.readouterr().err

    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(serve, "DepthServer", unknown)
    assert main(["serve", "--host", "nowhere"]) == 2
    assert "--host nowhere: Name or service not known; 127.0.0.1 is" in capsys.readouterr().err


def test_a_browser_that_goes_away_and_a_length_of_no_number_are_no_faults_here(address, monkeypatch):
    faults, gone = [], threading.Event()
    monkeypatch.setattr(socketserver.BaseServer, "handle_error", lambda *_: faults.append(1))
    closed = serve.DepthServer.shutdown_request
    monkeypatch.setattr(serve.DepthServer, "shutdown_request", lambda *told: (closed(*told), gone.set()))
    place = address.rpartition("/")[2].split(":")
    head = "POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: "
    for length, body in (("100000", b"half"), (str(len(photo())), photo())):
        gone.clear()
        with socket.create_connection((place[0], int(place[1]))) as browser:
            browser.sendall(f"{head}{length}\r\n\r\n".encode() + body)
            browser.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closes with a reset
        assert gone.wait(10) and not faults
    with socket.create_connection((place[0], int(place[1]))) as browser:
        browser.sendall(f"{head}{'9' * 5000}\r\n\r\n".encode())
        assert browser.recv(12) == b"HTTP/1.1 413"


def test_a_model_that_cannot_be_loaded_gives_its_port_back(monkeypatch):
    closed, plain = [], serve.DepthServer.server_close
    monkeypatch.setattr(serve.DepthServer, "server_close", lambda server: (closed.append(1), plain(server)))

    def broken():
        raise OSError("no weights")

    with pytest.raises(OSError, match="no weights"):
        serve.DepthServer(broken, "m", host="127.0.0.1", port=0)
    assert closed


def test_a_full_disk_is_one_line(address, monkeypatch):
    key = json.loads(ask(f"{address}/predict", photo()))["id"]

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(serve.tempfile, "TemporaryDirectory", full)
    assert fault(f"{address}/{key}/depth.npy") == (500, "[Errno 28] No space left on device")


def test_a_refused_upload_is_not_read_as_the_next_request(address):
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as line:
        inner = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
        head = (
            f"POST /predict HTTP/1.1\r\nHost: localhost\r\nOrigin: http://evil\r\nContent-Length: {len(inner)}\r\n\r\n"
        )
        line.sendall(head.encode() + inner)
        answer = b""
        with contextlib.suppress(ConnectionResetError):  # it may close with our body unread
            while part := line.recv(1 << 16):
                answer += part
    assert answer.count(b"HTTP/1.1") <= 1 and b"200 OK" not in answer


def test_photos_are_predicted_one_at_a_time_and_the_last_few_are_kept():
    inside, most = [], []

    class Slow(Fake):
        def predict(self, images):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.02)
            inside.pop()
            return super().predict(images)

    with serve.DepthServer(lambda: Model(Slow()), "m", host="127.0.0.1", port=0) as server:
        threads = [threading.Thread(target=server.predict, args=(photo(),)) for _ in range(serve.KEPT + 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert max(most) == 1 and len(server.results) == serve.KEPT
        assert all(len(key) > 20 for key in server.results), "ids that nobody finds by counting"


def test_results_are_not_kept_for_long(address, monkeypatch):
    first = json.loads(ask(f"{address}/predict", photo()))["id"]
    assert ask(f"{address}/{first}/depth.npy")
    monkeypatch.setattr(serve, "KEPT_S", 0.2)
    time.sleep(0.3)
    assert fault(f"{address}/{first}/depth.npy") == (404, "this result is no longer kept: send the photo again")


def test_a_page_runs_no_script_but_its_own(address):
    key = json.loads(ask(f"{address}/predict", photo()))["id"]
    for path in ("", f"{key}/view.html"):
        with urllib.request.urlopen(f"{address}/{path}") as answer:
            policy, page = answer.headers["Content-Security-Policy"], answer.read()
        [script] = re.findall(rb"<script>(.*?)</script>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(script).digest()).decode()
        assert policy.endswith(f"; script-src 'sha256-{digest}'") and policy.startswith("default-src 'none'")
        assert b" onclick=" not in page and b" onload=" not in page
    with urllib.request.urlopen(f"{address}/{key}/colour.png") as answer:
        assert "script-src" not in answer.headers["Content-Security-Policy"]


def raw(address: str, request: str) -> bytes:
    """The answer to a request as it is written here."""
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as line:
        line.sendall(request.encode("latin-1"))
        return line.recv(1 << 16)


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:7860", "localhost.evil.example", "[", "", "127.0.0.1.evil.example"]
)
def test_a_page_whose_domain_is_pointed_here_is_refused(address, host):
    key = json.loads(ask(f"{address}/predict", photo()))["id"]
    for path in ("/", f"/{key}/depth.npy"):
        assert raw(address, f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n").startswith(b"HTTP/1.1 403")
    request = f"POST /predict HTTP/1.1\r\nHost: {host}\r\nOrigin: http://{host}\r\nContent-Length: 3\r\n\r\nabc"
    assert raw(address, request).startswith(b"HTTP/1.1 403")


def test_the_names_of_this_machine_are_answered(address):
    names = ["localhost", "LOCALHOST:7860", "127.0.0.1:1", "[::1]:80", "10.0.0.7", socket.gethostname()]
    for host in names:
        assert raw(address, f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n").startswith(b"HTTP/1.1 200"), host
    assert raw(address, "GET / HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200")
    with serve.DepthServer(lambda: Model(Fake()), "m", host="127.0.0.1", port=0, names=["Depth.example"]) as server:
        assert server.is_called("depth.example:443") and not server.is_called("other.example")


def test_addresses_that_are_none_are_refused_and_not_reported_here(address, monkeypatch):
    faults = []
    monkeypatch.setattr(socketserver.BaseServer, "handle_error", lambda *_: faults.append(1))
    assert raw(address, "GET http://[ HTTP/1.1\r\nHost: localhost\r\n\r\n").startswith(b"HTTP/1.1 404")
    request = "POST /predict HTTP/1.1\r\nHost: localhost\r\nOrigin: http://[\r\nContent-Length: 3\r\n\r\nabc"
    assert raw(address, request).startswith(b"HTTP/1.1 403") and not faults


def test_uploads_that_wait_are_few_and_a_silent_browser_is_left(monkeypatch):
    monkeypatch.setattr(serve, "MOST_WAITING", 1)
    monkeypatch.setattr(serve._Handler, "timeout", 1)
    faults = []
    monkeypatch.setattr(socketserver.BaseServer, "handle_error", lambda *_: faults.append(1))
    with serve.DepthServer(lambda: Model(Fake()), "m", host="127.0.0.1", port=0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        here = f"http://127.0.0.1:{server.server_address[1]}"
        with socket.create_connection(server.server_address[:2], timeout=10) as silent:
            silent.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n")
            deadline = time.monotonic() + 5
            while server.waiting._value and time.monotonic() < deadline:
                time.sleep(0.01)
            assert fault(f"{here}/predict", photo()) == (503, "1 photos are waiting: try again later")
            assert silent.recv(9) == b""  # closed
        assert json.loads(ask(f"{here}/predict", photo()))["width"] == 30 and not faults
        server.shutdown()


def test_a_download_may_take_longer_than_the_time_without_a_byte(address, monkeypatch):
    monkeypatch.setattr(serve._Handler, "timeout", 0.5)
    monkeypatch.setattr(serve, "_file", lambda *_: (bytes(8 << 20), ".npy"))
    key = json.loads(ask(f"{address}/predict", photo()))["id"]
    host, port = address.removeprefix("http://").split(":")
    with socket.socket() as browser:
        browser.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        browser.connect((host, int(port)))
        browser.sendall(f"GET /{key}/depth.npy HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        received, begun = 0, time.monotonic()
        while piece := browser.recv(1 << 16):
            received += len(piece)
            if time.monotonic() - begun < 2:
                time.sleep(0.05)
    assert received > 8 << 20


@pytest.mark.parametrize(
    "given", ["depth.example", "Depth.Example:8443", "https://depth.example/lab/", "depth.example."]
)
def test_a_name_may_be_allowed_as_the_refusal_shows_it(given):
    with serve.DepthServer(lambda: Model(Fake()), "m", host="127.0.0.1", port=0, names=[given]) as server:
        assert server.is_called("depth.example:8443") and server.is_called("depth.example")
        assert not server.is_called("evil.depth.example") and not server.is_called("") and not server.is_called("[x")


def test_a_machine_is_called_by_its_short_and_full_name(monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "box.lab.example")
    monkeypatch.setattr(
        socket, "getfqdn", lambda host="": "box.lab.example" if host in ("", "0.0.0.0") else "localhost"
    )
    with serve.DepthServer(lambda: Model(Fake()), "m", host="0.0.0.0", port=0) as server:
        for name in (
            "box",
            "box.local",
            "BOX.lab.example:7860",
            "depth.localhost:7860",
            "[::1]:7860",
            "[fe80::1%25e0]",
        ):
            assert server.is_called(name), name
        assert not server.is_called("box.evil.example")
