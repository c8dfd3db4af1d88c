# SPDX-License-Identifier: Apache-2.0
"""Downloads from a local server: resumed, refused, cut and wrong."""

import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from ftkd_core.errors import UserError
from ftkd_core.weights import fetching
from ftkd_core.weights.fetching import fetch, file_hash, find_file
from ftkd_core.weights.public_files import PUBLIC_FILES, PublicFile, table
from ftkd_ros.cli import main

CONTENT = bytes(range(256)) * 400
HASH = hashlib.sha256(CONTENT).hexdigest()
FILE = PublicFile(
    what="test", url="http://unused.invalid/x", file="weights.pth", sha256=HASH, hash_source="test"
)


@dataclass
class Server:
    """Behaviour of the server of a test, and the ranges that clients asked for."""

    content: bytes = CONTENT
    tag: str = '"one"'
    cut_after: list[int] = field(default_factory=list)
    supports_ranges: bool = True
    shift: int = 0
    status: int = 0
    asked: list[str] = field(default_factory=list)
    url: str = ""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    state = Server()
    monkeypatch.setattr(fetching, "_PAUSE_S", 0.0)
    monkeypatch.setattr(fetching, "_BLOCK", 4096)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted, content = self.headers.get("Range", ""), state.content
            state.asked.append(wanted)
            if state.status:
                self.send_error(state.status)
                return
            start = 0
            same = self.headers.get("If-Range") == state.tag
            if wanted and same and state.supports_ranges:
                start = int(wanted.removeprefix("bytes=").rstrip("-"))
                if start >= len(content):
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{len(content)}")
                    self.end_headers()
                    return
                self.send_response(206)
                first = start + state.shift
                self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
            else:
                self.send_response(200)
            self.send_header("Content-Length", str(len(content) - start))
            if state.tag:
                self.send_header("ETag", state.tag)
            self.end_headers()
            end = start + state.cut_after.pop(0) if state.cut_after else len(content)
            self.wfile.write(content[start:end])

        def log_message(self, *_: Any) -> None:
            """Print nothing."""

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    state.url = f"http://127.0.0.1:{http.server_port}/weights.pth"
    yield state
    http.shutdown()
    thread.join()
    http.server_close()


def test_a_file_is_downloaded_once_and_checked(server: Server, tmp_path: Path) -> None:
    for _ in range(2):
        path, checked = fetch(FILE, tmp_path / "public", server.url)
        assert path.read_bytes() == CONTENT
        assert checked == f"SHA-256 {HASH}: as expected (test)"
    assert server.asked == [""]
    assert [item.name for item in (tmp_path / "public").iterdir()] == ["weights.pth"]


def test_a_cut_connection_is_resumed_at_the_byte_where_it_ended(server: Server, tmp_path: Path) -> None:
    server.cut_after = [30_000, 50_000]
    path, _ = fetch(FILE, tmp_path, server.url)
    assert path.read_bytes() == CONTENT
    assert server.asked == ["", "bytes=30000-", "bytes=80000-"]


def test_an_interrupted_command_resumes(server: Server, tmp_path: Path) -> None:
    server.cut_after = [10_000, 0, 0, 0]
    with pytest.raises(UserError, match=r"cut 4 times; 10000 bytes are in .*partial'\. Run the same command"):
        fetch(FILE, tmp_path, server.url)
    assert not (tmp_path / "weights.pth").exists()
    path, _ = fetch(FILE, tmp_path, server.url)
    assert path.read_bytes() == CONTENT and server.asked[-1] == "bytes=10000-"


def test_parts_of_different_versions_are_not_joined(server: Server, tmp_path: Path) -> None:
    server.cut_after = [10_000, 0, 0, 0]
    with pytest.raises(UserError):
        fetch(FILE, tmp_path, server.url)
    server.content, server.tag = CONTENT[::-1], '"two"'
    public = replace(FILE, sha256=hashlib.sha256(server.content).hexdigest())
    path, _ = fetch(public, tmp_path, server.url)
    assert path.read_bytes() == server.content


@pytest.mark.parametrize(
    "change", [{"supports_ranges": False}, {"tag": ""}, {"tag": 'W/"weak"'}, {"shift": 7}]
)
def test_servers_without_ranges_send_the_file_again(
    server: Server, tmp_path: Path, change: dict[str, Any]
) -> None:
    for name, value in change.items():
        setattr(server, name, value)
    server.cut_after = [20_000]
    path, _ = fetch(FILE, tmp_path, server.url)
    assert path.read_bytes() == CONTENT


def test_a_partial_file_that_is_complete_is_used(server: Server, tmp_path: Path) -> None:
    """The process ended after the last byte and before the file got its name."""
    server.cut_after = [len(CONTENT) - 1, 0, 0, 0]
    with pytest.raises(UserError):
        fetch(FILE, tmp_path, server.url)
    with (tmp_path / "weights.pth.partial").open("ab") as file:
        file.write(CONTENT[-1:])
    path, _ = fetch(FILE, tmp_path, server.url)
    assert path.read_bytes() == CONTENT
    (tmp_path / "weights.pth").unlink()
    longer = tmp_path / "weights.pth.partial"
    longer.write_bytes(CONTENT + b"too long")
    (tmp_path / "weights.pth.partial.json").write_text(f'{{"url": "{server.url}", "tag": "\\"one\\""}}')
    path, _ = fetch(FILE, tmp_path, server.url)
    assert path.read_bytes() == CONTENT


def test_a_wrong_hash_sets_the_file_aside(server: Server, tmp_path: Path) -> None:
    server.content = CONTENT[:-1] + b"x"
    with pytest.raises(UserError, match=f"expected {HASH}: it is another file or damaged; it was moved to"):
        fetch(FILE, tmp_path, server.url)
    assert not (tmp_path / "weights.pth").exists()
    assert (tmp_path / "weights.pth.wrong").read_bytes() == server.content
    server.content = CONTENT
    assert fetch(FILE, tmp_path, server.url)[0].read_bytes() == CONTENT


def test_what_cannot_be_checked_is_said(server: Server, tmp_path: Path) -> None:
    path, checked = fetch(replace(FILE, sha256=""), tmp_path, server.url)
    assert checked == f"SHA-256 {HASH}: could not be checked, because none is published"
    _, checked = fetch(replace(FILE, sha256=HASH[:8], hash_source="file name"), tmp_path, server.url)
    assert checked == f"SHA-256 {HASH}: begins with {HASH[:8]} as expected (file name)"
    _, checked = fetch(replace(FILE, sha256=""), tmp_path, server.url, HASH.upper())
    assert checked.endswith("as expected (given)")
    with pytest.raises(UserError, match="expected up to 64 hexadecimal digits"):
        fetch(FILE, tmp_path, server.url, "no hash")
    assert file_hash(path) == HASH


def test_offline_the_address_and_the_place_are_printed(tmp_path: Path) -> None:
    message = "cannot be reached .*; download http://127.0.0.1:9/x with a browser, put it at '.*weights.pth'"
    with pytest.raises(UserError, match=message):
        fetch(replace(FILE, url="http://127.0.0.1:9/x"), tmp_path)
    (tmp_path / "weights.pth").write_bytes(CONTENT)
    assert fetch(FILE, tmp_path)[0].read_bytes() == CONTENT  # put there by hand


def test_an_error_of_the_server_is_reported(server: Server, tmp_path: Path) -> None:
    server.status = 404
    with pytest.raises(UserError, match="the server answers 404 Not Found; download"):
        fetch(FILE, tmp_path, server.url)
    assert len(server.asked) == 1
    with pytest.raises(UserError, match="address 'no address'"):
        fetch(FILE, tmp_path, "no address")


def test_files_for_a_browser_are_not_downloaded(tmp_path: Path) -> None:
    public = find_file("sparse_bev_r50")
    with pytest.raises(UserError, match="download https://drive.google.com/.* with a browser, put it at"):
        fetch(public, tmp_path)
    (tmp_path / public.file).write_bytes(CONTENT)
    assert "could not be checked" in fetch(public, tmp_path)[1]


def test_command(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = ["--folder", str(tmp_path), "--url", server.url]
    assert main(["fetch-weights", "nuimages_r50", *folder, "--sha256", HASH]) == 0
    output = capsys.readouterr().out
    assert f"SHA-256 {HASH}: as expected (given)" in output
    assert "next: ftkd import-weights" in output and "--output build/nuimages_r50.safetensors" in output
    assert main(["fetch-weights", "nuimages_r50", *folder]) == 2
    assert "expected 40963960...: it is another file or damaged" in capsys.readouterr().err
    assert main(["fetch-weights", "resnet"]) == 2
    assert "no public file 'resnet'; expected one of nuimages_r50" in capsys.readouterr().err
    assert main(["fetch-weights"]) == 2
    capsys.readouterr()
    assert main(["fetch-weights", "--list"]) == 0
    assert capsys.readouterr().out.strip() == table()


def test_known_hashes_agree_with_file_names() -> None:
    for name, public in PUBLIC_FILES.items():
        assert public.url.startswith("https://") and (public.direct == public.url.endswith(public.file))
        digits = public.file.removesuffix(".pth").rpartition("-")[2]
        if public.sha256 and len(digits) == 8:
            assert public.sha256.startswith(digits), name
        assert len(public.sha256) in (0, 8, 64)
        assert bool(public.sha256) == (public.hash_source != "unknown")
