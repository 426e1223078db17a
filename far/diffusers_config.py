"""Identity and configuration of an autoencoder of diffusers. Needs neither torch nor diffusers."""

import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from far.config import check_count, from_dict
from far.errors import InputError

PREFIX = "diffusers:"

# Entries that change neither moments nor images: hints for tiling and float16, and scale and shift.
_STATISTICS = {"scaling_factor", "shift_factor", "latents_mean", "latents_std"}
_SKIPPED = {"sample_size", "force_upcast", *_STATISTICS}


@dataclasses.dataclass(frozen=True)
class _Entries:
    """Entries that far reads, with diffusers' defaults."""

    latent_channels: int
    block_out_channels: tuple[int, ...]
    scaling_factor: float
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None


# Autoencoders that far can use, with the entries that have a default. DC-AE names its widths differently.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "AutoencoderKL": {"latent_channels": 4, "block_out_channels": (64,), "scaling_factor": 0.18215},
    "AutoencoderDC": {
        "latent_channels": 32,
        "decoder_block_out_channels": (128, 256, 512, 512, 1024, 1024),
        "scaling_factor": 1.0,
    },
}


@dataclasses.dataclass(frozen=True)
class DiffusersConfig:
    """Identity and configuration of an ``AutoencoderKL`` or ``AutoencoderDC`` of diffusers.

    Attributes:
        source: folder, or ``OWNER/NAME[/SUBFOLDER]@COMMIT`` of the hub, with its ``config.json`` and weights.
        sha256: digest of its configuration and weights.
        network: the entries of its ``config.json``, with ``_class_name``.
        included: whether a model's folder holds its weights. They are read from ``source`` otherwise.
        kind: distinguishes it from far's own autoencoder in ``config.json``.
    """

    source: str
    sha256: str
    network: dict[str, Any]
    included: bool = False
    kind: Literal["diffusers"] = "diffusers"

    def __post_init__(self) -> None:
        name = self.network.get("_class_name")
        if not isinstance(name, str) or name not in _DEFAULTS:
            expected = " or ".join(_DEFAULTS)
            raise InputError(f"_class_name is {str(name)[:80]!r}. Give an {expected} of diffusers")
        for key, value in _integers(self.network):
            most = 2**8 if "layers_per_block" in key else 2**16
            if value > most:
                raise InputError(f"{key} {value} is too large. Give at most {most}")
        for key in ("in_channels", "out_channels"):
            if self.network.get(key, 3) != 3:
                raise InputError(f"{key} is {str(self.network[key])[:80]}. Give an autoencoder of RGB images")
        entries = self._entries
        check_count("latent_channels", entries.latent_channels)
        if not 1 <= len(entries.block_out_channels) <= 8:
            raise InputError(f"block_out_channels has {len(entries.block_out_channels)} levels. Give 1 to 8")
        _ = self._scale_and_shift  # raises an error if they do not fit the channels

    @functools.cached_property
    def _entries(self) -> _Entries:
        known = {**_DEFAULTS[self.class_name], **self.network}
        known["block_out_channels"] = known.get("decoder_block_out_channels", known.get("block_out_channels"))
        fields = {field.name for field in dataclasses.fields(_Entries)}
        return from_dict(_Entries, {key: known[key] for key in fields & known.keys()}, self.class_name)

    @property
    def class_name(self) -> str:
        """The class of diffusers."""
        return str(self.network["_class_name"])

    @property
    def latent_channels(self) -> int:
        return self._entries.latent_channels

    @property
    def moment_channels(self) -> int:
        """Channels of the cached moments: a DC-AE has no variance."""
        return self.latent_channels * (1 if self.class_name == "AutoencoderDC" else 2)

    @property
    def widths(self) -> list[int]:
        """Channels of the decoder at each resolution, from the finest."""
        return list(self._entries.block_out_channels)

    @property
    def stride(self) -> int:
        """Pixels of image per latent, along a side."""
        return 2 ** (len(self.widths) - 1)

    @property
    def scale(self) -> float | tuple[float, ...]:
        """Factor of a latent, after :attr:`shift` is subtracted; one number, or one per channel."""
        return self._scale_and_shift[0]

    @property
    def shift(self) -> float | tuple[float, ...]:
        return self._scale_and_shift[1]

    @property
    def _scale_and_shift(self) -> tuple[float | tuple[float, ...], float | tuple[float, ...]]:
        entries = self._entries
        statistics = entries.latents_mean, entries.latents_std
        return scale_and_shift(
            entries.latent_channels, entries.scaling_factor, entries.shift_factor, *statistics
        )

    @property
    def spherical(self) -> bool:
        return False

    @property
    def arithmetic(self) -> str:
        """Settings that moments depend on besides the encoder's weights, as text."""
        kept = {key: value for key, value in self.network.items() if key not in _SKIPPED}
        return json.dumps(kept, sort_keys=True)

    @property
    def sizes(self) -> dict[str, Any]:
        """Entries that the networks are built from: all but scale and shift."""
        return {key: value for key, value in self.network.items() if key not in _STATISTICS}

    @property
    def latent_settings(self) -> dict[str, Any]:
        """Settings that normalized latents depend on besides the encoder's weights."""
        return {**json.loads(self.arithmetic), "scale": self.scale, "shift": self.shift}

    @property
    def is_local(self) -> bool:
        """True if it is read from a folder of this machine."""
        return Path(self.source).is_absolute()

    def including_weights(self) -> "DiffusersConfig":
        """Return the configuration of a copy in a model's folder. A local source is reduced to its name."""
        source = Path(self.source).name if self.is_local else self.source
        return dataclasses.replace(self, source=source, included=True)


def scale_and_shift(
    channels: int,
    factor: float,
    shift: float | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> tuple[float | tuple[float, ...], float | tuple[float, ...]]:
    """Return scale and shift of ``(latent − shift) · scale`` from the entries of diffusers.

    It is ``(latent − shift_factor) · scaling_factor``, or with statistics per channel
    ``(latent − latents_mean) · scaling_factor / latents_std``. Equal scales become one number.

    Raises:
        InputError: one of ``latents_mean`` and ``latents_std`` is missing or has not ``channels`` values,
            or a factor is not positive.
    """
    if factor <= 0:
        raise InputError(f"scaling_factor {factor} must be positive")
    if mean is None and std is None:
        return factor, shift or 0.0
    if mean is None or std is None or shift:
        raise InputError("give both latents_mean and latents_std, without shift_factor, or neither")
    if len(mean) != channels:
        raise InputError(f"latents_mean {list(mean)} must be one value per channel, of {channels}")
    if len(std) != channels or min(std) <= 0:
        raise InputError(f"latents_std {list(std)} must be one positive value per channel")
    scale = tuple(factor / value for value in std)
    return scale if len(set(std)) > 1 else scale[0], tuple(mean)


def _integers(value: Any, key: str = "") -> Iterator[tuple[str, int]]:
    """Yield every integer in nested entries but bools, with its key."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _integers(item, str(name))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _integers(item, key)
    elif isinstance(value, int) and not isinstance(value, bool) and key not in _SKIPPED:
        yield key, value
