"""Local web server for a folder that ``far export web`` wrote."""

import functools
import http.server
import sys
import urllib.parse
from pathlib import Path
from typing import Any


def serve(folder: Path, host: str, port: int) -> http.server.ThreadingHTTPServer:
    """Return a server of the files in ``folder``; call its ``serve_forever``.

    Pages are isolated from other origins, which gives them threads.
    """
    return _Server((host, port), functools.partial(_Handler, directory=str(folder)))


class _Server(http.server.ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore visitors that leave while a file is sent, and report other errors."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(http.server.SimpleHTTPRequestHandler):
    extensions_map = {  # noqa: RUF012 (the base class declares it as an instance's)
        **http.server.SimpleHTTPRequestHandler.extensions_map,
        ".js": "text/javascript",
        ".wasm": "application/wasm",
        ".onnx": "application/octet-stream",
    }

    def send_head(self) -> Any:
        if "\0" in urllib.parse.unquote(self.path):  # opening it would raise a ValueError
            return self.send_error(http.HTTPStatus.BAD_REQUEST)
        return super().send_head()

    def end_headers(self) -> None:
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cache-Control", "no-cache")  # a new export at the same address shows at once
        super().end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        """Print nothing per request."""
