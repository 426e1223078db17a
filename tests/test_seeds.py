"""Streams of far.seeds against numpy's Mersenne Twister, and that no two keys share one."""

import itertools
import random

import numpy as np
import pytest
import torch

from far.config import check_seed
from far.errors import InputError
from far.sampling import SeededNoise
from far.seeds import seed_all, seeded, seeded_generator


def first_numbers(generator: torch.Generator) -> tuple[int, ...]:
    return tuple(torch.randint(0, 2**62, (4,), generator=generator).tolist())


@pytest.mark.parametrize("seed", [0, 1, 7, 2**31, 2**32 - 1])
def test_small_seeds_give_torchs_own_stream(seed: int) -> None:
    assert first_numbers(seeded_generator(seed)) == first_numbers(torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("number", "seed"), [(2**32, 0), (7 + 2**40, 0), (2**63 - 1, 0), (5, 3), (2**62 + 5, 2**32)]
)
def test_larger_keys_give_the_stream_of_the_published_initialization(number: int, seed: int) -> None:
    generator = seeded_generator(number, seed)
    twister = np.random.RandomState(
        [number % 2**32, number >> 32, seed % 2**32, seed >> 32]
    )  # numpy's init_by_array
    ours = torch.randint(0, 2**20, (2000,), generator=generator).tolist()
    # torch takes the lower bits of one output of 32 bits.
    assert ours == [number % 2**20 for number in twister.randint(0, 2**32, 2000, dtype=np.uint32).tolist()]


def test_state_survives_being_saved_and_normal_numbers_are_normal() -> None:
    generator = seeded_generator(2**62 + 1, 3)
    numbers = torch.randn(200_000, generator=generator)
    assert abs(float(numbers.mean())) < 0.01
    assert abs(float(numbers.std()) - 1) < 0.01
    copy = torch.Generator()
    copy.set_state(generator.get_state())
    assert first_numbers(copy) == first_numbers(generator)


def test_no_two_of_many_structured_keys_share_a_stream() -> None:
    near = [0, 1, 2, 3, 1_000_003, 2_000_006, 2**31, 2**32 - 1]
    numbers = [number + k * 2**32 for number in near for k in (0, 1, 2, 255, 2**20, 2**30, 2**31 - 1)]
    draw = random.Random(0)
    numbers += [draw.randrange(2**63) for _ in range(50)] + [
        3 + 2 * 2**32
    ]  # [3, 2] and [3, 2, 1] are one key of init_by_array
    seeds = [0, 1, 2, 1_000_003, 2**32, 2**32 + 1, 2**40, 2**63 - 1]
    streams = {
        first_numbers(seeded_generator(number, seed))
        for number, seed in itertools.product(set(numbers), seeds)
    }
    assert len(streams) == len(set(numbers)) * len(seeds)


def test_noise_of_seeds_that_differ_above_32_bits_differs() -> None:
    noise = SeededNoise([7, 7 + 2**32, 7 + 2**40, 7 + 2**62], torch.device("cpu"))
    orders, normal = noise.orders(64), noise.normals([3], 4)[0]
    for one, other in itertools.combinations(range(4), 2):
        assert not torch.equal(orders[one], orders[other])
        assert not torch.equal(normal[one], normal[other])


def test_default_generators_are_functions_of_both_numbers() -> None:
    with torch.random.fork_rng(devices=[]):
        found = []
        for number, seed in ((5, 0), (5, 1), (5 + 2**32, 0), (5 + 1_000_003, 0), (5, 0)):
            seed_all(number, seed)
            found.append((tuple(torch.rand(3).tolist()), torch.initial_seed()))
        assert found[0] == found[4]
        assert len(set(found)) == 4
        assert len({initial for _, initial in found}) == 4  # what other devices are seeded with
        torch.manual_seed(5)
        assert tuple(torch.rand(3).tolist()) == found[0][0]


def test_weights_depend_on_all_bits_of_their_seed_and_leave_the_default_generator() -> None:
    def weights(seed: int) -> torch.Tensor:
        with seeded(seed):
            return torch.nn.Linear(4, 4).weight.detach()

    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(1 + 2**32))
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seed_out_of_range_is_named(seed: int) -> None:
    with pytest.raises(InputError, match=str(seed)) as error:
        check_seed("seed", seed)
    assert "\n" not in str(error.value)
