"""A real HTTP server on this machine that misbehaves as it is told to."""

import re
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Page:
    """A file of the server and what is wrong with it."""

    body: bytes
    etag: str | None = '"1"'
    ranges: bool = True
    heeds_if_range: bool = True
    cut_after: int | None = None
    """Bytes of the body that an answer sends before the connection breaks."""
    cuts: int = 10**9
    """How many answers break off; the next ones are whole."""
    busy: int = 0
    """How many answers are 503 before the first good one."""
    length: bool = True
    """Whether the server tells the size."""
    pace: float = 0.0
    """Seconds between blocks of 64 KiB."""
    status: int | None = None
    head_status: int | None = None
    range_status: int | None = None
    """What HEAD, and what GET of a part, are refused with."""
    asked: list[dict[str, str]] = field(default_factory=list)
    """Headers of the GET requests so far."""


class Server:
    """Pages by path on a free port, until it is closed."""

    def __init__(self) -> None:
        self.pages: dict[str, Page] = {}
        self.gets: Counter[str] = Counter()
        handler = type("BoundHandler", (Handler,), {"server_of_pages": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def add(self, path: str, body: bytes, **faults) -> Page:
        """Serve a body under /path."""
        self.pages[f"/{path}"] = Page(body, **faults)
        return self.pages[f"/{path}"]

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()


class Handler(BaseHTTPRequestHandler):
    """Answers with the pages of a Server."""

    server_of_pages: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        """Headers of a page."""
        page = self.server_of_pages.pages.get(self.path)
        if page is None or page.status or page.head_status:
            self._empty(404 if page is None else page.head_status or page.status)
            return
        self.send_response(200)
        if page.length:
            self.send_header("Content-Length", str(len(page.body)))
        self.end_headers()
        self.close_connection = not page.length

    def do_GET(self) -> None:
        """A page, whole or in part, with its faults."""
        self.server_of_pages.gets[self.path] += 1
        page = self.server_of_pages.pages.get(self.path)
        if page is None or page.status:
            self._empty(404 if page is None else page.status)
            return
        page.asked.append(dict(self.headers))
        if page.range_status and "Range" in self.headers:
            self._empty(page.range_status)
            return
        if page.ranges and self.headers.get("Range") == "bytes=0-0":
            self._send_first_byte(page)
            return
        if page.busy:
            page.busy -= 1
            self._empty(503)
            return
        start = self._start(page)
        if start and start >= len(page.body):
            self._empty(416, {"Content-Range": f"bytes */{len(page.body)}"})
            return
        self._send(page, start)

    def _send_first_byte(self, page: Page) -> None:
        if not page.body:
            self._empty(416, {"Content-Range": "bytes */0"})
            return
        self.send_response(206)
        self.send_header("Content-Range", f"bytes 0-0/{len(page.body)}")
        self.send_header("Content-Length", "1")
        self.end_headers()
        self.wfile.write(page.body[:1])

    def _start(self, page: Page) -> int:
        """Where the answer begins: 0 unless a range is asked for and given."""
        asked = re.match(r"bytes=(\d+)-$", self.headers.get("Range", ""))
        current = not page.heeds_if_range or self.headers.get("If-Range") in (None, page.etag)
        return int(asked[1]) if asked and page.ranges and current else 0

    def _send(self, page: Page, start: int) -> None:
        rest = page.body[start:]
        self.send_response(206 if start else 200)
        if start:
            total = len(page.body)
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        if page.etag:
            self.send_header("ETag", page.etag)
        if page.length:
            self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        if page.cut_after is not None and page.cuts and page.cut_after < len(rest):
            page.cuts -= 1
            rest = rest[: page.cut_after]
            self.close_connection = True
        if not page.length:
            self.close_connection = True
        for at in range(0, len(rest), 1 << 16):
            self.wfile.write(rest[at : at + (1 << 16)])
            time.sleep(page.pace)

    def _empty(self, status: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": "0"}.items():
            self.send_header(name, value)
        self.end_headers()
