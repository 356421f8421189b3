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
    """Serves one zip at /a.zip; /cut.zip breaks off in the middle."""

    def __init__(self, content, *args):
        self.content = content
        super().__init__(*args)

    def do_GET(self):
        if self.path not in ("/a.zip", "/cut.zip"):
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        self.wfile.write(self.content[: len(self.content) // 2 if self.path == "/cut.zip" else None])

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
def of_challenge(zipped, tmp_path, monkeypatch):
    """The same zip, with the hashes of its stacks in place of the challenge's."""
    with zipfile.ZipFile(io.BytesIO(zipped)) as archive:
        for name in isbi.PIXELS:
            (tmp_path / "x.tif").write_bytes(archive.read(f"ISBI-2012-challenge/{name}"))
            monkeypatch.setitem(isbi.PIXELS, name, isbi.pixel_hash(tmp_path / "x.tif"))
    return zipped


@pytest.fixture
def serve():
    """Starts the server, and gives its address."""
    servers = []

    def run(content):
        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Server, content)))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/a.zip"

    yield run
    for server in servers:
        server.shutdown()
        server.server_close()


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def test_download_verifies_the_stacks_and_names_the_terms(tmp_path, of_challenge, serve, capsys):
    isbi.download(tmp_path / "em", serve(of_challenge))
    assert names(tmp_path / "em") == sorted(isbi.PIXELS)
    assert "non-commercial" in capsys.readouterr().out


def test_download_goes_to_the_address_beside_the_hashes(tmp_path, of_challenge, serve, monkeypatch):
    monkeypatch.setattr(isbi, "URL", serve(of_challenge))
    isbi.download(tmp_path / "em", "")
    assert names(tmp_path / "em") == sorted(isbi.PIXELS)


def test_download_that_broke_begins_again(tmp_path, of_challenge, serve):
    url = serve(of_challenge)
    with pytest.raises(UserError, match=f"broke at {len(of_challenge) // 2} of {len(of_challenge)} bytes"):
        isbi.download(tmp_path / "em", url.replace("/a.zip", "/cut.zip"))
    assert names(tmp_path / "em") == []
    (tmp_path / "em" / ".isbi").mkdir()  # as a killed run leaves it
    (tmp_path / "em" / ".isbi" / "zip").write_bytes(of_challenge + of_challenge)
    isbi.download(tmp_path / "em", url)
    assert names(tmp_path / "em") == sorted(isbi.PIXELS)


def test_download_of_other_pixels_is_refused_and_saves_nothing(tmp_path, zipped, serve):
    with pytest.raises(UserError, match="not the challenge's stack"):
        isbi.download(tmp_path / "em", serve(zipped))
    assert names(tmp_path / "em") == []


@pytest.mark.parametrize(
    ("content", "words"), [(b"<html>no zip</html>", "can't be unpacked"), (None, "no train-volume.tif")]
)
def test_download_of_no_zip_or_of_other_files_is_refused(tmp_path, serve, content, words):
    if content is None:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as zipped:
            zipped.writestr("readme.txt", "hello")
        content = buffer.getvalue()
    with pytest.raises(UserError, match=words):
        isbi.download(tmp_path, serve(content))
    assert names(tmp_path) == []


def test_download_without_a_network_is_one_line_with_the_address(work, fails):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/a.zip"
    for address in (url, url + "/none", "no address", "http://127.0.0.1/a b"):
        assert f"can't download {address}" in fails(run_make_database.main, ["--download", "--url", address])
    assert list(work.iterdir()) == []


def _zip(**patches):
    """A zip of one stack whose entry in the directory, or other bytes, are changed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr("train-volume.tif", np.random.default_rng(0).bytes(3000) + bytes(3000))
    content = bytearray(buffer.getvalue())
    directory = content.index(b"PK\x01\x02")
    for name, value in patches.items():
        offsets = {
            "flags": (6, directory + 8),
            "method": (8, directory + 10),
            "size": (directory + 24,),
            "data": (200,),
        }
        for offset in offsets[name]:
            content[offset : offset + len(value)] = value
    return bytes(content)


@pytest.mark.parametrize(
    ("patches", "words"),
    [
        ({"size": (5).to_bytes(4, "little")}, "Bad CRC-32"),
        ({"flags": b"\1"}, "train-volume.tif' is encrypted"),
        ({"method": b"\x63"}, "compression method is not supported"),
        ({"method": b"\x0c"}, "Invalid data stream"),
        ({"method": b"\x0e"}, ""),
        ({"data": b"\xff" * 600}, "Bad CRC-32"),
    ],
)
def test_download_of_a_damaged_zip_is_one_line(work, fails, patches, words):
    (work / "a.zip").write_bytes(_zip(**patches))
    url = (work / "a.zip").as_uri()
    line = fails(run_make_database.main, ["--download", "--url", url])
    assert "can't be unpacked" in line and words in line
    assert [path.name for path in work.iterdir()] == ["a.zip"]


def test_download_names_a_full_disk(tmp_path, of_challenge, serve, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(isbi, "publish", fail)
    (tmp_path / "em").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*em: No space left on device"):
        isbi.download(tmp_path / "em", serve(of_challenge))
    assert list((tmp_path / "em").iterdir()) == []
