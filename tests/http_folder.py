"""A real HTTP server over a folder, on 127.0.0.1, that misbehaves when told to."""

from __future__ import annotations

import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType

LIMIT = 64 << 20
"""What an endless answer ends at, should nobody hang up."""


class HttpFolder:
    """Context manager. ``faults``: by file name, what the next requests for it meet, one each; then all is well.

    500, 503, 403: that status. stall: half of the file, then silence. cut: half of it, then the connection is closed.
    short: half of it, declared as all. long: the file and zeros after it, with the length declared. endless: zeros
    without a declared length. flip: one byte is another. drip: a byte at a time.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.faults: dict[str, list[str]] = {}
        self.requests: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._closing = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server._answer(self)

            def log_message(self, format: str, *args: object) -> None:
                """Nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/set"

    def __enter__(self) -> HttpFolder:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        name = request.path.partition("?")[0].removeprefix("/set/")
        with self._lock:
            self.requests[name] += 1
            fault = self.faults[name].pop(0) if self.faults.get(name) else ""
        path = self.folder / name
        if fault.isdigit():
            request.send_error(int(fault))
            return
        if path.is_dir():
            data = "".join(f'<a href="{item.name}">x</a>\n' for item in self.folder.iterdir()).encode()
        elif path.is_file():
            data = path.read_bytes()
        else:
            request.send_error(404)
            return
        if fault == "flip":
            data = data[:600] + bytes([data[600] ^ 1]) + data[601:]
        half = len(data) // 2
        extra = LIMIT if fault in ("long", "endless") else 0
        request.send_response(200)
        if fault != "endless":
            request.send_header("Content-Length", str(half if fault == "short" else len(data) + extra))
        request.end_headers()
        try:
            if fault == "drip":
                for byte in data:
                    request.wfile.write(bytes([byte]))
                    if self._closing.wait(0.02):
                        return
                return
            request.wfile.write(data[:half] if fault in ("stall", "cut", "short") else data)
            if fault == "stall":
                self._closing.wait(30)
            while extra > 0 and not self._closing.is_set():
                request.wfile.write(bytes(1 << 16))
                extra -= 1 << 16
        except OSError:
            # The client hung up.
            return
        finally:
            request.close_connection = True
