"""Tars at addresses: http, and other file systems."""

from __future__ import annotations

import errno
import http.server
import pickle
import re
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from distill.data import sources, storage
from tests.data.pictures import encoded, noise, pack, picture


class Ranges(http.server.SimpleHTTPRequestHandler):
    """A server that answers byte ranges, and counts the bytes it sends."""

    sent = 0

    def do_GET(self):
        data = (Path(self.directory) / self.path.lstrip("/")).read_bytes()
        if span := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            start, end = int(span[1]), min(int(span[2]) + 1, len(data))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
            data = data[start:end]
        else:
            self.send_response(200)
        Ranges.sent += len(data)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def served(tmp_path):
    pytest.importorskip("aiohttp", reason="fsspec reads http with aiohttp")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Ranges, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def same_scan(remote, local):
    assert [(e.key, e.origin) for e in remote.entries] == [(e.key, e.origin) for e in local.entries]
    assert remote.rejected == local.rejected
    for a, b in zip(remote.entries, local.entries, strict=True):
        assert torch.equal(a.load().rgb, b.load().rgb)


def test_tars_in_another_file_system_are_those_on_disk(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    path = pack(tmp_path / "sa_0.tar", [("./sa_1.jpg", encoded(picture(20, 30))), ("../up.jpg", b"1")])
    memory = fsspec.filesystem("memory")
    memory.pipe("/photos/sa_0.tar", path.read_bytes())
    memory.pipe("/photos/sa_1.tar", path.read_bytes()[:900])
    [whole, cut] = sources.tars("memory://photos/sa_{0..1}.tar")
    assert (whole.stem, cut.stem) == ("sa_0", "sa_1")
    same_scan(whole.scan(), sources.tars(path)[0].scan())
    assert cut.scan().rejected[-1].reason.startswith("the tar is cut: it ends")
    assert [s.stem for s in sources.tars("memory://photos/sa_*.tar")] == ["sa_0", "sa_1"]
    assert [s.stem for s in sources.tars(["memory://photos/sa_1.tar", path])] == ["sa_0", "sa_1"]
    with pytest.raises(FileNotFoundError, match="memory://photos/sa_7.tar: no such tar"):
        sources.tars("memory://photos/sa_7.tar")
    with pytest.raises(ValueError, match="nowhere://x.tar cannot be opened"):
        sources.tars("nowhere://x.tar")
    with pytest.raises(ValueError, match="a pipe cannot be resumed in the middle"):
        sources.tars("pipe:curl http://host/sa_0.tar")
    pickle.loads(pickle.dumps(whole)).scan().entries[0].load()


def test_a_tar_behind_http_is_read_by_ranges(tmp_path, served):
    members = [(f"./sa_{i}.jpg", encoded(noise(400), quality=95)) for i in range(12)]
    path = pack(tmp_path / "sa_0.tar", members)
    [shard] = sources.tars(f"{served}/sa_0.tar")
    Ranges.sent = 0
    scan = shard.scan()
    assert Ranges.sent < path.stat().st_size * 0.7, "listing it does not fetch it"
    same_scan(scan, sources.tars(path)[0].scan())


def test_a_file_system_that_lacks_its_package_or_its_host_names_the_address(monkeypatch):
    core = pytest.importorskip("fsspec.core")

    def lacks(url):
        raise ImportError("Install s3fs to access S3")

    def offline(_):
        raise OSError(errno.EHOSTUNREACH, "No route to host")

    monkeypatch.setattr(core, "url_to_fs", lacks)
    with pytest.raises(ValueError, match=r"^s3://b/sa_0.tar cannot be opened: Install s3fs"):
        storage.find_urls(["s3://b/sa_{0,1}.tar"], "tar")
    monkeypatch.setattr(core, "url_to_fs", lambda url: (SimpleNamespace(exists=offline), url.partition("://")[2]))
    with pytest.raises(OSError, match="s3://b/sa_0.tar cannot be reached: .*No route to host"):
        storage.find_urls(["s3://b/sa_{0,1}.tar"], "tar")


def test_braces_expand_within_one_another_to_each_name_once_and_to_a_limit(monkeypatch):
    names = [f"a_{name}.{end}" for name in ("b", "c08", "c09", "c10") for end in "xy"]
    assert storage.expand("a_{b,c{08..10}}.{x,y}") == names
    monkeypatch.setattr(storage, "MOST_NAMES", 4)
    assert storage.expand("{1..4}") == ["1", "2", "3", "4"] and storage.expand("{3..3}") == ["3"]
    with pytest.raises(ValueError, match="more than 4 names"):
        storage.expand("{1..5}")


def test_an_address_has_a_scheme_of_two_letters_at_its_start():
    assert storage.is_url("s3://b/a.tar") and not storage.is_url(Path("s3://b/a.tar"))
    assert not storage.is_url("C://photos/a.tar") and not storage.is_url("photos/s3://a.tar")
