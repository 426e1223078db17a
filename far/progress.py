"""Progress bars of drawing: they move with every AR step and count finished images."""

from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

if TYPE_CHECKING:
    from far.sampling import Progress

_FORMAT = "{l_bar}{bar}| {finished}/{images} images [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


class ImageBar(tqdm):
    """A bar over images. An image in progress counts by the fraction of its AR steps that are done.

    Args:
        total: images in all, or groups of ``group`` images.
        description: stands before the bar.
        group: images that each unit of ``total`` stands for.
        options: those of tqdm.
    """

    def __init__(self, total: int, description: str, *, group: int = 1, **options: Any) -> None:
        self.group, self.unfinished = group, 0.0
        super().__init__(
            total=total, desc=description, unit="img", unit_scale=False if group == 1 else group, bar_format=_FORMAT,
            miniters=0, mininterval=0.5, **options,
        )  # fmt: skip

    def ar_step(self, progress: "Progress") -> None:
        """Move by one AR step of a batch; a callback of :meth:`far.Pipeline.draw`."""
        share = len(progress.latents) / progress.steps / self.group
        last = progress.step + 1 == progress.steps
        self.unfinished = 0.0 if last else self.unfinished + share
        if not self.disable:
            self.set_postfix_str(f"AR step {progress.step + 1}/{progress.steps}", refresh=False)
        self.update(share)

    def move_to(self, position: int) -> None:
        """Move to ``position`` units, which are finished; nothing if drawing has moved the bar there already."""
        self.unfinished = 0.0
        self.update(position - self.n)

    @property
    def format_dict(self) -> MutableMapping[str, Any]:
        """Values for ``_FORMAT``: tqdm's own, and the images finished and in all."""
        finished, images = (
            round(number * self.group) for number in (self.n - self.unfinished, self.total or 0)
        )
        return {**super().format_dict, "finished": finished, "images": images}
