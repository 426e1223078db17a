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
from pathlib import Path
from typing import Any

import gradio as gr

from far.demo.drawing import MOST_IMAGES, Frame, Model, Order, draw, redraw
from far.demo.editor import PNG_ADDRESS, editor, empty, opened
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
CSS = Path(__file__).with_suffix(".css").read_text(encoding="utf-8")


class Demo:
    """The page and its models. The page starts with the first model."""

    def __init__(self, models: Sequence[Model]) -> None:
        self.models = {model.name: model for model in models}
        with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(600, 600)) as self.blocks:
            gr.Markdown(INTRODUCTION)
            with gr.Tab("Generate"):
                self._generate_tab()
            with gr.Tab("Edit"):
                self._edit_tab()
            with gr.Tab("Heads"):
                self._compare_tab("heads", "diffusion", head_steps_field, self.compare_heads)
            with gr.Tab("Backbones"):
                self._compare_tab("backbones", "causal", ar_steps_field, self.compare_backbones)

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

    def new_picture(self, weights: str, label: str, seed: str, *sampling: Any) -> Iterator[dict[str, Any]]:
        """Yield the editor's value after each AR step of a new picture."""
        model = self.models[weights]
        order = Order.of_entries(model, label, seed, **dict(zip(EDIT_FIELDS, sampling, strict=True)))
        for frame in draw(order):
            yield {**empty(model), **edited(order, frame, "")}

    def redraw(
        self, weights: str, label: str, seed: str, guidance: Any, head_steps: Any, value: Any
    ) -> Iterator[dict[str, Any]]:
        """Yield the editor's value after each AR step that redraws the marked tokens."""
        model = self.models[weights]
        image, marked = opened(value, model)
        order = Order.of_entries(model, label, seed, guidance=guidance, head_steps=head_steps)
        order, frames = redraw(order, image, marked)
        for frame in frames:
            changed = edited(order, frame, value["whole"], marked)
            yield {**empty(model), "marked": marked, "drawn": True, **changed}

    def compare_heads(self, *entries: Any) -> Iterator[tuple[str, str, str]]:
        """Yield what :meth:`_compare` yields, with the head steps of both sides."""
        yield from self._compare("head_steps", *entries)

    def compare_backbones(self, *entries: Any) -> Iterator[tuple[str, str, str]]:
        """Yield what :meth:`_compare` yields, with the AR steps of both sides."""
        yield from self._compare("ar_steps", *entries)

    def _compare(
        self, option: str, label: str, seed: str, left: str, left_steps: Any, right: str, right_steps: Any
    ) -> Iterator[tuple[str, str, str]]:
        """Yield the left image, the right image and the verdict as HTML after each AR step."""
        # Check both orders before drawing either.
        sides = ((left, left_steps), (right, right_steps))
        orders = [Order.of_entries(self.models[name], label, seed, **{option: n}) for name, n in sides]
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
                button, stop = start_and_stop("Generate")
            with gr.Column(scale=3):
                shown = gr.HTML(WAITING, elem_id="generated")
        weights.input(self._chosen, [weights, label], [label, *sampling], **AT_ONCE)
        entries = [weights, label, seed, count, *sampling]
        drawing = gr.on([button.click, seed.submit], shows_errors(self.generate), entries, shown, **DRAWING)
        stop.click(None, cancels=drawing, **AT_ONCE)

    def _chosen(self, weights: str, label: str) -> list[gr.components.Component]:
        model = self.models[weights]
        return [class_field(model, label), *sampling_fields(model)]

    def _edit_tab(self) -> None:
        model = next(iter(self.models.values()))
        with gr.Row():
            with gr.Column(scale=2):
                weights = self._weights_field(model)
                label = class_field(model)
                with gr.Row():
                    seed = seed_field()
                with gr.Row():
                    sampling = [guidance_field(model), head_steps_field(model)]
                new = gr.Button("New picture")
                button, stop = start_and_stop("Redraw marked parts")
                gr.Markdown(
                    "Mark parts with the pointer, or with Tab and Space. They are redrawn as the class."
                )
            with gr.Column(scale=3):
                shown = editor(model)
        fields = [label, *sampling]
        weights.input(self._chosen_to_edit, [weights, label], [*fields, shown], **AT_ONCE)
        entries = [weights, label, seed, *sampling]
        started: list[dict[str, Any]] = [
            new.click(shows_errors(self.new_picture), entries, shown, **DRAWING),
            button.click(shows_errors(self.redraw), [*entries, shown], shown, **DRAWING),
        ]
        stop.click(None, cancels=started, **AT_ONCE)

    def _chosen_to_edit(self, weights: str, label: str) -> list[Any]:
        model = self.models[weights]
        return [class_field(model, label), guidance_field(model), head_steps_field(model), empty(model)]

    def _compare_tab(
        self,
        name: str,
        other: str,
        steps_field: Callable[[Model], gr.Number],
        compare: Callable[..., Iterator[tuple[str, str, str]]],
    ) -> None:
        """Add fields and two images. The left model has another kind, ``other`` if possible."""
        right = next(iter(self.models.values()))
        kinds = {model: model.kinds[name] for model in self.models.values()}
        others = [model for model, kind in kinds.items() if kind != kinds[right]]
        left = next((model for model in others if kinds[model] == other), (others or [right])[0])
        with gr.Row():
            label = class_field(left)
            seed = seed_field()
            button, stop = start_and_stop("Compare")
        said = gr.HTML(elem_id=f"{name}-verdict")
        weights, steps, shown = [], [], []
        with gr.Row():
            for side, model in (("left", left), ("right", right)):
                with gr.Column(min_width=300):
                    with gr.Row():
                        weights.append(self._weights_field(model, scale=2, min_width=100))
                        steps.append(steps_field(model))
                    shown.append(gr.HTML(WAITING, elem_id=f"{name}-{side}", elem_classes="side"))
        for names, field in zip(weights, steps):
            names.input(lambda chosen: steps_field(self.models[chosen]), names, field, **AT_ONCE)
        weights[0].input(
            lambda name, chosen: class_field(self.models[name], chosen), [weights[0], label], label, **AT_ONCE
        )
        entries = [label, seed, weights[0], steps[0], weights[1], steps[1]]
        starts, outputs = [button.click, seed.submit], [*shown, said]
        stop.click(None, cancels=gr.on(starts, shows_errors(compare), entries, outputs, **DRAWING), **AT_ONCE)


# One drawing at a time. A click during the page's own drawing is handled after it.
DRAWING: dict[str, Any] = {"concurrency_id": "drawing", "concurrency_limit": 1, "trigger_mode": "always_last"}
DRAWING |= {"show_progress": "minimal", "api_visibility": "private"}
AT_ONCE: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}


def start_and_stop(name: str) -> tuple[gr.Button, gr.Button]:
    """Return a button that starts drawing, and one that ends it after the AR step that is being computed."""
    with gr.Row(elem_classes="beside"):
        start = gr.Button(name, variant="primary", min_width=100)
        return start, gr.Button("Stop", variant="stop", min_width=60, scale=0)


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
EDIT_FIELDS = ("guidance", "head_steps")


def sampling_fields(model: Model) -> list[gr.Number]:
    """Return one field per name in :data:`SAMPLING_FIELDS`, with the model's value and range."""
    return [guidance_field(model), ar_steps_field(model), head_steps_field(model)]


def guidance_field(model: Model) -> gr.Number:
    """Return a field for the guidance scale of a model."""
    learned = model.pipeline.model.head.max_guidance
    scales = "1: off" + (f", ≤ {learned:g}: fast" if learned > 1 else "")
    value = model.pipeline.defaults.guidance
    return gr.Number(value, label="Guidance", info=scales, step=0.5, min_width=100)


def ar_steps_field(model: Model) -> gr.Number:
    """Return a field for the AR steps of a model."""
    network = model.pipeline.model
    tokens, free = network.config.tokens, network.backbone.any_order
    info = f"1 to {tokens}" if free else f"{tokens}: one per token"
    value = model.pipeline.defaults.ar_steps
    return gr.Number(value, label="AR steps", info=info, interactive=free, min_width=100)


def head_steps_field(model: Model) -> gr.Number:
    """Return a field for the head steps of a model."""
    most = model.pipeline.model.head.max_steps
    steps, info = model.pipeline.defaults.head_steps_at(0), f"1 to {most}" if most > 1 else "always 1"
    return gr.Number(steps, label="Head steps", info=info, interactive=most > 1, min_width=100)


def pictures(order: Order, frame: Frame) -> str:
    """Return a frame's images and status as HTML. Finished images contain their settings and can be saved."""
    name, figures = html.escape(order.class_name), []
    for address, seed in zip(addresses(order, frame), order.seeds):
        save = f'<a download="{name}-{seed}.png" href="{address}">↓ PNG</a>' if frame.finished else ""
        caption = f"<figcaption><span>seed {seed}</span>{save}</figcaption>"
        figures.append(f'<figure><img src="{address}" alt="{name}">{caption}</figure>')
    columns = f"grid-template-columns: repeat({math.ceil(math.sqrt(len(figures)))}, 1fr)"
    return f'<div class="pictures" style="{columns}">{"".join(figures)}</div>{status(order, frame)}'


def addresses(order: Order, frame: Frame, **further: object) -> list[str]:
    """Return a frame's images as PNGs in data URLs. Finished ones contain their settings, and ``further``."""
    settings = [{**order.settings(seed), **further} if frame.finished else None for seed in order.seeds]
    files = [encode_png(*pair) for pair in zip(to_pictures(frame.images), settings)]
    return [PNG_ADDRESS + base64.b64encode(file).decode() for file in files]


def edited(order: Order, frame: Frame, before: str, marked: Sequence[int] = ()) -> dict[str, str]:
    """Return the entries of the editor's value that a frame changes.

    ``before`` is the data URL of the picture whose tokens ``marked`` are redrawn, or ``""``.
    """
    (address,) = addresses(order, frame, **({"redrawn": list(marked)} if marked else {}))
    download = f"{html.escape(order.class_name)}-{order.seeds[0]}.png" if frame.finished else ""
    whole = address if frame.finished else before
    return {"picture": address, "whole": whole, "download": download, "status": status(order, frame)}


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
