"""Checks that every head must pass, for the tests of this library and of heads written outside it.

    from far.testing import check_head

    def test_mixture_head():
        check_head(MixtureConfig(width=32, depth=1))

Each function of :data:`HEAD_CHECKS` checks one rule and raises an ``AssertionError`` if the head breaks it.
They do not check the distribution that a head learns: compare that with data whose answer is known.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from far.config import from_dict, to_dict
from far.errors import InputError
from far.heads import HEADS, Condition, Head, HeadConfig, TokenLoss, build_head
from far.model_config import NetworkConfig
from far.seeds import seeded

CHANNELS, WIDTH, IMAGES, TOKENS = 3, 5, 4, 6
# A training step at which every loss term is active.
_LATE = 10**6


def check_head(config: HeadConfig) -> None:
    """Check a registered head of small size against all rules.

    Raises:
        AssertionError: the head breaks a rule.
    """
    for check in HEAD_CHECKS:
        check(config)


def untrained_head(config: HeadConfig, seed: int = 0) -> Head:
    """Return a head with random weights, since those of a new head may output zeros."""
    generator = torch.Generator().manual_seed(seed)
    with seeded(seed):
        head = build_head(config, CHANNELS, WIDTH)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return head.eval()


def check_configuration(config: HeadConfig) -> None:
    """Recipes and ``config.json`` hold the configuration, and refuse keys that it does not have."""
    assert HEADS[config.kind].config_class is type(config), f"register the head of kind {config.kind!r}"
    network = NetworkConfig(head=config)
    assert from_dict(NetworkConfig, to_dict(network), "config.json") == network
    wrong = {"head": {"kind": config.kind, "no_such_key": 1}}
    message = _refused(lambda: from_dict(NetworkConfig, wrong, "a recipe"))
    assert "no_such_key" in message
    assert "samples_per_token" in message


def check_loss(config: HeadConfig) -> None:
    """Check that the loss has one value per token and that its noise comes from the generator alone."""
    head = untrained_head(config)
    loss, again = (_loss(head, head) for _ in range(2))
    assert loss.value.shape == (IMAGES * TOKENS,)
    assert loss.samples.dim() == 1
    assert loss.samples.shape == loss.t.shape
    assert all(term.dim() == 1 and not term.requires_grad for term in (loss.samples, *loss.terms.values()))
    assert all(tensor.isfinite().all() for tensor in (loss.value, loss.samples, *loss.terms.values()))
    assert loss.t.min() >= 0
    assert loss.t.max() <= 1
    assert torch.equal(loss.value, again.value), "the same generator gives the same loss"


def check_gradients(config: HeadConfig) -> None:
    """Check that the loss has gradients for all parameters and the condition, and none for the teacher.

    This holds if the head is its own teacher, as in training, also under autocast to bfloat16.
    """
    head, teacher = untrained_head(config), untrained_head(config, seed=1)
    for provider, autocast in ((teacher, False), (head, True)):
        head.zero_grad()
        z = _normal(IMAGES * TOKENS, WIDTH, seed=1).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = _loss(head, provider, z)
        loss.value.mean().backward()
        for name, parameter in head.named_parameters():
            assert parameter.grad is not None, f"{name} has no gradient"
            assert parameter.grad.isfinite().all(), f"{name} has a gradient that is not finite"
            assert parameter.grad.any(), f"the gradient of {name} is zero"
        assert z.grad is not None
        assert z.grad.any(dim=-1).all(), "every token's condition has a gradient"
    assert all(parameter.grad is None for parameter in teacher.parameters()), "the teacher has a gradient"


@torch.no_grad()
def check_draws(config: HeadConfig) -> None:
    """Check that a draw depends on its condition and noise, not on the batch or earlier draws."""
    head = untrained_head(config)
    z, like = _normal(IMAGES, TOKENS, WIDTH, seed=1), torch.zeros(1)
    for steps in {1, min(3, head.max_steps)}:
        draw = head.sampler(steps, like)
        state = torch.get_rng_state()
        noise = _Noise()
        drawn = draw(Condition(z), noise, 1.0)
        assert noise.calls == head.noise_draws(steps), "noise_draws is the number of calls of normal()"
        assert torch.equal(torch.get_rng_state(), state), "noise comes from normal() alone"
        assert drawn.shape == (IMAGES, TOKENS, CHANNELS)
        assert drawn.isfinite().all()
        assert torch.equal(draw(Condition(z), _Noise(), 1.0), drawn), "a sampler serves many draws"
        assert not torch.isclose(draw(Condition(z + 1), _Noise(), 1.0), drawn).all(), "the condition counts"
        for image in range(IMAGES):
            row = slice(image, image + 1)
            alone = draw(Condition(z[row]), _Noise(row), 1.0)
            torch.testing.assert_close(alone, drawn[row], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def check_temperature(config: HeadConfig) -> None:
    """Draws of one condition differ, and less at a low temperature."""
    head = untrained_head(config)
    draw = head.sampler(min(head.default_steps, 8), torch.zeros(1))
    z = _normal(1, 1, WIDTH, seed=1).expand(IMAGES, 200, WIDTH)
    warm, cold = (draw(Condition(z), _Noise(tokens=200), t).std(dim=1).mean() for t in (1.0, 0.3))
    assert warm > 1e-3
    assert cold < warm


@torch.no_grad()
def check_guidance(config: HeadConfig) -> None:
    """Guidance of scale 1 is off, and another scale counts. A velocity is guided linearly."""
    head = untrained_head(config)
    z, uncond = (_normal(IMAGES, TOKENS, WIDTH, seed=seed) for seed in (1, 2))
    plain = _draw(head, Condition(z))
    torch.testing.assert_close(_draw(head, Condition(z, uncond, 1.0)), plain)
    assert not torch.isclose(_draw(head, Condition(z, uncond, 2.5)), plain).all()
    learned = torch.isclose(_draw(head, Condition(z, scale=1.5)), plain).all()
    assert bool(learned) == (head.max_guidance == 1), "the scale counts without uncond only if it was learned"
    x, t = _normal(IMAGES, TOKENS, CHANNELS, seed=3), torch.linspace(0.1, 0.9, TOKENS).expand(IMAGES, -1)
    if type(head).velocity is Head.velocity:
        _refused(lambda: head.velocity(x, t, Condition(z)))
        return
    conditional, unconditional = (head.velocity(x, t, Condition(c)) for c in (z, uncond))
    assert conditional.shape == x.shape
    torch.testing.assert_close(head.velocity(x, t, Condition(z, uncond, 1.0)), conditional)
    for scale in (2.5, 1 + _normal(IMAGES, TOKENS, 1, seed=0).abs()):
        expected = unconditional + scale * (conditional - unconditional)
        found = head.velocity(x, t, Condition(z, uncond, scale))
        if getattr(config, "token_limit", None) is None:  # a limit clips the guided prediction
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def check_steps(config: HeadConfig) -> None:
    """Numbers of steps out of range are refused in one line that names the number."""
    head = untrained_head(config)
    assert 1 <= head.default_steps <= head.max_steps
    for steps in (1, head.default_steps, head.max_steps):
        head.check_steps(steps)
        head.sampler(steps, torch.zeros(1))
    for steps in (0, -1, head.max_steps + 1):
        assert str(steps) in _refused(lambda: head.check_steps(steps))


@torch.no_grad()
def check_dtypes(config: HeadConfig) -> None:
    """Weights of 16 bits draw tokens in the dtype of the noise; the constructor looks at no values."""
    head = untrained_head(config).to(torch.bfloat16)
    z = _normal(IMAGES, TOKENS, WIDTH, seed=1).to(torch.bfloat16)
    for condition in (Condition(z), Condition(z, -z, 2.0)):
        drawn = _draw(head, condition)
        assert drawn.dtype == torch.float32
        assert drawn.isfinite().all()
    with torch.device("meta"):
        outline = build_head(config, CHANNELS, WIDTH)
    shapes = {name: tensor.shape for name, tensor in outline.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in head.state_dict().items()}


@torch.no_grad()
def check_weights(config: HeadConfig) -> None:
    """Check that the state dictionary holds all that a head draws with, and that drawing keeps it."""
    head, other = untrained_head(config), untrained_head(config, seed=1)
    weights = copy.deepcopy(head.state_dict())
    condition = Condition(_normal(IMAGES, TOKENS, WIDTH, seed=1))
    drawn, _ = _draw(head, condition), _draw(other, condition)
    other.load_state_dict(head.state_dict())
    assert torch.equal(_draw(other, condition), drawn)
    assert all(torch.equal(weights[name], tensor) for name, tensor in head.state_dict().items())


HEAD_CHECKS: tuple[Callable[[HeadConfig], None], ...] = (
    check_configuration, check_loss, check_gradients, check_draws, check_temperature, check_guidance,
    check_steps, check_dtypes, check_weights,
)  # fmt: skip


class _Noise:
    """Standard normal noise of some images of a batch; the same sequence of draws for every instance."""

    def __init__(self, images: slice = slice(None), tokens: int = TOKENS) -> None:
        self.images, self.tokens, self.calls = images, tokens, 0

    def __call__(self) -> Tensor:
        self.calls += 1
        return _normal(IMAGES, self.tokens, CHANNELS, seed=100 + self.calls)[self.images]


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _draw(head: Head, condition: Condition) -> Tensor:
    return head.sampler(min(2, head.max_steps), torch.zeros(1))(condition, _Noise(), 1.0)


def _loss(head: Head, teacher: Head, z: Tensor | None = None) -> TokenLoss:
    x = _normal(IMAGES * TOKENS, CHANNELS, seed=2)
    z = _normal(IMAGES * TOKENS, WIDTH, seed=1) if z is None else z
    uncond = _normal(IMAGES * TOKENS // 2, WIDTH, seed=3) if head.max_guidance > 1 else None
    return head.loss(x, Condition(z, uncond), torch.Generator().manual_seed(0), teacher, _LATE)


def _refused(call: Callable[[], object]) -> str:
    """Return the one line of the InputError that a call raises."""
    try:
        call()
    except InputError as error:
        message = str(error)
    else:
        raise AssertionError("an InputError is expected")
    assert "\n" not in message, "an error is one line"
    return message
