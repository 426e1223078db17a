"""Fast autoregressive image generation in continuous latent space.

>>> import far
>>> images = far.load("avatars-64").generate(labels=[3, 5], guidance=2.0, seed=0)
"""

from typing import TYPE_CHECKING

from far.errors import InputError
from far.lazy import lazily
from far.sampling_config import SamplingConfig

if TYPE_CHECKING:
    from far.autoencoder import Autoencoder
    from far.folder import load_autoencoder
    from far.pipeline import Pipeline, load
else:
    _HOMES = {
        "Autoencoder": "far.autoencoder",
        "Pipeline": "far.pipeline",
        "load": "far.pipeline",
        "load_autoencoder": "far.folder",
    }
    __getattr__, __dir__ = lazily(__name__, _HOMES)

__version__ = "0.1.0"
__all__ = [
    "Autoencoder", "InputError", "Pipeline", "SamplingConfig", "__version__", "load", "load_autoencoder",
]  # fmt: skip
