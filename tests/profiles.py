"""ICC profiles made by hand, whose conversions to sRGB are known in closed form."""

import struct

from PIL import ImageCms

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def profile(
    space: bytes, tags: dict[bytes, bytes], kind: bytes = b"mntr", connection: bytes = b"XYZ "
) -> bytes:
    """An ICC profile of version 2 with these tags."""
    table, data, offset = b"", b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += struct.pack(">4sII", name, offset + len(data), len(content))
        data += content
    body = struct.pack(">I", len(tags)) + table + data
    header = struct.pack(
        ">I4sI4s4s4s12s4s28s",
        128 + len(body),
        bytes(4),
        0x02400000,
        kind,
        space,
        connection,
        bytes(12),
        b"acsp",
        bytes(28),
    )
    return (header + struct.pack(">3i", 63190, 65536, 54061)).ljust(128, b"\0") + body


def tags_of(data: bytes) -> dict[bytes, bytes]:
    entries = (
        struct.unpack_from(">4sII", data, 132 + 12 * index)
        for index in range(struct.unpack_from(">I", data, 128)[0])
    )
    return {name: data[offset : offset + size] for name, offset, size in entries}


LINEAR = b"curv" + bytes(8)  # no points: the identity
RGB_TAGS = {
    name: tags_of(SRGB)[name] for name in (b"wtpt", b"rXYZ", b"gXYZ", b"bXYZ", b"rTRC", b"gTRC", b"bTRC")
}
# Its red is sRGB's blue, so that a conversion exchanges the two channels and does nothing else.
EXCHANGED = profile(b"RGB ", {**RGB_TAGS, b"rXYZ": RGB_TAGS[b"bXYZ"], b"bXYZ": RGB_TAGS[b"rXYZ"]})
GRAY = profile(b"GRAY", {b"wtpt": RGB_TAGS[b"wtpt"], b"kTRC": LINEAR})
