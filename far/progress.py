"""Progress bars of generation, which move at every AR step and count finished images."""

from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

if TYPE_CHECKING:
    from far.sampling import Progress

_FORMAT = "{l_bar}{bar}| {finished}/{images} images [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


class ImageBar(tqdm):
    """Progress bar over images. An unfinished image counts as the fraction of its finished AR steps.

    Args:
        total: number of images, or of groups of ``group`` images.
        description: text before the bar.
        group: images per unit of ``total``.
        options: options of tqdm.
    """

    def __init__(self, total: int, description: str, *, group: int = 1, **options: Any) -> None:
        self.group, self.unfinished = group, 0.0
        super().__init__(
            total=total, desc=description, unit="img", unit_scale=False if group == 1 else group,
            bar_format=_FORMAT, miniters=0, mininterval=0.5, **options,
        )  # fmt: skip

    def ar_step(self, progress: "Progress") -> None:
        """Move by one AR step of a batch, as a callback of :meth:`far.Pipeline.draw`."""
        fraction = len(progress.latents) / progress.steps / self.group
        last = progress.step + 1 == progress.steps
        self.unfinished = 0.0 if last else self.unfinished + fraction
        if not self.disable:
            self.set_postfix_str(f"AR step {progress.step + 1}/{progress.steps}", refresh=False)
        self.update(fraction)

    def move_to(self, position: int) -> None:
        """Move to ``position`` finished units, unless AR steps have moved the bar there already."""
        self.unfinished = 0.0
        self.update(position - self.n)

    @property
    def format_dict(self) -> MutableMapping[str, Any]:
        """Return the values of ``_FORMAT``: those of tqdm, and the finished and total images."""
        finished = round((self.n - self.unfinished) * self.group)
        images = round((self.total or 0) * self.group)
        return {**super().format_dict, "finished": finished, "images": images}
