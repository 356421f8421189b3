"""No command connects to anything outside of the machine."""

import importlib.util
import os
import shutil
import subprocess
import sys
import textwrap

import pytest
from conftest import ROOT, SMALL

PREDICT = ["--mode", "predict", "--input", "datasets/em/train-volume.tif", "--what", "mask,cells,table,overlay,rois"]
EXPORT = ["--mode", "export", "--output"]
EXTRA = ["onnx", "onnxscript", "onnxruntime", "bioimageio", "roifile", "zarr"]
COMMANDS = [
    ("run_make_database", ["--synthetic", "8", "--size", "48"]),
    ("main", [*SMALL, "--num_epoch", "1", "--num_workers", "1"]),
    ("main", ["--mode", "test", "--gpu_ids", "-1"]),
    ("display_result", ["--num", "1"]),
    ("main", [*PREDICT, "--gpu_ids", "-1", "--output", "out.tif"]),
    ("main", [*PREDICT, "--gpu_ids", "-1", "--output", "out.zarr", "--what", "mask"]),
    ("main", [*EXPORT, "net.pt", "--format", "torchscript"]),
    ("main", [*EXPORT, "net.onnx", "--format", "onnx"]),
    ("main", [*EXPORT, "net.zip", "--format", "bioimageio"]),
]


@pytest.fixture
def watched(work):
    """Runs Python code in a process that can't leave the machine, and returns what it tried."""
    log = work / "network.log"
    build = ["cc", "-shared", "-fPIC", "-o", work / "network.so", ROOT / "tests" / "network.c", "-ldl"]
    subprocess.run(build, check=True)
    more = {"LD_PRELOAD": str(work / "network.so"), "NETWORK_LOG": str(log), "PYTHONPATH": str(ROOT)}
    caches = {"HOME": str(work / "home"), "XDG_CACHE_HOME": str(work / "home")}

    def run(code):
        log.write_text("")
        subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=os.environ | more | caches, check=True)
        return log.read_text().splitlines()

    return run


linux = pytest.mark.skipif(sys.platform != "linux" or not shutil.which("cc"), reason="needs Linux and a C compiler")


@linux
def test_network_is_watched_in_every_way_to_leave_the_machine(watched):
    tried = watched("""
        import contextlib, socket
        for family, address in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
            with contextlib.suppress(OSError), socket.socket(family) as remote:
                remote.connect((address, 9))
        with contextlib.suppress(OSError), socket.socket(type=socket.SOCK_DGRAM) as remote:
            remote.sendto(b"x", ("192.0.2.2", 9))
        with contextlib.suppress(OSError):
            socket.create_connection(("example.org", 80))
        server = socket.create_server(("localhost", 0))
        socket.create_connection(server.getsockname())
    """)
    assert tried == ["connect 192.0.2.1", "connect 2001:db8::1", "sendto 192.0.2.2", "getaddrinfo example.org"]


@linux
@pytest.mark.slow
@pytest.mark.skipif(not all(map(importlib.util.find_spec, EXTRA)), reason=f"needs {', '.join(EXTRA)}")
def test_network_is_not_used_by_any_command(watched, work):
    tried = watched(f"""
        import importlib, time
        for program, argv in {COMMANDS!r}:
            assert importlib.import_module(program).main(argv) == 0, argv
        time.sleep(1)  # telemetry is sent by a thread
    """)
    assert tried == []
    assert (work / "net.onnx").exists() and (work / "net.zip").exists() and (work / "out-rois.zip").exists()
    assert not list((work / "home").rglob("*Microsoft*"))  # no name for this machine is kept
