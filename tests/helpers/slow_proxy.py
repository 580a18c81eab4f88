"""A server before a vLLM server, which holds the requests for completions back."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import requests
from requests.adapters import HTTPAdapter


class Proxy(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, behind: str, seconds: float) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.behind, self.seconds = behind, seconds
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.session = requests.Session()
        self.session.mount("http://", HTTPAdapter(pool_maxsize=64))

    def handle_error(self, *_):
        pass  # a client that went away


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.forward("GET", None)

    def do_POST(self):
        self.forward("POST", self.rfile.read(int(self.headers["Content-Length"])))

    def forward(self, method, body):
        if self.path == "/v1/completions" and b"powerflow-" in body:
            time.sleep(self.server.seconds)
        url, kind = self.server.behind + self.path, {"Content-Type": "application/json"}
        answer = self.server.session.request(method, url, data=body, headers=kind)
        self.send_response(answer.status_code)
        self.send_header("Content-Length", str(len(answer.content)))
        self.end_headers()
        self.wfile.write(answer.content)


@contextmanager
def delayed(url: str, seconds: float) -> Iterator[Proxy]:
    """A proxy that waits `seconds` (which may be changed) before each completion of an adapter."""
    proxy = Proxy(url, seconds)
    thread = Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        thread.join()
        proxy.server_close()
