"""`distill fetch` against a host in this process that knows ranges, and that cuts, lies and changes on demand."""

from __future__ import annotations

import hashlib
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

import distill.eval.fetch as module
from distill.app.cli import main
from distill.core import files
from distill.core.plugins import find
from distill.eval.completeness import check_benchmark
from distill.eval.fetch import ManualDownloadError, fetch, fetch_benchmark
from tests.eval.test_benchmarks import content, listed, put

DATA = np.random.default_rng(0).integers(0, 256, 3_000_000, dtype=np.uint8).tobytes()
DIGEST = hashlib.sha256(DATA).hexdigest()


class Host:
    """What the host serves and how badly; and the ranges it was asked for."""

    def __init__(self) -> None:
        self.data, self.tag, self.ranges_known = DATA, '"one"', True
        self.cut_after: list[int] = []  # bytes of each coming answer, before the connection breaks
        self.status, self.kind, self.pause = 200, "application/x-tar", 0.0
        self.asked: list[str | None] = []
        self.paths: list[str] = []

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        wanted = handler.headers.get("Range")
        self.asked.append(wanted)
        self.paths.append(handler.path)
        if self.status != 200:
            handler.send_error(self.status)
            return
        start, total = 0, len(self.data)
        same = handler.headers.get("If-Range") in (None, self.tag)
        if wanted and self.ranges_known and same:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            if start >= total:
                handler.send_response(416)
                handler.send_header("Content-Range", f"bytes */{total}")
                handler.end_headers()
                return
            handler.send_response(206)
            handler.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        else:
            handler.send_response(200)
        handler.send_header("Content-Length", str(total - start))
        handler.send_header("Content-Type", self.kind)
        if self.tag:
            handler.send_header("ETag", self.tag)
        handler.end_headers()
        end = start + self.cut_after.pop(0) if self.cut_after else total
        for at in range(start, min(end, total), 1 << 16):
            handler.wfile.write(self.data[at : min(at + (1 << 16), end)])
            time.sleep(self.pause)
        handler.wfile.flush()


@pytest.fixture
def host():
    served = Host()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            served.answer(self)

        def do_HEAD(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(served.data)))
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    served.url = f"http://127.0.0.1:{server.server_address[1]}/a.tar"
    yield served
    server.shutdown()
    server.server_close()


def test_a_file_arrives_and_its_checksum_is_recorded(host, tmp_path):
    seen = []
    got = fetch(host.url, tmp_path / "deep/a.tar", report=lambda d, t, **n: seen.append((d, t)))
    assert got.path.read_bytes() == DATA and got.sha256 == DIGEST and not got.published and not got.resumed
    assert (tmp_path / "deep/a.tar.sha256").read_text() == f"{DIGEST}  a.tar\n" and seen[-1] == (3, 3)
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["a.tar", "a.tar.sha256"]
    again = fetch(host.url, tmp_path / "deep/a.tar", sha256=DIGEST.upper())
    assert again.published and len(host.asked) == 1


def test_cut_connections_are_gone_on_from(host, tmp_path):
    host.cut_after = [1_000_000, 500_000]
    got = fetch(host.url, tmp_path / "a.tar", patience=0.001)
    assert got.path.read_bytes() == DATA
    assert host.asked == [None, "bytes=1000000-", "bytes=1500000-"]


def test_a_host_that_cuts_for_ever_is_given_up_and_what_came_is_kept(host, tmp_path):
    host.cut_after = [1_000_000, 0, 0, 0]
    with pytest.raises(OSError, match=r"a\.tar: cut after 1\.0 of 3\.0 MB; rerun the same command to resume"):
        fetch(host.url, tmp_path / "a.tar", patience=0.001)
    assert (tmp_path / "a.tar.part").stat().st_size == 1_000_000 and not (tmp_path / "a.tar").exists()
    got = fetch(host.url, tmp_path / "a.tar")
    assert got.path.read_bytes() == DATA and got.resumed == 1_000_000 and host.asked[-1] == "bytes=1000000-"


def half_done(host, tmp_path) -> Path:
    host.cut_after = [1_000_000, 0, 0, 0]
    with pytest.raises(OSError, match="cut after"):
        fetch(host.url, tmp_path / "a.tar", patience=0.001)
    host.cut_after, host.asked = [], []
    return tmp_path / "a.tar"


def test_a_host_without_ranges_begins_again(host, tmp_path):
    path = half_done(host, tmp_path)
    host.ranges_known = False
    assert fetch(host.url, path).path.read_bytes() == DATA


@pytest.mark.parametrize("tag", ['"two"', ""])
def test_a_file_that_changed_meanwhile_is_not_mixed(host, tmp_path, tag):
    path = half_done(host, tmp_path)
    host.data, host.tag = DATA[::-1][:2_500_000], tag
    if not tag:  # no validator: only the length tells
        note = path.with_name("a.tar.part.json")
        note.write_text(note.read_text().replace('\\"one\\"', ""))
    assert fetch(host.url, path, patience=0.001).path.read_bytes() == host.data


def test_a_part_of_another_address_is_not_gone_on_from(host, tmp_path):
    path = half_done(host, tmp_path)
    fetch(host.url.replace("a.tar", "b.tar"), path)
    assert host.asked == [None] and path.read_bytes() == DATA


def test_a_part_that_is_whole_already_needs_no_byte(host, tmp_path):
    path = half_done(host, tmp_path)
    path.with_name("a.tar.part").write_bytes(DATA)
    assert fetch(host.url, path, sha256=DIGEST).path.read_bytes() == DATA and host.asked == ["bytes=3000000-"]
    path.unlink()
    path.with_name("a.tar.part").write_bytes(DATA + b"more")
    path.with_name("a.tar.part.json").write_text(f'{{"url": "{host.url}", "total": 3000000, "version": ""}}')
    assert fetch(host.url, path, patience=0.001).path.read_bytes() == DATA


def test_a_wrong_checksum_is_set_aside(host, tmp_path):
    with pytest.raises(OSError, match=rf"sha256 {DIGEST}, not 0{{64}}; kept as .*a\.tar\.wrong"):
        fetch(host.url, tmp_path / "a.tar", sha256="0" * 64)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar.wrong"]
    fetch(host.url, tmp_path / "a.tar")
    (tmp_path / "a.tar").write_bytes(DATA[:-1] + b"?")
    with pytest.raises(OSError, match=r"a\.tar exists, but its sha256 is .*, not .*: move it away"):
        fetch(host.url, tmp_path / "a.tar")


@pytest.mark.parametrize(
    ("status", "said"), [(404, "answered 404 Not Found; try another --url"), (503, "answered 503 .* later")]
)
def test_refusals_are_one_line(host, tmp_path, status, said):
    host.status = status
    with pytest.raises(OSError, match=said):
        fetch(host.url, tmp_path / "a.tar", patience=0.001)
    assert len(host.asked) == (1 if status == 404 else 3)


def test_a_web_page_is_no_archive(host, tmp_path):
    host.kind = "text/html; charset=utf-8"
    with pytest.raises(OSError, match="a web page instead of the archive"):
        fetch(host.url, tmp_path / "a.tar")
    assert not (tmp_path / "a.tar.part").exists()


def test_no_host_no_scheme(tmp_path):
    with pytest.raises(OSError, match="refused.*0.0 MB are kept"):
        fetch("http://127.0.0.1:9/a.tar", tmp_path / "a.tar", patience=0.001)
    with pytest.raises(ValueError, match="only http"):
        fetch("file:///etc/passwd", tmp_path / "a.tar")


def test_a_full_disk_is_seen_before_and_while_writing(host, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
        with pytest.raises(OSError, match=r"3\.0 MB are needed, only 0\.0 MB are free; make room"):
            fetch(host.url, tmp_path / "a.tar")
    real = Path.open

    class Full:
        def __init__(self, file) -> None:
            self.file, self.left = file, 2

        def __enter__(self):
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def write(self, data: bytes) -> None:
            self.left -= 1
            if self.left < 0:
                raise OSError(28, "No space left on device")
            self.file.write(data)

    def opened(path: Path, mode: str = "r", *args, **kwargs):
        file = real(path, mode, *args, **kwargs)
        return Full(file) if path.suffix == ".part" and mode == "wb" else file

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", opened)
        with pytest.raises(OSError, match=r"a\.tar\.part: the disk is full; make room, then rerun the same command"):
            fetch(host.url, tmp_path / "a.tar")
    kept = (tmp_path / "a.tar.part").stat().st_size
    assert kept > 0 and fetch(host.url, tmp_path / "a.tar").resumed == kept


def test_a_killed_download_goes_on(host, tmp_path, processes):
    host.pause = 0.05  # long enough to be killed in between on a busy machine
    process = processes.Process(target=fetch, args=(host.url, tmp_path / "a.tar"))
    process.start()
    part = tmp_path / "a.tar.part"
    for _ in range(3000):
        if part.is_file() and part.stat().st_size > 500_000:
            break
        time.sleep(0.01)
    process.kill()
    process.join()
    kept = part.stat().st_size
    assert 0 < kept < len(DATA) and not (tmp_path / "a.tar").exists()
    host.pause = 0.0
    got = fetch(host.url, tmp_path / "a.tar", sha256=DIGEST)
    assert got.resumed == kept and host.asked[-1] == f"bytes={kept}-"


def test_two_at_once_and_a_slow_drip_are_ended_in_a_line(host, tmp_path, monkeypatch, capsys):
    lock = files.take_lock(tmp_path / ".a.tar.lock")
    with pytest.raises(OSError, match=r"a\.tar is being fetched by another process"):
        fetch(host.url, tmp_path / "a.tar")
    lock.release()
    monkeypatch.setattr(module, "_SLOW_S", 0.05)
    monkeypatch.setattr(module, "_SLOWEST", 1e9)
    monkeypatch.setattr(module, "_ATTEMPTS", 0)
    host.pause = 0.02
    with pytest.raises(OSError, match="too slow: .* bytes came in"):
        fetch(host.url, tmp_path / "a.tar", patience=0.001)
    assert 0 < (tmp_path / "a.tar.part").stat().st_size < len(DATA)


def test_what_is_below_a_chunk_is_kept_and_an_empty_record_is_named(host, tmp_path):
    host.cut_after = [70_000, 0, 0, 0]
    with pytest.raises(OSError, match="cut after"):
        fetch(host.url, tmp_path / "a.tar", patience=0.001)
    assert (tmp_path / "a.tar.part").stat().st_size == 70_000
    (tmp_path / "a.tar.sha256").write_text("\n")
    with pytest.raises(ValueError, match=r"a\.tar\.sha256 does not begin with a sha256"):
        fetch(host.url, tmp_path / "a.tar")


# --- benchmarks -------------------------------------------------------------------------------------------------------


def test_a_benchmark_comes_to_its_place_and_is_looked_at(host, tmp_path, capsys):
    host.data = put(tmp_path, content("nyu"), "tar").read_bytes()
    root = tmp_path / "data"
    mirror = host.url.removesuffix("a.tar")
    assert main(["fetch", "nyu", "--root", str(root), "--url", mirror]) == 1, "one image is not the published list"
    assert host.paths == ["/nyuv2/nyu_labeled_extracted.tar"]
    said = capsys.readouterr()
    assert "1 images, not the 654 of the published list" in " ".join(said.out.split())
    assert "no published one is known" in " ".join(said.err.split())
    assert len(find("distill.eval.benchmarks", "nyu").samples(root, listed(tmp_path, "nyu"))) == 1
    part = root / "nyuv2/nyu_labeled_extracted.tar.part"
    part.write_bytes(b"12")
    assert any(
        "extracted.tar.part: unfinished, 0.0 MB so far" in finding.what for finding in check_benchmark("nyu", root)
    )


def test_what_a_person_must_do_is_said(tmp_path, host):
    with pytest.raises(ManualDownloadError, match=r"scannet: .*terms of use.*--url"):
        fetch_benchmark("scannet", tmp_path)
    assert fetch_benchmark("scannet", tmp_path, url=host.url).path == tmp_path / "scannet/scannet_val_sampled_800_1.tar"
    with pytest.raises(ManualDownloadError, match="scenes needs no download"):
        fetch_benchmark("scenes", tmp_path)
    with pytest.raises(LookupError):
        fetch_benchmark("nyu2", tmp_path)
    assert main(["fetch", "nyu", "kitti", "--root", str(tmp_path), "--sha256", "00"]) == 2


def test_bytes_of_an_older_file_are_not_taken_for_the_new_ones(host, tmp_path, monkeypatch):
    """The disk is full, or the process killed, between what it notes of the new file and its first byte."""
    host.cut_after = [1_000_000, 0, 0, 0]
    with pytest.raises(OSError, match="rerun the same command to resume"):
        fetch(host.url, tmp_path / "a.tar", patience=0.001)
    assert (tmp_path / "a.tar.part").stat().st_size > 0
    host.cut_after, host.data, host.tag = [], DATA[::-1], '"two"'

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "_receive", killed)
        with pytest.raises(KeyboardInterrupt):
            fetch(host.url, tmp_path / "a.tar")
    assert fetch(host.url, tmp_path / "a.tar", patience=0.001).path.read_bytes() == DATA[::-1]


def test_an_archive_that_another_program_left_short_is_not_recorded_as_whole(host, tmp_path):
    (tmp_path / "a.tar").write_bytes(DATA[:1000])
    with pytest.raises(OSError, match=r"a.tar has 1000 bytes, but the file on the host 3000000, .*: move it away"):
        fetch(host.url, tmp_path / "a.tar")
    assert not (tmp_path / "a.tar.sha256").exists()
    (tmp_path / "a.tar").write_bytes(DATA)
    assert fetch(host.url, tmp_path / "a.tar").sha256 == DIGEST
    (tmp_path / "a.tar.sha256").unlink()
    assert fetch("http://127.0.0.1:9/a.tar", tmp_path / "a.tar").sha256 == DIGEST  # a host that is not there
