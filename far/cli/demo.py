"""Serve a web page that shows images token by token, and two models on the same image.

With --static, serve a page that far export web wrote, which draws in the visitor's browser.

It serves this machine only unless --host is given, and loads nothing from other hosts.
"""

import argparse
import os
import socket
import threading
from pathlib import Path

from far.cli.machine_arguments import add_machine_arguments, prepare_machine, print_chosen
from far.cli.model_arguments import add_decoder_argument, add_graph_arguments, check_applies
from far.devices import device_title
from far.errors import InputError
from far.names import bundled_names, find_folder
from far.notices import noticed
from far.precision import DTYPES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    names = "bundled names, folders or hub names (default: all bundled models)"
    add("--weights", nargs="+", metavar="MODEL", help=names)
    add("--static", type=Path, metavar="FOLDER", help="a page of far export web, instead of drawing here")
    add("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine only)")
    add("--port", type=int, default=7860, help="port to listen on (default 7860)")
    add_machine_arguments(parser, DTYPES)
    add_decoder_argument(parser)
    add_graph_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    if not 1 <= arguments.port <= 65535:
        raise InputError(f"--port {arguments.port} is out of range. Give 1 to 65535")
    if arguments.static is not None:
        return _serve_static(arguments)
    weights = arguments.weights or bundled_names()
    for name in weights:
        find_folder(name)
    _check_address(arguments.host, arguments.port)
    # gradio reads these when it is imported: no telemetry, and few remembered clicks (10,000 by default).
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1")
    os.environ["GRADIO_ANALYTICS_MAX_EVENTS"] = "100"
    # It requests its own address at the start, for which a proxy must not answer.
    given = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    if given != "*":
        own = ",".join(filter(None, (given, "localhost", "127.0.0.1", arguments.host)))
        os.environ.update(no_proxy=own, NO_PROXY=own)
    try:
        from far.demo.drawing import load_models
        from far.demo.page import Demo
    except ModuleNotFoundError as error:
        raise InputError(f"the demo needs {error.name}. Run pip install 'far-image[demo]'") from error
    device = prepare_machine(arguments)
    with noticed(f"loading {', '.join(weights)}"):
        options = {name: getattr(arguments, name) for name in ("record", "compile", "decoder")}
        models = load_models(weights, arguments.dtype, device, **options)
    print_chosen(device=(arguments.device, device_title(device)), dtype=(arguments.dtype, models[0].dtype))
    address = Demo(models).launch(arguments.host, arguments.port)
    print(f"far demo: {address} (Ctrl-C ends it)", flush=True)
    threading.Event().wait()


def _serve_static(arguments: argparse.Namespace) -> None:
    folder, host, port = arguments.static, arguments.host, arguments.port
    allowed: dict[str, list[object]] = {
        "weights": [None], "device": ["auto"], "dtype": ["auto"], "threads": [None],
        "record": [True], "compile": [False], "decoder": ["full"],
    }  # fmt: skip
    check_applies(arguments, allowed, f"--static {folder}")
    if not (folder / "index.html").is_file():
        raise InputError(f"--static {folder} holds no page (index.html). Make one with far export web")
    _check_address(host, port)

    from far.demo.static import serve

    with serve(folder, host, port) as server:
        print(f"far demo: http://{host}:{port}/ (Ctrl-C ends it)", flush=True)
        server.serve_forever()


def _check_address(host: str, port: int) -> None:
    """Raise an :class:`InputError` if no server can listen there, before models are loaded."""
    try:
        with socket.socket() as probe:  # IPv4, which is all that gradio serves
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except (OSError, TypeError) as error:  # Python's encoding of long names raises a TypeError
        wrong = f"cannot listen on {host}, port {port}: {getattr(error, 'strerror', error)}"
        raise InputError(f"{wrong}. Give another --host or --port") from error
