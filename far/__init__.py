"""Fast autoregressive image generation in continuous latent space.

>>> import far
>>> pictures = far.load("avatars-64").generate(labels=[3, 5], guidance=2.0, seed=0)
"""

from typing import TYPE_CHECKING

from far.errors import InputError
from far.lazy import lazily
from far.sampling_config import SamplingConfig

if TYPE_CHECKING:
    from far.autoencoder import Autoencoder
    from far.pipeline import Pipeline, load
else:
    __getattr__, __dir__ = lazily(
        __name__, {"Autoencoder": "far.autoencoder", "Pipeline": "far.pipeline", "load": "far.pipeline"}
    )

__version__ = "0.1.0"
__all__ = ["Autoencoder", "InputError", "Pipeline", "SamplingConfig", "__version__", "load"]
