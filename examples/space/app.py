"""Serve the demo of far on a Hugging Face Space, or anywhere else, to everyone who can reach the machine."""

import os
import sys

from far.cli.main import main

port = os.environ.get("GRADIO_SERVER_PORT", "7860")
weights = os.environ.get("FAR_WEIGHTS", "").split()
sys.exit(main(["demo", "--host", "0.0.0.0", "--port", port, *(["--weights", *weights] if weights else [])]))
