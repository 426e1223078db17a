"""The demo's page, built and served with gradio.

Fonts, scripts and images come from this process alone. An image is part of the page's text, as a PNG with its
settings: nothing is written to disk or kept between clicks.
"""

import base64
import functools
import html
import math
import secrets
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gradio as gr

from far.demo.drawing import MOST_IMAGES, Frame, Model, Order, draw
from far.errors import InputError
from far.pictures import encode_png, to_pictures

# Length of the queue of clicks. Further clicks are rejected with a message.
MOST_WAITING = 16
# Number of open pages whose state the server keeps.
MOST_SESSIONS = 100

TITLE = "FAR: fast autoregressive image generation"
INTRODUCTION = f"""# {TITLE}
An image is a grid of continuous tokens. At each AR step, the backbone computes conditions for some missing
tokens, and the head draws them."""
WAITING = '<div class="empty">The image appears here.</div>'
THEME = gr.themes.Base(
    primary_hue="indigo",
    neutral_hue="slate",
    font=[gr.themes.Font("system-ui"), gr.themes.Font("sans-serif")],
    font_mono=[gr.themes.Font("ui-monospace"), gr.themes.Font("monospace")],
)
CSS = """
.gradio-container { max-width: 1080px !important; margin: 0 auto; }
.beside { align-self: center; }
.pictures { display: grid; gap: 10px; }
.pictures figure { margin: 0; }
.pictures img { width: 100%; border-radius: 6px; display: block; }
.pictures figcaption {
  display: flex; justify-content: space-between; align-items: center; padding: 2px; font-size: 13px;
}
.status { margin-top: 8px; color: var(--body-text-color-subdued); font-variant-numeric: tabular-nums; }
.status b { color: var(--body-text-color); }
.empty {
  aspect-ratio: 1; border-radius: 6px; background: var(--background-fill-secondary);
  display: grid; place-items: center; color: var(--body-text-color-subdued);
}
#left > *, #right > * { max-width: 400px; margin: 0 auto; }
.verdict { text-align: center; font-size: 20px; min-height: 30px; }
"""


class Demo:
    """The page and its models. The page starts with the first model."""

    def __init__(self, models: Sequence[Model]) -> None:
        self.models = {model.name: model for model in models}
        with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(600, 600)) as self.blocks:
            gr.Markdown(INTRODUCTION)
            with gr.Tab("Generate"):
                self._generate_tab()
            with gr.Tab("Compare"):
                self._compare_tab()

    def launch(self, host: str, port: int) -> str:
        """Serve the page from a new thread and return its address."""
        self.blocks.queue(max_size=MOST_WAITING, default_concurrency_limit=1, api_open=False)
        names = ("inline", "share", "run_history", "enable_monitoring", "ssr_mode", "pwa", "mcp_server")
        options: dict[str, Any] = {"quiet": True, "prevent_thread_lock": True, **dict.fromkeys(names, False)}
        options |= {"footer_links": [], "max_file_size": 0, "state_session_capacity": MOST_SESSIONS}
        return self.blocks.launch(server_name=host, server_port=port, theme=THEME, css=CSS, **options)[1]

    def generate(self, weights: str, label: str, seed: str, count: Any, *sampling: Any) -> Iterator[str]:
        """Yield the images as HTML after each AR step. ``sampling`` are the values of the sampling fields."""
        values = dict(zip(SAMPLING_FIELDS, sampling, strict=True))
        order = Order.of_entries(self.models[weights], label, seed, count, **values)
        for frame in draw(order):
            yield pictures(order, frame)

    def compare(
        self, label: str, seed: str, left: str, left_steps: Any, right: str, right_steps: Any
    ) -> Iterator[tuple[str, str, str]]:
        """Yield the left image, the right image and the verdict as HTML after each AR step."""
        # Check both orders before drawing either.
        sides = ((left, left_steps), (right, right_steps))
        orders = [Order.of_entries(self.models[name], label, seed, head_steps=n) for name, n in sides]
        shown = [WAITING, WAITING]
        seconds = [0.0, 0.0]
        for side, order in enumerate(orders):
            for frame in draw(order):
                shown[side], seconds[side] = pictures(order, frame), frame.seconds
                yield shown[0], shown[1], verdict(orders, seconds) if side == 1 and frame.finished else ""

    def _weights_field(self, model: Model, **options: Any) -> gr.Dropdown:
        return gr.Dropdown(list(self.models), value=model.name, label="Weights", **options)

    def _generate_tab(self) -> None:
        model = next(iter(self.models.values()))
        with gr.Row():
            with gr.Column(scale=2):
                weights = self._weights_field(model)
                label = class_field(model)
                with gr.Row():
                    seed = seed_field()
                    count = gr.Number(1, label="Images", info=f"1 to {MOST_IMAGES}", min_width=100)
                with gr.Row():
                    sampling = sampling_fields(model)
                button = gr.Button("Generate", variant="primary")
            with gr.Column(scale=3):
                shown = gr.HTML(WAITING, elem_id="generated")
        weights.input(self._chosen, [weights, label], [label, *sampling], **AT_ONCE)
        entries = [weights, label, seed, count, *sampling]
        gr.on([button.click, seed.submit], shows_errors(self.generate), entries, shown, **DRAWING)

    def _chosen(self, weights: str, label: str) -> list[gr.components.Component]:
        model = self.models[weights]
        return [class_field(model, label), *sampling_fields(model)]

    def _compare_tab(self) -> None:
        right = next(iter(self.models.values()))
        others = [model for model in self.models.values() if model is not right]
        left = next((model for model in others if model.head == "diffusion"), (others or [right])[0])
        with gr.Row():
            label = class_field(left)
            seed = seed_field()
            button = gr.Button("Compare", variant="primary", elem_classes="beside", min_width=100)
        said = gr.HTML(elem_id="verdict")
        weights, steps, shown = [], [], []
        with gr.Row():
            for side, model in (("left", left), ("right", right)):
                with gr.Column():
                    with gr.Row():
                        weights.append(self._weights_field(model, scale=2, min_width=100))
                        steps.append(head_steps_field(model))
                    shown.append(gr.HTML(WAITING, elem_id=side))
        for names, field in zip(weights, steps):
            names.input(lambda name: head_steps_field(self.models[name]), names, field, **AT_ONCE)
        weights[0].input(
            lambda name, chosen: class_field(self.models[name], chosen), [weights[0], label], label, **AT_ONCE
        )
        entries = [label, seed, weights[0], steps[0], weights[1], steps[1]]
        gr.on([button.click, seed.submit], shows_errors(self.compare), entries, [*shown, said], **DRAWING)


# One drawing at a time. A click during the page's own drawing is handled after it.
DRAWING: dict[str, Any] = {"concurrency_id": "drawing", "concurrency_limit": 1, "trigger_mode": "always_last"}
DRAWING |= {"show_progress": "minimal", "api_visibility": "private"}
AT_ONCE: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}


def class_field(model: Model, chosen: str | None = None) -> gr.Dropdown:
    """Return a field for the class, by name or number. ``chosen`` stays if the model has it."""
    classes = model.pipeline.classes
    value = chosen if chosen in classes else classes[0]
    return gr.Dropdown(classes, value=value, label="Class", allow_custom_value=True, min_width=100)


def seed_field() -> gr.Textbox:
    """Return a text field for a seed with a button for a random one; browsers round numbers over 2⁵³."""
    seed = gr.Textbox("0", label="Seed", info="0 to 2⁶³ − 1", max_lines=1, max_length=20, min_width=100)
    button = gr.Button("Random", size="sm", min_width=70, scale=0, elem_classes="beside")
    button.click(lambda: str(secrets.randbelow(10**6)), None, seed, **AT_ONCE)
    return seed


# The sampling options that have a field, in the order of the page.
SAMPLING_FIELDS = ("guidance", "ar_steps", "head_steps")


def sampling_fields(model: Model) -> list[gr.Number]:
    """Return one field per name in :data:`SAMPLING_FIELDS`, with the model's value and range."""
    defaults, network = model.pipeline.defaults, model.pipeline.model
    learned = network.head.max_guidance
    scales = "1: off" + (f", ≤ {learned:g}: fast" if learned > 1 else "")
    guidance = gr.Number(defaults.guidance, label="Guidance", info=scales, step=0.5, min_width=100)
    tokens, free = network.config.tokens, network.backbone.any_order
    info = f"1 to {tokens}" if free else f"{tokens}: one per token"
    ar_steps = gr.Number(defaults.ar_steps, label="AR steps", info=info, interactive=free, min_width=100)
    return [guidance, ar_steps, head_steps_field(model)]


def head_steps_field(model: Model) -> gr.Number:
    """Return a field for the head steps of a model."""
    most = model.pipeline.model.head.max_steps
    steps, info = model.pipeline.defaults.head_steps_at(0), f"1 to {most}" if most > 1 else "always 1"
    return gr.Number(steps, label="Head steps", info=info, interactive=most > 1, min_width=100)


def pictures(order: Order, frame: Frame) -> str:
    """Return a frame's images and status as HTML. Finished images contain their settings and can be saved."""
    name, figures = html.escape(order.class_name), []
    for picture, seed in zip(to_pictures(frame.images), order.seeds):
        data = encode_png(picture, order.settings(seed) if frame.finished else None)
        address = f"data:image/png;base64,{base64.b64encode(data).decode()}"
        save = f'<a download="{name}-{seed}.png" href="{address}">↓ PNG</a>' if frame.finished else ""
        caption = f"<figcaption><span>seed {seed}</span>{save}</figcaption>"
        figures.append(f'<figure><img src="{address}" alt="{name}">{caption}</figure>')
    columns = f"grid-template-columns: repeat({math.ceil(math.sqrt(len(figures)))}, 1fr)"
    return f'<div class="pictures" style="{columns}">{"".join(figures)}</div>{status(order, frame)}'


def status(order: Order, frame: Frame) -> str:
    """Return seconds, progress and settings of a drawing as HTML."""
    config, progress = order.config, frame.progress
    passes = "one pass" if config.guided_in_head(order.model.pipeline.model) else "two passes"
    parts = [
        f"<b>{frame.seconds:.2f} s</b>",
        f"AR step {progress.step + 1} of {progress.steps}",
        f"{config.head_steps_at(progress.step)} {order.model.head} steps per token",
        "no guidance" if config.guidance == 1 else f"guidance {config.guidance:g} in {passes}",
    ]
    return f'<div class="status">{" · ".join(parts)}</div>'


def verdict(orders: Sequence[Order], seconds: Sequence[float]) -> str:
    """Return which of two orders was faster, as HTML."""
    fast, slow = sorted(range(2), key=lambda side: seconds[side])
    times = [f"{html.escape(orders[side].model.name)} {seconds[side]:.2f} s" for side in (fast, slow)]
    ratio = f"<b>{seconds[slow] / seconds[fast]:.1f} × faster</b>"
    return f'<div class="verdict">{ratio}: {" against ".join(times)}</div>'


def shows_errors(handler: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """Return the generator ``handler``, but with an :class:`InputError` as a message on the page."""

    @functools.wraps(handler)
    def showing(*entries: Any) -> Iterator[Any]:
        try:
            yield from handler(*entries)
        except InputError as error:
            said, title = html.escape(str(error), quote=False), "Please change an entry"
            raise gr.Error(said, title=title, print_exception=False) from None

    return showing
