"""A web server of a folder's files that fails as it is told, and counts what it is asked for."""

import threading
from collections import Counter, defaultdict
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class FailingServer:
    """`failures["00000.tar"] = ["503", "cut"]`: the first request of it fails, the second ends after half of it.

    The last word of a list counts for all requests that follow; "" is an answer as it should be, and "hang" stops
    after half of the content until the server ends.
    """

    def __init__(self, folder: Path) -> None:
        self.failures: dict[str, list[str]] = defaultdict(lambda: [""])
        self.gets: Counter[str] = Counter()
        self.hanging, self.ended = threading.Event(), threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self, folder))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self.ended.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    def __init__(self, server: FailingServer, folder: Path, *arguments: object) -> None:
        self.told, self.folder = server, folder
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_HEAD(self) -> None:
        self._answer("", has_content=False)

    def do_GET(self) -> None:
        name = self.path.lstrip("/")
        told = self.told.failures[name]
        failure = told.pop(0) if len(told) > 1 else told[0]
        self.told.gets[name] += 1
        self._answer(failure, has_content=True)

    def _answer(self, failure: str, *, has_content: bool) -> None:
        path = self.folder / self.path.lstrip("/")
        if failure.isdigit() or not path.is_file():
            self.send_error(int(failure or 404))
            return
        content = path.read_bytes()
        self.send_response(200)
        sent = content[: len(content) // 2] if failure in ("cut", "short", "hang") else content
        # "cut" announces everything and closes the connection; "short" announces only what it sends.
        self.send_header("Content-Length", str(len(sent) if failure == "short" else len(content)))
        self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
        self.end_headers()
        if has_content:
            self.wfile.write(sent)
            self.wfile.flush()
            if failure == "hang":
                self.told.hanging.set()
                self.told.ended.wait()

    def log_message(self, format: str, *arguments: object) -> None:
        pass
