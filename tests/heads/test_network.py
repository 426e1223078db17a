"""Network of all heads. tests/reference compares its values with MAR's."""

import copy
import functools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from far import testing
from far.heads import Condition, HeadConfig
from far.heads.network import HeadNetwork, TimeEmbedding
from far.packing import pack_linear_layers, quantize_linear_layers
from far.testing import untrained_head

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
@pytest.mark.parametrize("shape", [(2, 3, 5), (3, 5)], ids=["two halves", "one"])
@pytest.mark.parametrize("rows", [1, 64, 1000], ids=["one by one", "in parts", "at once"])
def test_network_at_several_times_equals_that_at_each_time(
    network: HeadNetwork, shape: tuple[int, ...], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("far.heads.network._ROWS", rows)
    x, z, _ = inputs(network, *shape)
    x, condition = x.view(-1, 3, 5, CHANNELS)[0], network.embed_condition(z)
    times = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(0))
    products = []
    for layer in (*network.blocks, network.output):
        layer.modulation.register_forward_hook(lambda *_: products.append(1))
    ours = [step(x) for step in network.at_times(condition, times)]
    together = min(6, max(1, rows // condition[..., 0].numel()))
    assert len(products) == math.ceil(6 / together) * 3, "three layers are modulated"
    expected = [network.conditioned(x, condition, time) for time in times]
    assert len(ours) == len(expected)
    for found, value in zip(ours, expected):
        torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-5)
    assert not torch.isclose(ours[0], ours[1]).all(), "the time counts"


@torch.no_grad()
@pytest.mark.parametrize("kind", sorted(HeadConfig.kinds))
def test_draws_equal_those_of_one_time_after_the_other(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    head = untrained_head(HeadConfig.kinds[kind](WIDTH, 2))
    z, uncond = torch.randn(2, 4, 6, testing.WIDTH, generator=torch.Generator().manual_seed(0))
    steps = min(7, head.max_steps)

    def drawn(condition: Condition) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        normal = functools.partial(torch.randn, 4, 6, testing.CHANNELS, generator=generator)
        return head.sampler(steps, z)(condition, normal, 1.0)

    conditions = Condition(z), Condition(z, uncond, 2.5), Condition(z, uncond, 1.0)
    together = [drawn(condition) for condition in conditions]
    monkeypatch.setattr(
        HeadNetwork,
        "at_times",
        lambda self, c, times: (
            functools.partial(self.conditioned, condition=c, time=time) for time in times
        ),
    )
    for found, condition in zip(together, conditions):
        torch.testing.assert_close(found, drawn(condition), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_weights_that_change_between_draws_count(network: HeadNetwork) -> None:
    x, z, _ = inputs(network, 3, 5)
    condition, times = network.embed_condition(z), torch.zeros(2, WIDTH)
    changed = copy.deepcopy(network)
    before = [step(x) for step in changed.at_times(condition, times)]
    for layer in (*changed.blocks, changed.output):
        layer.modulation.weight.mul_(2)
    for found, old in zip(changed.at_times(condition, times), before):
        torch.testing.assert_close(found(x), changed.conditioned(x, condition, times[0]))
        assert not torch.isclose(found(x), old).all()


@torch.no_grad()
@pytest.mark.parametrize(
    "change", [pack_linear_layers, functools.partial(quantize_linear_layers, kernel="paired")]
)
def test_packed_and_8_bit_weights_serve_several_times(change: Callable[[nn.Module], None]) -> None:
    torch.manual_seed(0)
    wide = HeadNetwork(CHANNELS, OUTPUTS, CONDITION, 64, depth=2)
    for parameter in wide.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    if change is pack_linear_layers:
        wide.bfloat16()
    change(wide)
    x, z = torch.randn(4, CHANNELS), torch.randn(2, 4, CONDITION)
    condition, times = wide.embed_condition(z), torch.randn(3, 64).to(wide.dtype)
    for step, time in zip(wide.at_times(condition, times), times):
        expected = wide.conditioned(x, condition, time)
        torch.testing.assert_close(step(x), expected, rtol=0.02, atol=0.02)


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
