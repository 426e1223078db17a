"""Time, arithmetic and memory of a generation, by network.

The sampler and the networks run as they are: :mod:`far.benchmark.watch` reads a clock around them. Image
quality is measured in :mod:`far.evaluation`.
"""

from far.benchmark.hardware import machine, product_peak
from far.benchmark.results import measure
from far.benchmark.rows import FASTEST, SEED, Row, default_rows, rows_of, usable_rows
from far.benchmark.timing import median_ratio, paired, summary
from far.benchmark.watch import generate, segments

__all__ = [
    "FASTEST", "SEED", "Row", "default_rows", "generate", "machine", "measure", "median_ratio", "paired",
    "product_peak", "rows_of", "segments", "summary", "usable_rows",
]  # fmt: skip
