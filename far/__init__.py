"""Fast autoregressive image generation in continuous latent space.

>>> import far
>>> pictures = far.load("avatars-64").generate(labels=[3, 5], guidance=2.0, seed=0)
"""

from far.autoencoder import Autoencoder
from far.errors import InputError
from far.pipeline import Pipeline, load
from far.sampling import SamplingConfig

__version__ = "0.1.0"
__all__ = ["Autoencoder", "InputError", "Pipeline", "SamplingConfig", "__version__", "load"]
