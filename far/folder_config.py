"""Content of a model folder's ``config.json``. Needs no torch: a damaged one is refused without it."""

import dataclasses
from typing import Any

from far.autoencoder_config import AutoencoderConfig
from far.config import to_dict
from far.diffusers_config import DiffusersConfig
from far.errors import InputError
from far.files import is_plain
from far.model_config import ModelConfig
from far.sampling_config import SamplingConfig


@dataclasses.dataclass(frozen=True)
class Base:
    """Bundled model from which a folder takes the tensors that it does not hold itself.

    Attributes:
        weights: the bundled model's name.
        sha256: the checksums of its tensors, by file name.
    """

    weights: str
    sha256: dict[str, str]


@dataclasses.dataclass(frozen=True)
class FolderConfig:
    """Content of ``config.json``: a generator, an autoencoder, or both.

    Attributes:
        model: sizes of the generator; None if the folder holds an autoencoder alone.
        autoencoder: sizes and latent statistics of the autoencoder, or identity of one of diffusers; None if
            the folder has none of its own.
        classes: one name per class of the generator.
        defaults: the sampling values that a generation takes unless others are given.
        results: figures that were measured while training.
        training: facts about the training: data, recipe, steps.
        base: the bundled model that this one builds on.
        sha256: checksums of tensors by file name, for files that do not hold their own.
    """

    model: ModelConfig | None = None
    autoencoder: AutoencoderConfig | DiffusersConfig | None = None
    classes: tuple[str, ...] = ()
    defaults: SamplingConfig = SamplingConfig()
    results: dict[str, Any] = dataclasses.field(default_factory=dict)
    training: dict[str, Any] = dataclasses.field(default_factory=dict)
    base: Base | None = None
    sha256: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.model is None:
            return
        if len(self.classes) != self.model.classes:
            raise InputError(f"classes has {len(self.classes)} names. The model needs {self.model.classes}")
        if odd := [name for name in self.classes if not is_plain(name)]:
            raise InputError(f"classes holds {odd[0]!r}. Give names without control characters")
        if self.autoencoder is not None and self.autoencoder.latent_channels != self.model.latent_channels:
            raise InputError(
                f"the model has {self.model.latent_channels} latent channels and the autoencoder "
                f"{self.autoencoder.latent_channels}. Take the autoencoder that the model was trained with"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the entries to write, ready for JSON: without those that do not apply."""
        values = {name: value for name, value in to_dict(self).items() if value is not None}
        if self.model is None:
            return {name: values[name] for name in ("autoencoder", "results")}
        if not self.sha256:
            del values["sha256"]
        return values
