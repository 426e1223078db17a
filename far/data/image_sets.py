"""Reading an image set (``train/`` and ``held-out/`` shards of uint8 images) as tensors for the networks."""

from torch import Tensor

from far.data.shards import ShardReader


def read_images(reader: ShardReader, rows: Tensor) -> Tensor:
    """Rows ``[n]`` of an image set as ``[n, 3, h, w]`` float32 in [−1, 1]."""
    return reader.rows("images", rows).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()
