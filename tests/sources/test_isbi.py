import http.server
import io
import socket
import threading
import zipfile
from functools import partial

import numpy as np
import pytest
import tifffile

import run_make_database
from sources import isbi
from utils import UserError


class Server(http.server.BaseHTTPRequestHandler):
    """Serves one zip at /a.zip, with or without ranges; /cut.zip breaks off in the middle."""

    def __init__(self, content, ranges, log, *args):
        self.content, self.ranges, self.log = content, ranges, log
        super().__init__(*args)

    def do_GET(self):
        if self.path not in ("/a.zip", "/cut.zip"):
            self.send_error(404)
            return
        wanted = self.headers.get("Range")
        start = int(wanted[6:-1]) if wanted and self.ranges else 0
        self.log.append(start)
        if start >= len(self.content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(self.content) - start))
        self.end_headers()
        end = len(self.content) // 2 if self.path == "/cut.zip" else None
        self.wfile.write(self.content[start:end])

    def log_message(self, *_):
        pass


@pytest.fixture
def zipped(tmp_path):
    """Content of a zip as public READMEs list it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in (*isbi.PIXELS, "test-labels.tif"):
            tifffile.imwrite(
                tmp_path / "x.tif", np.random.default_rng(len(name)).integers(0, 2, (10, 32, 32), np.uint8) * 255
            )
            archive.write(tmp_path / "x.tif", f"ISBI-2012-challenge/{name}")
    return buffer.getvalue()


@pytest.fixture
def known(zipped, tmp_path, monkeypatch):
    """The same zip, whose stacks are taken for those of the challenge."""
    with zipfile.ZipFile(io.BytesIO(zipped)) as archive:
        for name in isbi.PIXELS:
            (tmp_path / "x.tif").write_bytes(archive.read(f"ISBI-2012-challenge/{name}"))
            monkeypatch.setitem(isbi.PIXELS, name, isbi.pixel_hash(tmp_path / "x.tif"))
    return zipped


@pytest.fixture
def serve():
    """Starts the server, and gives its address and the list of the offsets it was asked for."""
    servers = []

    def run(content, ranges=True):
        log = []
        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Server, content, ranges, log)))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/a.zip", log

    yield run
    for server in servers:
        server.shutdown()
        server.server_close()


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def test_the_stacks_are_fetched_and_verified_and_the_terms_are_named(tmp_path, known, serve, capsys):
    url, _ = serve(known)
    isbi.download(tmp_path / "em", url)
    assert names(tmp_path / "em") == sorted(isbi.PIXELS)
    assert "non-commercial" in capsys.readouterr().out


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_download_is_resumed_or_restarted(tmp_path, known, serve, ranges):
    url, log = serve(known, ranges)
    with pytest.raises(UserError, match="broke at"):
        isbi.download(tmp_path / "em", url.replace("/a.zip", "/cut.zip"))
    assert names(tmp_path / "em") == [".download"]
    isbi.download(tmp_path / "em", url)
    assert log == [0, len(known) // 2 if ranges else 0]
    assert names(tmp_path / "em") == sorted(isbi.PIXELS)


def test_a_part_as_long_as_the_file_is_fetched_again(tmp_path, known, serve):
    url, log = serve(known)
    (tmp_path / ".download").write_bytes(bytes(len(known) + 5))
    isbi.download(tmp_path, url)
    assert log[-1] == 0
    assert set(isbi.PIXELS) <= set(names(tmp_path))


def test_other_pixels_are_refused_and_nothing_is_kept(tmp_path, zipped, serve):
    url, _ = serve(zipped)
    with pytest.raises(UserError, match="not the known stack"):
        isbi.download(tmp_path / "em", url)
    assert not set(isbi.PIXELS) & set(names(tmp_path / "em"))


@pytest.mark.parametrize(
    ("content", "words"), [(b"<html>no zip</html>", "not a valid zip"), (None, "no train-volume.tif")]
)
def test_a_zip_that_is_none_or_holds_other_files_is_refused(tmp_path, serve, content, words):
    if content is None:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as zipped:
            zipped.writestr("readme.txt", "hello")
        content = buffer.getvalue()
    with pytest.raises(UserError, match=words):
        isbi.download(tmp_path, serve(content)[0])


def test_without_a_network_one_line_names_the_address(work, fails):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/a.zip"
    for address in (url, url + "/none", "no address"):
        assert address in fails(run_make_database.main, ["--download", "--url", address])
    assert list(work.iterdir()) == []


def _zip(**patches):
    """A zip of one stack whose entry in the directory, or other bytes, are changed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr("train-volume.tif", np.random.default_rng(0).bytes(3000) + bytes(3000))
    content = bytearray(buffer.getvalue())
    directory = content.index(b"PK\x01\x02")
    for name, value in patches.items():
        places = {"flags": (6, directory + 8), "method": (8, directory + 10), "size": (directory + 24,), "data": (200,)}
        for place in places[name]:
            content[place : place + len(value)] = value
    return bytes(content)


@pytest.mark.parametrize(
    ("patches", "words"),
    [
        ({"size": (2**31).to_bytes(4, "little")}, "train-volume.tif unpacks to 2147 MB"),
        ({"size": (5).to_bytes(4, "little")}, "not a valid zip"),
        ({"flags": b"\1"}, "train-volume.tif is encrypted"),
        ({"method": b"\x63"}, "not compressed by deflate"),
        ({"method": b"\x0c"}, "not compressed by deflate"),
        ({"data": b"\xff" * 600}, "not a valid zip"),
    ],
)
def test_a_zip_that_is_damaged_or_claims_gigabytes_is_one_line(work, fails, monkeypatch, patches, words):
    unpack, unpacked = isbi.shutil.copyfileobj, []
    monkeypatch.setattr(isbi.shutil, "copyfileobj", lambda *files: unpacked.append(unpack(*files)))
    (work / "a.zip").write_bytes(_zip(**patches))
    url = (work / "a.zip").as_uri()
    assert words in fails(run_make_database.main, ["--download", "--url", url])
    assert not unpacked
    assert [path.name for path in work.iterdir()] == ["a.zip"]
