"""Recorded generation: the kernels of each AR step as one CUDA graph, which a GPU runs without Python.

A small model launches hundreds of kernels per AR step, and Python takes longer to launch them than a GPU to
run them. Between AR steps a generation takes nothing from the host, and its shapes depend on the sampling
values alone. So the generator of :func:`far.sampling.ar_steps` is recorded as it runs, and later generations
replay the graphs with other labels, orders, noise and kept tokens in the same memory, to the same bits.
"""

import collections
import dataclasses
import functools
import gc
import sys
import threading
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor

from far.model import FAR
from far.sampling import Kept, Noise, Progress, SamplingConfig, Start, ar_steps, prepare_start

# Recordings that are kept, each with the memory of a generation.
_MOST = 2
# Shapes of earlier generations that are remembered.
_MOST_SEEN = 64


class Recordings:
    """Recordings of the last generations, by batch, sampling values and number of kept tokens.

    The first generation of a shape runs eagerly, which loads all kernels. The second is recorded, and the
    later ones replay it.

    Attributes:
        enabled: if not, all generations run eagerly.
        fault: reason why a recording failed, after which nothing is recorded, or None.
    """

    def __init__(self, *, enabled: bool = True) -> None:
        self.enabled = enabled
        self._lock = threading.Lock()
        self._weights: Hashable = None
        self._seen: collections.deque[Hashable] = collections.deque(maxlen=_MOST_SEEN)
        self._recordings: dict[Hashable, Recording] = {}
        self.fault: str | None = None

    def __len__(self) -> int:
        return len(self._recordings)

    def __reduce__(self) -> tuple[Callable[[], "Recordings"], tuple[()]]:
        """Copy and pickle as empty: graphs stay with their process and their weights."""
        return functools.partial(Recordings, enabled=self.enabled), ()

    def sampling_steps(
        self, model: FAR, labels: Tensor, noise: Noise, config: SamplingConfig, *, kept: Kept | None = None
    ) -> Iterator[Progress]:
        """Return an iterator over the AR steps, as :func:`far.sampling.sampling_steps` does.

        Raises:
            InputError: see :func:`far.sampling.prepare_start`.
        """
        start = prepare_start(model, labels, noise, config, kept=kept)
        record = self.enabled and can_record(labels.device)
        return self._steps(model, start, config) if record else ar_steps(model, start, config)

    def _steps(self, model: FAR, start: Start, config: SamplingConfig) -> Iterator[Progress]:
        key = config, len(start.labels), start.kept
        recording = self._recording(key, model, start, config)
        # A recording has memory for one generation. Others that overlap with it run eagerly.
        if recording is not None and recording.busy.acquire(blocking=False):
            try:
                yield from recording.replay(start)
            finally:
                recording.busy.release()
        else:
            yield from ar_steps(model, start, config)
            self._seen.append(key)

    def _recording(
        self, key: Hashable, model: FAR, start: Start, config: SamplingConfig
    ) -> "Recording | None":
        """Return the recording of a shape, made now if the shape was drawn before; None if there is none."""
        with self._lock:
            if (weights := _identity(model)) != self._weights:
                self._weights = weights
                self._recordings.clear()
                self._seen.clear()
            recording = self._recordings.pop(key, None)
            if recording is None and key in self._seen and self.fault is None:
                while len(self._recordings) >= _MOST:
                    self._recordings.pop(next(iter(self._recordings)))
                recording = self._record(model, start, config)
            if recording is not None:
                self._recordings[key] = recording  # the last one in the dictionary was used last
            return recording

    def _record(self, model: FAR, start: Start, config: SamplingConfig) -> "Recording | None":
        try:
            return Recording(model, start, config)
        except RuntimeError as error:  # an operation that cannot be recorded, or too little memory
            self.fault = str(error).partition("\n")[0]
            print(f"far: generation runs without CUDA graphs, more slowly: {self.fault}", file=sys.stderr)
            return None


class Recording:
    """AR steps of one generation as graphs, replayed in their order over the same memory.

    Attributes:
        busy: held while a generation replays it.
    """

    @torch.inference_mode(False)  # memory that is written again later must not be of an inference mode
    def __init__(self, model: FAR, start: Start, config: SamplingConfig) -> None:
        self.busy = threading.Lock()
        copies: dict[str, Any] = {name: tensor.clone() for name, tensor in _tensors(start).items()}
        self._start = dataclasses.replace(start, **copies)
        self._latents = model.latents(start.sequence).clone()
        self._known = torch.zeros_like(start.orders, dtype=torch.bool)
        # Kept, because its frame holds tensors that the graphs read and write.
        self._steps = ar_steps(model, self._start, config)
        whole = ar_steps(model, self._start, config)
        record = recorder(start.labels.device, lambda: collections.deque(whole, maxlen=0))
        self._graphs = [record(self._advance) for _ in range(config.ar_steps)]

    def _advance(self) -> None:
        """Run the next AR step, and copy its result to where :meth:`replay` reads it."""
        progress = next(self._steps)
        self._latents.copy_(progress.latents)
        self._known.copy_(progress.known)

    def replay(self, start: Start) -> Iterator[Progress]:
        """Yield the progress after each AR step of a generation from ``start``."""
        memory = _tensors(self._start)
        for name, tensor in _tensors(start).items():
            memory[name].copy_(tensor)
        for step, graph in enumerate(self._graphs):
            graph.replay()
            yield Progress(step, len(self._graphs), self._latents.clone(), self._known.clone())


def can_record(device: torch.device) -> bool:
    """Return whether generations on a device can be recorded: on CUDA, outside of streams and autocast.

    A recording's memory is read and written in the order of one stream, the default one. Autocast keeps
    converted weights until its block ends, which would leave graphs that read freed memory.
    """
    if torch.is_autocast_enabled(device.type):
        return False
    return device.type == "cuda" and torch.cuda.current_stream(device) == torch.cuda.default_stream(device)


def recorder(device: torch.device, warm_up: Callable[[], Any]) -> Callable[[Callable[[], None]], Any]:
    """Return a function that records a call as a CUDA graph; all graphs share memory.

    ``warm_up`` runs first, on the stream that records. Libraries create handles per thread and stream, and
    blocks may be compiled for the recording's own tensors. Neither can happen in a recording.
    """
    stream, pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        warm_up()
    torch.cuda.synchronize(device)
    gc.collect()  # nothing is freed while recording
    torch.cuda.empty_cache()

    def record(call: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            # Other threads may allocate memory meanwhile.
            graph.capture_begin(pool, capture_error_mode="thread_local")
            try:
                call()
            finally:
                graph.capture_end()
        return graph

    return record


def _identity(model: FAR) -> Hashable:
    """Return a value that changes if weights move, or modules are replaced."""
    weights = (*model.parameters(), *model.buffers())
    return tuple(map(id, model.modules())), tuple((tensor.data_ptr(), tensor.dtype) for tensor in weights)


def _tensors(start: Start) -> dict[str, Tensor]:
    return {name: value for name, value in vars(start).items() if isinstance(value, Tensor)}
