"""The page as a visitor sees it: one server, and Chromium in front of it."""

import io
import os
import re
import shutil
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from scipy.io import wavfile

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]
pytest.importorskip("gradio", reason="needs Gradio: pip install 'diffusers-ext[app]'")
sync_api = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
from diffusers_ext import corrupt  # noqa: E402
from diffusers_ext.app.parts import EXAMPLES  # noqa: E402

PATIENCE = 120_000  # milliseconds: the machine may be busy
COMMAND = "import sys; from diffusers_ext.cli import main; main(sys.argv[1:])"
# Progress bars come and go; this keeps what they said.
WATCH = """window.said = new Set(); new MutationObserver(() => document.querySelectorAll('.progress-level-inner')
.forEach(bar => window.said.add(bar.innerText))).observe(document, {childList: true, subtree: true,
characterData: true})"""


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log.txt"
    environment = {**os.environ, "GRADIO_TEMP_DIR": str(log.parent / "files")}
    with log.open("w") as out:
        command = [sys.executable, "-c", COMMAND, "app", "--port", str(port)]
        server = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
    try:
        deadline = time.monotonic() + PATIENCE / 1000
        while time.monotonic() < deadline:
            assert server.poll() is None, log.read_text()
            with socket.socket() as attempt:
                if attempt.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


@pytest.fixture(scope="module")
def visited(address):
    """The page, and the hosts that it asked for something."""
    hosts = set()
    with sync_api.sync_playwright() as playwright:
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        page = browser.new_page(viewport={"width": 1280, "height": 1100})
        page.set_default_timeout(PATIENCE)
        page.add_init_script(WATCH)
        page.on("request", lambda request: hosts.add(re.sub(r"^((blob:)?\w+:/*[^/]*).*", r"\1", request.url)))
        page.goto(address)
        yield page, hosts
        browser.close()


@pytest.fixture
def page(visited):
    return visited[0]


def opened(page, title):
    page.get_by_role("tab", name=title, exact=True).click()
    return page.get_by_role("tabpanel").locator("visible=true")


def number(panel, label, value):
    panel.get_by_label(f"number input for {label}", exact=True).fill(str(value))


def field(panel, label):
    return panel.locator(".pixels", has=panel.page.get_by_text(label, exact=True))


def result(panel, label):
    """Waits for the picture under a label."""
    picture = field(panel, label).locator("img")
    picture.wait_for()
    panel.page.wait_for_function("image => image.complete && image.naturalWidth > 0", arg=picture.element_handle())
    return picture


def pixels(locator):
    """What the visitor sees of it, as grey values."""
    return np.asarray(Image.open(io.BytesIO(locator.screenshot())).convert("L"), np.float64)


def digit_seen(picture):
    """Brings a displayed digit back to 28x28: it fills the place below its label."""
    seen = pixels(picture)[34:].astype(np.uint8)
    side = min(seen.shape)
    square = Image.fromarray(seen[:side, (seen.shape[1] - side) // 2 :][:, :side])
    return np.asarray(square.resize((28, 28), Image.Resampling.BOX), np.float64)


def digit(name):
    return np.asarray(Image.open(EXAMPLES / name), np.float64)


def screenshot(page, tmp_path, name):
    path = tmp_path / f"{name}.png"
    page.screenshot(path=path, full_page=True)
    return path


def test_one_more_step(page, tmp_path):
    panel = opened(page, "One More Step")
    number(panel, "Images", 8)
    panel.get_by_role("button", name="Draw with and without").click()
    said = panel.get_by_text("Mean brightness from").inner_text()
    real, without, corrected = map(float, re.findall(r"\d\.\d+", said))
    assert abs(corrected - real) * 3 < abs(without - real)
    dark, medium = pixels(result(panel, "With One More Step")), pixels(result(panel, "Without"))
    middle = slice(len(dark) * 2 // 5, len(dark) * 3 // 5)  # the row of images
    assert dark[middle].mean() + 50 < medium[middle].mean()
    legend = panel.locator(".block", has=page.get_by_text("Histogram of the images' mean brightness"))
    legend.locator("canvas, svg.marks").first.wait_for()
    said = page.evaluate("[...window.said]")
    assert any("Loading the models" in text for text in said)
    assert any(re.search(r"Drawing with(out| One More Step) - \d", text) for text in said), said
    screenshot(page, tmp_path, "one_more_step")


def test_noise_diffusion_and_the_slider_over_its_frames(page, tmp_path):
    panel = opened(page, "NoiseDiffusion")
    for label, name in {"First image": "digit-4-noisy.png", "Second image": "digit-6-noisy.png"}.items():
        field(panel, label).locator("input[type=file]").set_input_files(EXAMPLES / name)
        result(panel, label)
    number(panel, "Frames", 2)
    panel.get_by_role("button", name="Make the frames").click()
    shown = result(panel, "The frame")
    panel.get_by_role("cell", name="frames, mixed").wait_for()
    assert panel.get_by_role("cell", name="image, inverted").count() == 2
    frame, middle = panel.get_by_label("number input for Frame", exact=True), digit_seen(shown)
    assert frame.input_value() == "2"
    before = shown.get_attribute("src")
    frame.fill("0")
    page.wait_for_function(
        "([image, src]) => image.src !== src && image.complete", arg=[shown.element_handle(), before]
    )
    assert np.abs(digit_seen(shown) - digit("digit-4-noisy.png")).mean() < 12
    assert np.abs(middle - digit("digit-4-noisy.png")).mean() > 20
    screenshot(page, tmp_path, "noise_diffusion")


def test_sda_with_an_example(page, tmp_path):
    panel = opened(page, "SDA")
    panel.locator("button.gallery-item").first.click()
    result(panel, "Image of a digit")
    panel.get_by_role("button", name="Corrupt, adapt and classify").click()
    result(panel, "Adapted by the diffusion model")
    before, after = panel.get_by_test_id("label-output-value").all_inner_texts()
    assert (before.strip(), after.strip()) == ("8", "0")  # it is a 0
    adapted = digit_seen(result(panel, "Adapted by the diffusion model"))
    corrupted, clean = digit_seen(result(panel, "Corrupted")), digit("digit-0.png")
    assert np.abs(corrupted - corrupt(clean.astype(np.uint8), "impulse_noise", 4, seed=0)).mean() < 4
    speckles = [((seen > 200) & (clean == 0)).sum() for seen in (corrupted, adapted)]
    assert speckles[1] * 10 < speckles[0]
    screenshot(page, tmp_path, "sda")


def test_few_step_sampling(page, tmp_path):
    panel = opened(page, "Few-step sampling")
    panel.get_by_role("button", name="Draw before and after tuning").click()
    said = panel.get_by_text("Frechet distance of").inner_text()
    before, after = map(float, re.findall(r"\d+\.\d", said))
    assert after * 1.5 < before
    assert min(pixels(result(panel, label)).std() for label in ("Before tuning", "After tuning")) > 40
    screenshot(page, tmp_path, "few_steps")


def test_speech_enhancement_of_an_upload_and_of_the_example(page, tmp_path):
    panel = opened(page, "Speech enhancement")
    panel.locator("input[type=file]").first.set_input_files(EXAMPLES / "speech-noisy.flac")
    panel.get_by_text("speech-noisy.flac").first.wait_for()
    panel.get_by_role("button", name="Enhance", exact=True).click()
    said = panel.get_by_text(re.compile(r"speech-noisy.flac: \d\.\d s at 8000 Hz, 1 channel")).inner_text()
    before, after = (pixels(result(panel, f"Spectrogram {when}")) for when in ("before", "after"))
    assert after.mean() < before.mean()
    with page.expect_download() as download:
        panel.get_by_role("button", name="Download").first.click()
    rate, wave = wavfile.read(download.value.path())
    assert (rate, len(wave) / rate) == (8000, pytest.approx(float(said.split(": ")[1].split()[0]), abs=0.05))
    assert np.abs(wave).max() > 1000
    screenshot(page, tmp_path, "speech_enhancement")


def test_bad_upload_gets_a_message(page, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_text("this is no image")
    panel = opened(page, "SDA")
    field(panel, "Image of a digit").locator("input[type=file]").set_input_files(bad)
    message = page.get_by_test_id("toast-body")
    message.get_by_text("This file is not an image, or it is damaged.").wait_for()
    field(panel, "Image of a digit").locator("img").wait_for(state="detached")  # and the file is out again
    panel.get_by_role("button", name="Corrupt, adapt and classify").click()
    message.get_by_text("Upload an image first, or pick an example below.").wait_for()
    screenshot(page, tmp_path, "bad_upload")


def test_nothing_is_fetched_from_elsewhere(visited, address):
    assert visited[1] - {"data:", "blob:" + address} <= {address}
