"""Network of all heads. tests/reference compares its values with MAR's."""

import math

import pytest
import torch
from torch import Tensor

from far.heads.network import HeadNetwork, TimeEmbedding

CHANNELS, OUTPUTS, CONDITION, WIDTH = 3, 5, 7, 16


@pytest.fixture(scope="module", params=[0, 1, 2])
def network(request: pytest.FixtureRequest) -> HeadNetwork:
    torch.manual_seed(0)
    network = HeadNetwork(CHANNELS, OUTPUTS, CONDITION, WIDTH, depth=2, times=request.param)
    with torch.no_grad():  # freshly initialized, it gives zeros
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return network


def inputs(network: HeadNetwork, *leading: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    torch.manual_seed(1)
    times = [torch.rand(leading) * 1000 for _ in network.time_embeddings]
    return torch.randn(*leading, CHANNELS), torch.randn(*leading, CONDITION), times


@pytest.mark.parametrize("times", [0, 1, 2])
def test_untrained_network_is_zero_and_has_gradients(times: int) -> None:
    torch.manual_seed(0)
    network = HeadNetwork(CHANNELS, OUTPUTS, CONDITION, WIDTH, 2, times)
    x, z, t = inputs(network, 4)
    assert torch.equal(network(x, z, *t), torch.zeros(4, OUTPUTS))
    network(x, z, *t).sum().backward()
    gradient = network.output.linear.weight.grad
    assert gradient is not None
    assert gradient.abs().min() > 0


@torch.no_grad()
def test_every_input_changes_the_output(network: HeadNetwork) -> None:
    x, z, times = inputs(network, 4)
    y = network(x, z, *times)
    assert y.shape == (4, OUTPUTS)
    assert (network(x + 1, z, *times) - y).abs().min() > 1e-4
    assert (network(x, z + 1, *times) - y).abs().min() > 1e-4
    for index in range(len(times)):
        changed = [time + 100 if place == index else time for place, time in enumerate(times)]
        assert (network(x, z, *changed) - y).abs().min() > 1e-4


@torch.no_grad()
def test_embeddings_of_condition_and_times_are_summed(network: HeadNetwork) -> None:
    x, z, times = inputs(network, 4)
    both = network.embed_condition(z)
    for embed, time in zip(network.time_embeddings, times, strict=True):
        both = both + embed(time, torch.float32)
    torch.testing.assert_close(
        network(x, z, *times), network.conditioned(x, both, torch.zeros(4, WIDTH)), rtol=0, atol=1e-5
    )


@torch.no_grad()
def test_conditions_and_times_broadcast_over_samples(network: HeadNetwork) -> None:
    """Noise samples ``[4, 6]`` share conditions ``[6]``, and a time may be a single value."""
    x, z, times = inputs(network, 4, 6)
    shared, numbers = z[0], [time[0, 0] for time in times]
    y = network(x, shared, *numbers)
    whole = network(x, shared.expand(4, 6, -1), *(number.expand(4, 6) for number in numbers))
    torch.testing.assert_close(y, whole, rtol=0, atol=1e-5)
    rows = network(x.flatten(0, 1), z.flatten(0, 1), *(t.flatten() for t in times))
    torch.testing.assert_close(network(x, z, *times).flatten(0, 1), rows, rtol=0, atol=1e-5)


def test_wrong_number_of_times_is_refused(network: HeadNetwork) -> None:
    x, z, times = inputs(network, 4)
    with pytest.raises(ValueError):
        network(x, z, *times, torch.zeros(4))


@torch.no_grad()
def test_time_embedding_has_the_published_frequencies() -> None:
    """128 cosines, then 128 sines, of frequencies from 1 geometrically down to just above 1e-4."""
    embedding = TimeEmbedding(256)
    embedding.linear_in.weight.copy_(torch.eye(256))
    embedding.linear_out.weight.copy_(torch.eye(256))
    for bias in (embedding.linear_in.bias, embedding.linear_out.bias):
        bias.zero_()
    for time in (0.0, 1.0, 437.5, 1000.0):
        angles = [time * 10_000 ** (-index / 128) for index in range(128)]
        waves = [math.cos(angle) for angle in angles] + [math.sin(angle) for angle in angles]
        expected = torch.tensor([wave / (1 + math.exp(-wave)) for wave in waves])
        torch.testing.assert_close(embedding(torch.tensor(time), torch.float32), expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_weights_in_bfloat16_give_nearly_the_same_output(network: HeadNetwork) -> None:
    x, z, times = inputs(network, 4)
    low = HeadNetwork(CHANNELS, OUTPUTS, CONDITION, WIDTH, 2, len(times)).bfloat16()
    low.load_state_dict(network.state_dict())
    y = low(x, z, *times)
    assert y.dtype == torch.bfloat16
    # Times stay in float32 until they are embedded: steps of 1000 · 1/128 would vanish in bfloat16.
    torch.testing.assert_close(y.float(), network(x, z, *times), rtol=0.1, atol=0.1)
