"""The exported page in headless Chromium: its arithmetic against torch, and what a visitor does."""

import contextlib
import dataclasses
import http.server
import json
import os
import shutil
import threading
from collections.abc import Generator, Iterator
from functools import partial
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from made_once import made_once
from onnx_parts import CLASSES, Parts, config_of, random_model, sampling
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright
from refusals import refused

from far.autoencoder import Autoencoder, AutoencoderConfig
from far.backbone import BlockCausalConfig
from far.cli.main import main
from far.demo.static import serve
from far.heads import ShortcutConfig
from far.model import ModelConfig, NetworkConfig
from far.onnx.web import RUNTIME_FILES, export_web
from far.pipeline import Pipeline, load
from far.sampling import SamplingConfig, SeededNoise, sample
from far.tokens import cosine_token_counts

PATIENCE = 120_000  # milliseconds
FLAGS = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking"
PAGE = Path(__file__).parents[2] / "far" / "onnx" / "page"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        program = shutil.which("chromium") or playwright.chromium.executable_path
        if not Path(program).exists():
            reason = "no Chromium for the browser tests: apt-get install chromium"
            pytest.fail(reason) if os.environ.get("FAR_REQUIRE_BROWSER") == "1" else pytest.skip(reason)
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS.split())
        yield browser
        browser.close()


class Plain(http.server.SimpleHTTPRequestHandler):
    """Serves files as many web servers do: pages are not isolated, and newer files have no MIME type."""

    extensions_map = {  # noqa: RUF012 (the base class declares it as an instance's)
        **http.server.SimpleHTTPRequestHandler.extensions_map,
        ".mjs": "application/octet-stream",
        ".wasm": "application/octet-stream",
    }

    def log_message(self, format: str, *arguments: object) -> None:
        """Print nothing per request."""


def serving(folder: Path, *, plain: bool = False) -> Generator[str, None, None]:
    """Yield the address of a server of ``folder``, as far demo --static runs it or a plain one."""
    if plain:
        handler = partial(Plain, directory=str(folder))
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    else:
        server = serve(folder, "127.0.0.1", 0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of the page's scripts beside an empty page, for functions that need no model."""
    folder = tmp_path_factory.mktemp("scripts")
    for name in ("noise.js", "sampler.js"):
        shutil.copy(PAGE / name, folder)
    (folder / "index.html").write_text("<!doctype html><title>scripts</title>")
    yield from serving(folder)


def evaluated(browser: Browser, address: str, script: str, argument: object) -> object:
    page = browser.new_page()
    page.goto(address)
    result = page.evaluate(script, argument)
    page.close()
    return result


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1])
def test_noise_is_that_of_torch(browser: Browser, scripts: str, seed: int) -> None:
    """Orders, then normal numbers in whole blocks of 16, in broken ones, and fewer than a block."""
    sizes, generator = [48, 20, 5, 3, 100], torch.Generator().manual_seed(seed)
    script = """async ([seed, sizes]) => {
        const { Noise } = await import("./noise.js"), noise = new Noise(seed);
        return [noise.permutation(24), sizes.map((size) => [...noise.normals(size)])];
    }"""
    order, normals = evaluated(browser, scripts, script, [seed, sizes])  # type: ignore[misc]
    assert order == torch.randperm(24, generator=generator).tolist()
    for size, values in zip(sizes, normals, strict=True):
        expected = torch.randn(size, generator=generator)
        torch.testing.assert_close(torch.tensor(values), expected, atol=2e-6, rtol=0)


def test_token_counts_are_those_of_python(browser: Browser, scripts: str) -> None:
    cases = [[16, 16], [16, 5], [64, 12], [256, 64], [7, 1]]
    script = """async (cases) => {
        const { tokenCounts } = await import("./sampler.js");
        return cases.map(([tokens, steps]) => tokenCounts(tokens, steps));
    }"""
    expected = [cosine_token_counts(*case) for case in cases]
    assert evaluated(browser, scripts, script, cases) == expected


# --- The page
# ----------------------------------------------------------------------------------------------------


def runtime_files() -> Path | None:
    """Return a folder with the files of ONNX Runtime Web, or None to download them by npm."""
    given = os.environ.get("FAR_RUNTIME_FILES")
    if given is None and shutil.which("npm") is None:
        pytest.skip("no npm for the files of ONNX Runtime Web: apt-get install npm, or set FAR_RUNTIME_FILES")
    return None if given is None else Path(given)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small random model."""
    folder = tmp_path_factory.mktemp("web") / "model"
    backbone = BlockCausalConfig(width=32, encoder_depth=1, decoder_depth=1, heads=2, buffer=2)
    network = NetworkConfig(backbone, ShortcutConfig(24, 1), spherical=True)
    torch.manual_seed(0)
    model = random_model(ModelConfig(network, len(CLASSES), latent_channels=4, grid=(3, 4)))
    autoencoder = Autoencoder(AutoencoderConfig(8, (1, 1, 2), 1, 4, norm_groups=4, scale=0.5)).eval()
    defaults = SamplingConfig(5, 3, guidance=2.0, order="halton", temperature=0.9)
    Pipeline(model, autoencoder, CLASSES, defaults).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def site(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runtime = runtime_files()

    def export(out: Path) -> None:
        export_web(model, out, dtype="float32", runtime_files=runtime)

    return made_once(tmp_path_factory, "site", export)


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    yield from serving(site)


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    context = browser.new_context(accept_downloads=True)
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    ours = (address, "blob:", "data:")
    page.on("request", lambda request: request.url.startswith(ours) or problems.append(request.url))
    page.goto(address)
    expect(page.get_by_role("button", name="Draw")).to_be_enabled(timeout=PATIENCE)
    yield page
    assert not problems
    context.close()


def drawn(page: Page, path: Path) -> np.ndarray:
    page.get_by_role("button", name="Draw").click()
    with page.expect_download() as download:
        page.get_by_role("link", name="Download PNG").click()
    download.value.save_as(path)
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_the_page_draws_the_images_of_torch(page: Page, model: Path, tmp_path: Path) -> None:
    pipeline = load(model, device="cpu")
    for label, seed, steps in (("circle", 0, 5), ("stripes & dots", 2**32 - 1, 12)):
        page.get_by_role("combobox").select_option(label)
        page.get_by_label("Seed", exact=True).fill(str(seed))
        page.get_by_label("AR steps").fill(str(steps))
        image = drawn(page, tmp_path / "drawn.png")
        (expected,) = pipeline.generate([label], seed=seed, ar_steps=steps, output="np").astype(int)
        assert abs(image - expected).max() <= 1
        assert expected.std() > 5
        expect(page.get_by_role("img", name=f"Image of the class {label}, seed {seed}")).to_be_visible()


def test_an_int8_page_draws_images_near_those_of_torch(
    model: Path, browser: Browser, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    """Check what the command writes by default."""
    runtime = runtime_files()

    def export(out: Path) -> None:
        given = [] if runtime is None else ["--runtime-files", str(runtime)]
        assert main(["export", "web", str(model), str(out), *given]) == 0

    folder = made_once(tmp_path_factory, "int8_site", export)
    assert json.loads((folder / "config.json").read_text())["onnx"]["dtype"] == "int8"
    expected, other = load(model, device="cpu").generate([0, 0], seed=[0, 1], output="np").astype(int)
    for address in serving(folder):
        page = browser.new_page()
        page.goto(address)
        expect(page.get_by_role("button", name="Draw")).to_be_enabled(timeout=PATIENCE)
        image = drawn(page, tmp_path / "drawn.png")  # of seed 0
        page.close()
    assert 0 < abs(image - expected).mean() < 0.1 * abs(other - expected).mean()  # 0.8 and 27 of 255


def test_the_page_works_without_newer_mime_types(site: Path, browser: Browser, tmp_path: Path) -> None:
    for address in serving(site, plain=True):
        page = browser.new_page()
        page.goto(address)
        expect(page.get_by_role("button", name="Draw")).to_be_enabled(timeout=PATIENCE)
        assert drawn(page, tmp_path / "drawn.png").std() > 5
        assert not page.workers
        page.close()


def test_an_isolated_page_starts_threads(address: str, browser: Browser, tmp_path: Path) -> None:
    page = browser.new_page()
    page.add_init_script("Object.defineProperty(navigator, 'hardwareConcurrency', { value: 3 })")
    page.goto(address)
    expect(page.get_by_role("button", name="Draw")).to_be_enabled(timeout=PATIENCE)
    assert len(page.workers) == 2
    assert drawn(page, tmp_path / "drawn.png").std() > 5
    page.close()


def test_drawing_by_keyboard_keeps_the_focus(page: Page) -> None:
    """Check also what a screen reader announces, and the label of the picture while it is drawn."""
    page.evaluate("""() => {
        const live = document.querySelector("[aria-live]"), image = document.querySelector("canvas");
        window.said = [];
        window.labels = [];
        new MutationObserver(() => said.push(live.textContent)).observe(live, { childList: true });
        const label = { attributeFilter: ["aria-label"] };
        new MutationObserver(() => labels.push(image.getAttribute("aria-label"))).observe(image, label);
    }""")
    for name in ("Draw", "Next seed"):
        button = page.get_by_role("button", name=name)
        button.focus()
        page.keyboard.press("Enter")
        expect(page.get_by_role("link", name="Download PNG")).to_be_visible()
        expect(button).to_be_focused()
    said, labels = page.evaluate("[said, labels]")
    assert len(said) == 4  # start and end of each
    assert len(set(labels)) == 4
    assert all("seed 1" in label for label in labels[2:])


def test_a_second_click_while_drawing_is_ignored(page: Page) -> None:
    page.get_by_role("button", name="Next seed").evaluate("(button) => { button.click(); button.click(); }")
    expect(page.get_by_role("link", name="Download PNG")).to_be_visible()
    expect(page.get_by_label("Seed", exact=True)).to_have_value("1")


def test_the_page_works_offline_once_it_is_loaded(page: Page, tmp_path: Path) -> None:
    page.context.set_offline(True)
    first = drawn(page, tmp_path / "first.png")
    page.get_by_role("button", name="Next seed").click()
    expect(page.get_by_label("Seed", exact=True)).to_have_value("1")
    expect(page.get_by_role("link", name="Download PNG")).to_be_visible()
    assert (drawn(page, tmp_path / "second.png") != first).any()


@pytest.mark.parametrize(
    ("field", "value"),
    [("Seed", "-1"), ("Seed", "1.5"), ("AR steps", "13"), ("Head steps", ""), ("Guidance", "-2")],
)
def test_an_invalid_entry_is_named_and_focused(page: Page, field: str, value: str) -> None:
    entry = page.get_by_label(field, exact=True)
    entry.fill(value)
    page.get_by_role("button", name="Draw").click()
    expect(page.get_by_role("alert")).to_contain_text(field)
    expect(entry).to_be_focused()
    expect(entry).to_have_attribute("aria-invalid", "true")
    entry.fill(entry.get_attribute("min") or "0")
    page.get_by_role("button", name="Draw").click()
    expect(page.get_by_role("link", name="Download PNG")).to_be_visible()
    expect(page.get_by_role("alert")).to_be_empty()


def test_the_page_fits_a_phone(page: Page) -> None:
    page.set_viewport_size({"width": 400, "height": 800})
    drawing = page.get_by_role("img").bounding_box()
    assert drawing is not None
    assert drawing["x"] >= 0
    assert drawing["x"] + drawing["width"] <= 400
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 400


@pytest.mark.parametrize(
    "file",
    [
        "head.onnx",
        "config.json",
        "noise.js",
        "runtime/ort.wasm.min.js",
        "runtime/ort-wasm-simd-threaded.js",
        "runtime/ort-wasm-simd-threaded.wasm",
    ],
)
@pytest.mark.parametrize("change", ["missing", "damaged"])
def test_a_missing_or_damaged_file_is_reported_on_the_page(
    browser: Browser, site: Path, file: str, change: str, tmp_path: Path
) -> None:
    folder = tmp_path / "site"
    shutil.copytree(site, folder)
    content = (folder / file).read_bytes()
    (folder / file).unlink()
    if change == "damaged":
        (folder / file).write_bytes(content[: len(content) // 2])
    importing = {"noise.js": "sampler.js", "runtime/ort.wasm.min.js": "model.js"}
    importing |= {f"runtime/ort-wasm-simd-threaded.{ending}": "folder runtime" for ending in ("js", "wasm")}
    for address in serving(folder):
        page = browser.new_page()
        page.goto(address)
        alert = page.get_by_role("alert")
        expect(alert).to_contain_text(importing.get(file, file), timeout=PATIENCE)
        if file not in importing:
            expect(alert).to_contain_text(change)
        expect(page.get_by_role("button", name="Draw")).to_be_disabled()
        page.close()


@pytest.mark.parametrize("change", ["missing", "damaged", "empty"])
def test_a_script_that_does_not_start_is_reported_on_the_page(
    browser: Browser, change: str, tmp_path: Path
) -> None:
    folder = tmp_path / "site"
    shutil.copytree(PAGE, folder)
    content = (folder / "page.js").read_bytes()
    (folder / "page.js").unlink()
    if change != "missing":
        (folder / "page.js").write_bytes(content[: len(content) // 2 if change == "damaged" else 0])
    for address in serving(folder):
        page = browser.new_page()
        page.goto(address)
        expect(page.get_by_role("alert")).to_contain_text("page.js", timeout=PATIENCE)
        expect(page.locator("#status")).to_be_empty()
        page.close()


def test_a_page_opened_as_a_file_names_the_command_that_serves_it(browser: Browser) -> None:
    page = browser.new_page()
    page.goto((PAGE / "index.html").as_uri())
    expect(page.get_by_role("alert")).to_contain_text("far demo --static", timeout=PATIENCE)
    page.close()


def test_a_page_without_javascript_says_what_it_needs(browser: Browser) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((PAGE / "index.html").as_uri())
    expect(page.locator("noscript p")).to_contain_text("JavaScript", timeout=5000)
    expect(page.locator("noscript p")).to_be_visible()
    expect(page.locator("#status")).to_be_empty()
    context.close()


def test_a_browser_without_simd_is_told_so(browser: Browser, address: str) -> None:
    page = browser.new_page()
    page.add_init_script("WebAssembly.validate = () => false")
    page.goto(address)
    expect(page.get_by_role("alert")).to_contain_text("SIMD", timeout=PATIENCE)
    expect(page.get_by_role("button", name="Draw")).to_be_disabled()
    page.close()


@pytest.mark.parametrize(
    ("backbone", "head"), [("masked", "shortcut"), ("causal", "flow_map"), ("masked", "flow_map")]
)
def test_the_sampler_draws_the_latents_of_torch(
    parts: Parts, site: Path, browser: Browser, backbone: str, head: str, tmp_path: Path
) -> None:
    model, folder = parts.torch(backbone, head), tmp_path / "page"
    shutil.copytree(site, folder)
    parts.onnx(backbone, head, folder)
    script = """async (options) => {
        const { loadModel } = await import("./model.js"), { sample } = await import("./sampler.js");
        const { config, run } = await loadModel();
        return [...(await sample(config, run, options)).data];
    }"""
    for address in serving(folder):
        for guidance in (1.0, 2.0, 4.0):  # the flow map has learned guidance up to 3
            config = sampling(model, guidance=guidance)
            settings = {"seed": 5, "label": 1, **dataclasses.asdict(config)}
            found = torch.tensor(evaluated(browser, f"{address}config.json", script, settings))
            noise = SeededNoise([5], torch.device("cpu"))
            expected = sample(model, torch.tensor([1]), noise, config)
            torch.testing.assert_close(found.view_as(expected), expected, atol=1e-3, rtol=0)


# --- Errors of the export
# ----------------------------------------------------------------------------------------------------


def test_approximations_are_off_in_the_defaults_of_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("far.onnx.exporter.write_graphs", lambda graphs, folder, dtype: {})
    runtime = tmp_path / "runtime"
    runtime.mkdir()
    for file in RUNTIME_FILES:
        (runtime / file).write_text("")
    autoencoder = Autoencoder(AutoencoderConfig(8, (1, 1, 2), 1, 4, norm_groups=4)).eval()
    defaults = SamplingConfig(5, refresh_every=4, guidance_every=2)
    model = random_model(config_of("masked", "shortcut"))
    Pipeline(model, autoencoder, CLASSES, defaults).save_pretrained(tmp_path / "model")
    export_web(tmp_path / "model", tmp_path / "page", runtime_files=runtime)
    written = json.loads((tmp_path / "page" / "config.json").read_text())["defaults"]
    assert (written["refresh_every"], written["guidance_every"]) == (1, 1)


def test_missing_runtime_files_are_named_before_the_export(model: Path, tmp_path: Path) -> None:
    runtime = tmp_path / "runtime"
    runtime.mkdir()
    for file in RUNTIME_FILES[:-1]:
        (runtime / file).write_text("")
    with refused(runtime, RUNTIME_FILES[-1]):
        export_web(model, tmp_path / "out", runtime_files=runtime)
    assert not (tmp_path / "out").exists()


def test_a_head_that_the_page_does_not_have_is_refused(tmp_path: Path) -> None:
    with refused("diffusion"):
        export_web("avatars-64-mar", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_without_npm_the_other_way_is_named(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with refused("npm", "--runtime-files"):
        export_web(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_address_that_no_file_can_have_is_answered_in_silence(
    tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    with contextlib.closing(serving(tmp_path)) as served:
        address = next(served)
        assert httpx.get(f"{address}%00").status_code == 400
        assert httpx.head(f"{address}a%00/").status_code == 400
    assert capfd.readouterr() == ("", "")


def test_a_folder_without_a_page_is_not_served(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["demo", "--static", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err


@pytest.mark.parametrize(
    "option", ["--weights avatars-64", "--device cpu", "--dtype float32", "--threads 1", "--no-record"]
)
def test_options_of_drawing_are_refused_for_a_page(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "index.html").touch()
    assert main(["demo", "--static", str(tmp_path), *option.split()]) == 2
    assert option in capsys.readouterr().err
