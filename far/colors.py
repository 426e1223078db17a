"""Convert images with an embedded color profile (ICC) to sRGB, with Pillow's littlecms."""

import functools
import io

import numpy as np
from PIL import Image, ImageCms

# Image modes that a profile of each color space can describe. Gray images may keep an original's RGB profile.
_GRAY_MODES = ("1", "L", "LA", "I;16", "I;16B", "I;16L", "I;16N", "I", "F")
_MODES = {"GRAY": _GRAY_MODES, "RGB": (*_GRAY_MODES, "P", "PA", "RGB", "RGBA"), "CMYK": ("CMYK",)}
_CHANNELS = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}
# A profile that changes no probe by more than this is sRGB itself with other rounding.
_ROUNDING = 1
_UNUSABLE = ("", None)


def to_srgb(picture: Image.Image) -> Image.Image:
    """Return an image of at most 8 bits per channel in sRGB; transparency is kept.

    An image without a profile, or with one that cannot be used (:func:`has_unusable_profile`), is assumed to
    be sRGB. Such images, and those whose profile is sRGB, are returned as they are.
    """
    profile = picture.info.get("icc_profile")
    channels, transform = _transform(profile, picture.mode) if profile else _UNUSABLE
    if transform is None:
        return picture
    if picture.has_transparency_data and picture.mode not in ("LA", "RGBA"):
        picture = picture.convert("LA" if picture.mode in ("1", "L") else "RGBA")
    converted = transform.apply(picture if picture.mode == channels else picture.convert(channels))
    del converted.info["icc_profile"]
    if picture.has_transparency_data:
        converted.putalpha(picture.getchannel("A"))
    return converted


def has_unusable_profile(picture: Image.Image) -> bool:
    """Return whether an image embeds a profile that is damaged or describes other channels."""
    if "icc_profile" not in picture.info:
        return False
    profile = picture.info["icc_profile"]  # Pillow stores None if it could not collect all of its parts
    return not profile or _transform(profile, picture.mode) == _UNUSABLE


@functools.lru_cache(maxsize=32)
def _transform(data: bytes, mode: str) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    """Return the mode to convert from, and the transform to sRGB, or ``None`` if it changes nothing.

    The mode is empty if the profile cannot be used for an image of ``mode``.
    """
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
        space = profile.profile.xcolor_space.strip()
        if mode not in _MODES.get(space, ()):
            return _UNUSABLE
        channels = _CHANNELS[space]
        # Interpolated tables of gray would be wrong by up to 10 in dark areas and save no time.
        flags = ImageCms.Flags.NOOPTIMIZE if channels == "L" else ImageCms.Flags.NONE
        srgb = ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(profile, srgb, channels, "RGB", flags=flags)
        return channels, None if channels != "CMYK" and _changes_nothing(transform, channels) else transform
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return _UNUSABLE


def _changes_nothing(transform: ImageCms.ImageCmsTransform, channels: str) -> bool:
    levels = np.linspace(0, 255, 16).round().astype(np.uint8)
    colors = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(64, 64, 3)
    probe = Image.fromarray(colors if channels == "RGB" else np.arange(256, dtype=np.uint8).reshape(16, 16))
    changes = np.asarray(transform.apply(probe), np.int16) - np.asarray(probe.convert("RGB"), np.int16)
    return int(np.abs(changes).max()) <= _ROUNDING
