"""Micro-batches of a training, each prepared by a thread while the one before it trains."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from far.seeds import seeded_generator

MicroBatch = tuple[Any, torch.Generator]


def micro_batches(
    read: Callable[[int, torch.Generator], Any],
    numbers: Iterable[int],
    seed: int,
    device: torch.device,
    *,
    ahead: bool,
) -> Iterator[MicroBatch]:
    """Yield the micro-batches ``numbers`` with their generators, which continue after the draws of ``read``.

    A micro-batch depends on its number and ``seed`` only, not on when it is prepared. Errors of ``read`` are
    raised where its micro-batch would be yielded.

    Args:
        read: reads a micro-batch, given its number and generator.
        device: where ``read`` puts it.
        ahead: prepare the next micro-batch in a thread. Its copies to a GPU enter the training's own stream,
            so they are in order, and short: 0.1 ms for 64 latents of 16 × 16 × 16.
    """

    def prepare(number: int) -> MicroBatch:
        generator = seeded_generator(number, seed)
        return read(number, generator), generator

    if not ahead:
        yield from map(prepare, numbers)
        return
    # A new thread would pin memory for the first GPU. An empty tensor has its device's number.
    place, set_device = torch.empty(0, device=device).device, torch.get_device_module(device).set_device
    with ThreadPoolExecutor(1, initializer=set_device, initargs=(place,)) as pool:
        ready: Future[MicroBatch] | None = None
        for number in numbers:
            following = pool.submit(prepare, number)
            if ready is not None:
                yield ready.result()
            ready = following
        if ready is not None:
            yield ready.result()
