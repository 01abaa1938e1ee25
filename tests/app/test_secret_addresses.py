"""A password or a signature in the address of a tar is used, and stands in nothing that is printed or written."""

from __future__ import annotations

import base64
import http.server
import threading
from functools import partial

import pytest

from distill.app.cli import main
from distill.app.publish import publish_labels
from distill.eval.fetch import DownloadCutError, fetch
from tests.data.pictures import encoded, pack, picture
from tests.data.test_storage import Ranges

RECIPE = """
[run]
name = "far"
out = "{out}"
device = "cpu"
[[images]]
tars = "{tar}"
[crops]
size = 56
min_side = 56
patches = "none"
[[teachers]]
name = "analytic"
"""
SECRETS = ("opensesame", "deadbeef", "X-Amz", "cafe01")


class Guarded(Ranges):
    """Answers only whoever knows the password and has a signature; the signature is not part of the file's name."""

    def do_GET(self):
        asked = base64.b64encode(b"me:opensesame").decode()
        self.path, _, query = self.path.partition("?")
        if self.headers.get("Authorization") != f"Basic {asked}" or "X-Amz-Signature=" not in query:
            self.send_error(403)
        else:
            super().do_GET()

    def do_HEAD(self):
        self.do_GET()


@pytest.fixture
def guarded(tmp_path):
    folder = tmp_path / "host"
    folder.mkdir()
    pack(folder / "sa_0.tar", [("./sa_1.jpg", encoded(picture(80, 90))), ("./sa_2.jpg", b"no picture")])
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Guarded, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://me:opensesame@127.0.0.1:{server.server_port}/sa_0.tar?X-Amz-Signature="
    server.shutdown()


def test_a_run_tells_no_secret_and_is_resumed_after_the_address_was_signed_again(tmp_path, capsys, guarded):
    pytest.importorskip("aiohttp", reason="fsspec reads http with aiohttp")
    recipe, run = tmp_path / "r.toml", tmp_path / "run"
    for signature in ("deadbeef", "cafe01"):
        recipe.write_text(RECIPE.format(out=run, tar=guarded + signature))
        assert main(["label", str(recipe)]) == 0
        assert main(["show", str(recipe)]) == 0
    [labels] = (run / "labels").iterdir()
    assert {path.name for path in labels.glob("*.tar")} == {"sa_0-000.tar"}
    publish_labels(labels, tmp_path / "public")
    assert main(["report", str(run)]) == 0
    recipe.write_text(RECIPE.format(out=tmp_path / "other", tar=guarded.replace("me:", "you:") + "deadbeef"))
    assert main(["label", str(recipe)]) == 2
    said = capsys.readouterr()
    written = [path.read_bytes() for path in [*run.rglob("*"), *(tmp_path / "public").rglob("*")] if path.is_file()]
    for secret in SECRETS:
        assert secret not in said.out + said.err
        assert not any(secret.encode() in data for data in written)
    assert "/sa_0.tar" in said.err and "Traceback" not in said.err


def test_a_download_tells_no_secret_and_is_resumed_after_the_address_was_signed_again(tmp_path, guarded):
    path = tmp_path / "a.tar"
    whole = (tmp_path / "host" / "sa_0.tar").read_bytes()
    assert fetch(f"{guarded}deadbeef", path).num_bytes == len(whole) and path.read_bytes() == whole
    with pytest.raises(OSError, match=r"/sa_0.tar: the host answered 403") as caught:
        fetch(guarded.replace("me:", "you:"), tmp_path / "b.tar", patience=0)
    assert not any(secret in str(caught.value) for secret in SECRETS)
    assert not isinstance(caught.value, DownloadCutError)
