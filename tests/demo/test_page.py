"""The demo's page in a real browser, served by its own process, and its queue over HTTP."""

import base64
import contextlib
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from far.cli.main import main
from far.demo.drawing import load_models
from far.demo.page import MOST_WAITING, Demo
from far.sampling import Kept, Progress

PATIENCE = 120  # seconds; nothing here waits for long on a machine that is free
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
)
# Imported first by the server's process: records every address that it looks up or connects to.
AUDIT = """
import sys
log = open({log!r}, "a", buffering=1)
def note(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        log.write(repr((event, arguments[1] if event == "socket.connect" else arguments[0])) + chr(10))
sys.addaudithook(note)
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    def __init__(self, weights: list[str], folder: Path) -> None:
        (folder / "sitecustomize.py").write_text(AUDIT.format(log=str(folder / "audit.log")))
        self.port, self.audit = free_port(), folder / "audit.log"
        path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, "-m", "far", "demo", "--weights", *weights, "--port", str(self.port)]
        self.process = subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": path, "HTTP_PROXY": "http://127.0.0.1:9"},  # nobody listens
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self.process.stdout is not None
        said = []
        for line in self.process.stdout:
            said.append(line)
            if line == f"far demo: {self.address}/ (Ctrl-C ends it)\n":
                return
            if line.startswith("far demo:"):
                break
        pytest.fail("".join([*said, self.stop()]))

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def stop(self) -> str:
        self.process.terminate()
        output, _ = self.process.communicate(timeout=PATIENCE)
        return output


@pytest.fixture(scope="module")
def server(
    pipeline_folder: Path,
    diffusion_folder: Path,
    causal_diffusion_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Server]:
    folders = [pipeline_folder, diffusion_folder, causal_diffusion_folder]
    server = Server(["avatars-64", *map(str, folders)], tmp_path_factory.mktemp("server"))
    yield server
    assert "Traceback" not in server.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        program = shutil.which("chromium") or playwright.chromium.executable_path
        if not Path(program).exists():
            reason = (
                "no Chromium for the browser tests: apt-get install chromium, or playwright install chromium"
            )
            pytest.fail(reason) if os.environ.get("FAR_REQUIRE_BROWSER") == "1" else pytest.skip(reason)
        expect.set_options(timeout=PATIENCE * 1000)  # 5 s are not enough on a busy machine
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS.split())
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, server: Server) -> Iterator[Page]:
    context = browser.new_context(accept_downloads=True, viewport={"width": 1200, "height": 1000})
    context.set_default_timeout(PATIENCE * 1000)
    page = context.new_page()
    page.goto(server.address)
    expect(page.locator("#generated .empty")).to_be_visible(timeout=PATIENCE * 1000)
    yield page
    context.close()


def choose(page: Page, field: str, value: str) -> None:
    page.get_by_label(field).first.click()
    page.get_by_role("option", name=value, exact=True).click()


def enter(page: Page, **entries: str) -> None:
    for field, value in entries.items():
        page.get_by_label(field.replace("_", " ")).first.fill(value)


def click(page: Page | Locator, button: str = "Generate") -> None:
    page.get_by_role("button", name=button, exact=True).click()


def open_tab(page: Page, name: str) -> Locator:
    page.get_by_role("tab", name=name).click()
    return page.get_by_role("tabpanel")  # hidden ones have no role


def saved(page: Page, link: str = "#generated a[download]", nth: int = 0) -> Image.Image:
    with page.expect_download() as download:
        page.locator(link).nth(nth).click()
    return Image.open(download.value.path())


def difference(a: Image.Image, b: Image.Image) -> float:
    return float(np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).mean())


def test_an_image_appears_step_by_step_and_is_the_one_that_generate_draws(page: Page, tmp_path: Path) -> None:
    page.evaluate("""() => {
        const place = document.querySelector("#generated");
        window.seen = [];
        new MutationObserver(() => {
            const address = place.querySelector("img")?.src;
            if (address && address !== window.seen.at(-1)) window.seen.push(address);
        }).observe(place, {subtree: true, childList: true, attributes: true, characterData: true});
    }""")
    choose(page, "Class", "planets")
    enter(page, Seed="7", Guidance="2.5", Head_steps="4")
    click(page)
    picture = saved(page)
    options = ["--labels", "planets", "--seed", "7", "--guidance", "2.5", "--head-steps", "4"]
    assert main(["generate", "--weights", "avatars-64", *options, "--out", str(tmp_path / "folder")]) == 0
    reference = Image.open(tmp_path / "folder" / "000000.png")
    assert picture.text == reference.text  # type: ignore[attr-defined]
    assert difference(picture, reference) < 0.5
    seen = [
        Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2])))
        for address in page.evaluate("window.seen")
    ]
    assert len(seen) >= 4
    gray = [float((np.asarray(image) == 128).all(axis=-1).mean()) for image in seen]
    assert gray[0] > 0.5
    assert gray == sorted(gray, reverse=True)
    assert re.match(r"\d+\.\d\d s · AR step 16 of 16", page.locator("#generated .status").inner_text())


def test_other_weights_set_classes_and_ranges(page: Page, pipeline_folder: Path, tmp_path: Path) -> None:
    panel = page.get_by_role("tabpanel")
    expect(panel.get_by_text("1 to 16", exact=True)).to_have_count(2)  # images and AR steps
    choose(page, "Weights", str(pipeline_folder))
    expect(panel.get_by_text("1 to 4", exact=True)).to_be_visible()
    expect(page.get_by_label("AR steps").first).to_have_value("4")
    expect(page.get_by_label("Class").first).to_have_value("circle")
    choose(page, "Class", "stripes")
    enter(page, Seed="3", Images="3")
    click(page)
    expect(page.locator("#generated a[download]")).to_have_count(3)
    assert (
        main(
            [
                "generate",
                "--weights",
                str(pipeline_folder),
                "--labels",
                "2",
                "--seed",
                "5",
                "--out",
                str(tmp_path / "folder"),
            ]
        )
        == 0
    )
    third, reference = saved(page, nth=2), Image.open(tmp_path / "folder" / "000000.png")
    assert third.text == reference.text  # type: ignore[attr-defined]
    assert difference(third, reference) < 0.5
    assert difference(third, saved(page, nth=1)) > 5


def test_wrong_entries_are_messages_on_the_page_and_the_server_continues(page: Page) -> None:
    wrong = [
        ("Seed", "-1", "-1", "0"),
        ("Seed", str(2**63), str(2**63), "0"),
        ("Seed", "", "seed is empty", "0"),
        ("Seed", "<b>7</b>", "seed is '<b>7</b>'", "0"),
        ("Guidance", "", "guidance is empty", "2"),
        ("AR steps", "17", "ar_steps 17", "16"),
        ("Head steps", "0", "head_steps 0", "1"),
        ("Images", "17", "images 17", "1"),
        ("Class", "hexagon", "'hexagon'", "clay"),
    ]
    for field, value, sentence, right in wrong:
        page.get_by_label(field).first.fill(value)
        page.get_by_label(field).first.press("Tab")
        click(page)
        message = page.get_by_test_id("toast-body").filter(has_text=sentence)
        expect(message).to_be_visible(timeout=PATIENCE * 1000)
        message.get_by_test_id("toast-close").click()
        page.get_by_label(field).first.fill(right)
        page.get_by_label(field).first.press("Tab")
    click(page)
    assert saved(page).text["class"] == "clay"  # type: ignore[attr-defined]


def test_two_models_draw_side_by_side(page: Page, pipeline_folder: Path, diffusion_folder: Path) -> None:
    compare = open_tab(page, "Heads")
    weights = compare.get_by_label("Weights")
    expect(weights.first).to_have_value(
        str(diffusion_folder)
    )  # MAR's head against the first weights, to begin with
    expect(weights.last).to_have_value("avatars-64")
    expect(compare.get_by_label("Class")).to_have_value("circle")
    weights.last.click()
    page.get_by_role("option", name=str(pipeline_folder), exact=True).click()
    expect(compare.get_by_label("Head steps").last).to_have_value("2")
    compare.get_by_label("Seed").fill("11")
    compare.get_by_label("Head steps").first.fill("50")
    click(compare, "Compare")
    verdict = page.locator("#heads-verdict .verdict").inner_text()
    left, right = saved(page, "#heads-left a[download]"), saved(page, "#heads-right a[download]")
    assert (left.text["weights"], right.text["weights"]) == (str(diffusion_folder), str(pipeline_folder))  # type: ignore[attr-defined]
    assert (left.text["head_steps"], right.text["head_steps"]) == ("50", "2")  # type: ignore[attr-defined]
    assert left.text["seed"] == right.text["seed"] == "11"  # type: ignore[attr-defined]
    assert left.text["class"] == right.text["class"]  # type: ignore[attr-defined]
    times = {side: page.locator(f"#heads-{side} .status b").inner_text() for side in ("left", "right")}
    found = re.fullmatch(r"(\d+\.\d) × faster: (\S+) (\d+\.\d\d s) against (\S+) (\d+\.\d\d s)", verdict)
    assert found is not None, verdict
    assert found.groups()[1:] == (str(pipeline_folder), times["right"], str(diffusion_folder), times["left"])
    assert float(found[1]) > 1


def test_backbones_are_compared_at_their_ar_steps(
    page: Page, causal_diffusion_folder: Path, diffusion_folder: Path
) -> None:
    compare = open_tab(page, "Backbones")
    weights, steps = compare.get_by_label("Weights"), compare.get_by_label("AR steps")
    expect(weights.first).to_have_value(str(causal_diffusion_folder))  # against the first weights' backbone
    expect(weights.last).to_have_value("avatars-64")
    expect(steps.first).to_be_disabled()  # one step per token
    weights.last.click()
    page.get_by_role("option", name=str(diffusion_folder), exact=True).click()
    expect(steps.last).to_have_value("4")  # those of the weights, which arrive after the choice
    steps.last.fill("2")
    click(compare, "Compare")
    left, right = (saved(page, f"#backbones-{side} a[download]") for side in ("left", "right"))
    assert (left.text["ar_steps"], right.text["ar_steps"]) == ("4", "2")  # type: ignore[attr-defined]
    expect(page.locator("#backbones-verdict")).to_contain_text("faster")


def editor_picture(page: Page) -> Image.Image:
    address = page.locator("#editor img").get_attribute("src") or ""
    return Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2])))


def test_marked_parts_of_a_picture_are_redrawn(page: Page) -> None:
    edit = open_tab(page, "Edit")
    click(edit, "Redraw marked parts")
    message = page.get_by_test_id("toast-body").filter(has_text="picture")
    expect(message).to_be_visible(timeout=PATIENCE * 1000)
    edit.get_by_label("Seed").fill("3")
    click(edit, "New picture")
    first = saved(page, "#editor a[download]")
    assert (first.text["seed"], first.text["class"]) == ("3", "critters")  # type: ignore[attr-defined]
    token = page.locator("#editor [data-token]")
    assert token.count() == 16
    start, end = (token.nth(number).bounding_box() for number in (4, 6))
    assert start is not None
    assert end is not None
    page.mouse.move(start["x"] + 9, start["y"] + 9)  # a stroke over three parts
    page.mouse.down()
    page.mouse.move(end["x"] + 9, end["y"] + 9, steps=20)
    page.mouse.up()
    token.nth(4).click()  # unmarks it
    token.nth(7).focus()
    page.keyboard.press("Space")
    marked = page.locator("#editor [data-token][aria-pressed=true]")
    expect(marked).to_have_count(3)
    page.evaluate("document.querySelector('#editor a[download]').remove()")  # wait for that of the edit
    edit.get_by_label("Seed").fill("5")
    click(edit, "Redraw marked parts")
    second = saved(page, "#editor a[download]")
    assert (second.text["seed"], second.text["redrawn"]) == ("5", "[5, 6, 7]")  # type: ignore[attr-defined]
    changes = np.abs(np.asarray(second).astype(int) - np.asarray(first)).max(axis=2)
    tokens = changes.reshape(4, 16, 4, 16)[:, 4:12, :, 4:12].max(axis=(1, 3)).flatten()  # without the seams
    assert np.flatnonzero(tokens).tolist() == [5, 6, 7]
    expect(marked).to_have_count(3)  # to redraw them once more


def test_visitors_image_is_opened_in_the_browser_alone(page: Page, server: Server, tmp_path: Path) -> None:
    edit = open_tab(page, "Edit")
    uploads: list[str] = []
    page.on("request", lambda request: uploads.append(request.url) if "upload" in request.url else None)
    pixels = np.zeros((96, 160, 3), dtype=np.uint8)
    pixels[:, 32:128] = (200, 40, 90)  # the middle, which the crop keeps
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    edit.get_by_label("Open an image").set_input_files(tmp_path / "wide.png")
    expect(page.locator("#editor img")).to_be_visible()
    picture = np.asarray(editor_picture(page).convert("RGB")).astype(int)
    assert picture.shape == (64, 64, 3)
    assert np.abs(picture - [200, 40, 90]).max() <= 2
    (tmp_path / "broken.png").write_bytes(b"no image")
    edit.get_by_label("Open an image").set_input_files(tmp_path / "broken.png")
    expect(page.locator("#editor [role=status]")).to_contain_text("cannot open")
    click(edit, "Mark all")
    expect(page.locator("#editor [aria-pressed=true]")).to_have_count(16)
    click(edit, "Unmark all")
    page.locator("#editor [data-token='15']").click()
    click(edit, "Redraw marked parts")
    edited = np.asarray(saved(page, "#editor a[download]")).astype(int)
    assert np.array_equal(edited[:40, :40], picture[:40, :40])
    assert uploads == []


def test_page_fits_a_phone(browser: Browser, server: Server) -> None:
    context = browser.new_context(viewport={"width": 400, "height": 800}, has_touch=True)
    page = context.new_page()
    page.goto(server.address)
    expect(page.locator("#generated .empty")).to_be_visible(timeout=PATIENCE * 1000)
    for name in ("Generate", "Edit", "Heads", "Backbones"):
        tab = open_tab(page, name)
        expect(tab.get_by_role("button", name="Stop")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= 400, name
        for button in tab.get_by_role("button").all():
            box = button.bounding_box()
            assert box is None or box["x"] + box["width"] <= 400
    context.close()


def test_nothing_leaves_the_machine(page: Page, server: Server) -> None:
    requested: list[str] = []
    page.on("request", lambda request: requested.append(request.url))
    page.reload()
    click(page)
    expect(page.locator("#generated a[download]")).to_have_count(1, timeout=PATIENCE * 1000)
    compare = open_tab(page, "Heads")
    compare.get_by_label("Weights").first.click()
    page.get_by_role("option", name="avatars-64", exact=True).click()
    expect(compare.get_by_label("Class")).to_have_value("critters")  # the classes are those of the left model
    click(compare, "Compare")
    expect(page.locator("#heads-verdict .verdict")).to_be_visible(timeout=PATIENCE * 1000)
    page.wait_for_load_state("networkidle")
    others = {
        url
        for url in requested
        if urlsplit(url).scheme != "data" and urlsplit(url).netloc != urlsplit(server.address).netloc
    }
    assert len(requested) > 10
    assert not others
    lines = server.audit.read_text().splitlines()
    assert lines  # gradio checks that its own server responds
    assert not [line for line in lines if "127.0.0.1" not in line and "localhost" not in line]


def test_only_this_machine_is_served(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE):
        pass
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.2", server.port), timeout=5)


def test_server_neither_accepts_nor_serves_files(server: Server) -> None:
    url = f"{server.address}/gradio_api"
    assert httpx.post(f"{url}/upload", files={"files": ("a.txt", b"a")}, timeout=PATIENCE).status_code == 413
    for path in (Path(__file__), Path("pyproject.toml").absolute()):
        assert httpx.get(f"{url}/file={path}", timeout=PATIENCE).status_code == 403
    assert httpx.get(f"{url}/info", timeout=PATIENCE).json() == {
        "named_endpoints": {},
        "unnamed_endpoints": {},
    }
    assert httpx.get(f"{server.address}/monitoring", timeout=PATIENCE).status_code == 403


class Visitor:
    """Do what the page does when a button is clicked: join the queue and read the stream of messages."""

    def __init__(self, address: str, function: int, entries: list[object]) -> None:
        self.session = f"visitor-{id(self)}"
        self.url = f"{address}gradio_api/queue"
        body = {"data": entries, "fn_index": function, "session_hash": self.session}
        self.answer = httpx.post(f"{self.url}/join", json=body, timeout=PATIENCE)

    @contextlib.contextmanager
    def messages(self) -> Iterator[Iterator[str]]:
        """The kinds of messages as they come in; leaving is closing the browser's tab."""
        with httpx.stream(
            "GET", f"{self.url}/data", params={"session_hash": self.session}, timeout=PATIENCE
        ) as response:
            yield (json.loads(line[5:])["msg"] for line in response.iter_lines() if line.startswith("data:"))


class Endless:
    """A model's stream that continues until it is closed."""

    def __init__(self) -> None:
        self.running, self.most, self.closed = 0, 0, threading.Semaphore(0)
        self.kept: list[Kept] = []

    def __call__(
        self, pipeline: object, labels: list[int], seeds: list[int], config: object, kept: Kept | None = None
    ) -> Iterator[Progress]:
        first = next(STREAM(pipeline, labels, seeds, config, kept=kept))
        self.kept += [kept] if kept else []
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            while True:
                yield first
                time.sleep(0.05)  # or the browser has no time for clicks
        finally:
            self.running -= 1
            self.closed.release()


STREAM = load_models.__globals__["Pipeline"].stream


@pytest.fixture
def endless(
    pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Endless, str, dict[str, tuple[int, list[object]]]]]:
    """Serve a page whose drawings do not end, and return how to request one on each tab."""
    (model,) = load_models([str(pipeline_folder)], "float32", "cpu")
    demo, stream = Demo([model]), Endless()
    monkeypatch.setattr(type(model.pipeline), "stream", lambda *given, **named: stream(*given, **named))
    address = demo.launch("127.0.0.1", free_port())
    functions = {function.name: number for number, function in demo.blocks.fns.items()}
    yield (
        stream,
        address,
        {
            "generate": (functions["generate"], [model.name, "circle", "0", 1, 2, 4, 2]),
            "compare": (functions["compare_heads"], ["circle", "0", model.name, 2, model.name, 2]),
        },
    )
    demo.blocks.close(verbose=False)


def test_one_drawing_at_a_time_and_a_closed_page_stops_its_own(endless: tuple) -> None:
    stream, address, functions = endless
    first, second = Visitor(address, *functions["generate"]), Visitor(address, *functions["compare"])
    with second.messages() as queued:
        assert next(queued) == "estimation"
        with first.messages() as drawing:
            for _ in range(10):
                while next(drawing) != "process_generating":
                    pass
            assert stream.running == 1
        assert stream.closed.acquire(timeout=PATIENCE)  # the first visitor has left
        while (kind := next(queued)) != "process_generating":
            assert kind in ("estimation", "process_starts", "heartbeat")
    assert stream.closed.acquire(timeout=PATIENCE)
    assert stream.most == 1


def test_stop_button_ends_the_drawing_and_keeps_its_image(endless: tuple, browser: Browser) -> None:
    stream, address, _ = endless
    page = browser.new_page()
    page.goto(address)
    for name, start, image in (
        ("Generate", "Generate", "#generated img"),
        ("Edit", "New picture", "#editor img"),
    ):
        tab = open_tab(page, name)
        click(tab, start)
        expect(page.locator(image)).to_be_visible(timeout=PATIENCE * 1000)
        assert stream.running == 1
        click(tab, "Stop")
        assert stream.closed.acquire(timeout=PATIENCE)
        assert stream.running == 0
        expect(page.locator(image)).to_be_visible()
    page.close()


def test_redrawing_after_a_stop_starts_from_the_whole_picture(
    endless: tuple, browser: Browser, tmp_path: Path
) -> None:
    stream, address, _ = endless
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    page = browser.new_page()
    page.goto(address)
    edit, image = open_tab(page, "Edit"), page.locator("#editor img")
    edit.get_by_label("Open an image").set_input_files(tmp_path / "picture.png")
    expect(image).to_be_visible()
    whole = image.get_attribute("src") or ""
    for tokens in ((0, 1), (3,)):  # at least two, which take more than one AR step
        for token in tokens:
            page.locator(f"#editor [data-token='{token}']").click()
        expect(image).to_have_attribute("src", whole)
        click(edit, "Redraw marked parts")
        expect(image).not_to_have_attribute("src", whole)
        click(edit, "Stop")
        assert stream.closed.acquire(timeout=PATIENCE)
        page.wait_for_timeout(500)  # until the last image has arrived
    page.close()
    first, second = stream.kept
    assert np.array_equal(first.latents, second.latents)
    assert [kept.positions.tolist() for kept in stream.kept] == [[2, 3], [2]]


def test_full_queue_rejects_a_click(endless: tuple) -> None:
    _, address, functions = endless
    with Visitor(address, *functions["generate"]).messages() as drawing:
        while next(drawing) != "process_generating":
            pass
        answers = [Visitor(address, *functions["compare"]).answer for _ in range(MOST_WAITING + 1)]
    assert [answer.status_code for answer in answers] == [200] * MOST_WAITING + [503]
    assert "Queue is full" in answers[-1].text
