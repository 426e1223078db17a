"""Random number generators whose stream depends on every bit of their seed.

torch seeds its CPU generator, a Mersenne Twister, with the lower 32 bits of a seed and ignores the others.
Here, larger keys fill the twister's state by ``init_by_array``, its authors' initialization for long keys.
Keys below 2³² give the streams of ``manual_seed``.
"""

import contextlib
from collections.abc import Iterator

import numpy as np
import torch

# Where torch's serialized CPU generator holds the 624 words of the twister, 8 bytes each.
_WORDS = slice(24, 24 + 8 * 624)


def seeded_generator(number: int, seed: int = 0) -> torch.Generator:
    """Return a CPU generator for one pair of numbers; different pairs give different streams.

    Args:
        number: seed of an image, or the number of a step, epoch or group of a run, within 0 … 2⁶³ − 1.
        seed: seed of the run, within the same range.
    """
    words = np.array([number, seed], dtype="<u8").view("<u4")
    if not words[1:].any():
        return torch.Generator().manual_seed(int(words[0]))
    # Always four words: init_by_array repeats its key, so keys of different lengths can be equal.
    twister = np.random.RandomState(words).get_state(legacy=False)["state"]["key"]
    made = torch.Generator().manual_seed(int(twister[1]) << 31 | int(twister[2]) >> 1)
    state = made.get_state()
    state[_WORDS] = torch.from_numpy(twister.astype(np.int64)).view(torch.uint8)
    made.set_state(state)
    return made


def seed_all(number: int, seed: int = 0) -> None:
    """Seed the default generators of all devices, for operations that take no generator, such as dropout."""
    made = seeded_generator(number, seed)
    torch.manual_seed(made.initial_seed())
    torch.default_generator.set_state(made.get_state())


@contextlib.contextmanager
def seeded(number: int) -> Iterator[None]:
    """Seed the CPU's default generator within the block, to initialize weights, and restore it after."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.set_state(seeded_generator(number).get_state())
        yield
