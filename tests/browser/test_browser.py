"""A person at ComfyUI's page: opens the pack's templates, presses Run, looks at pictures and at errors.

The page is the real one, in a headless Chromium that reaches this machine and nothing else. Screenshots are left in
.local/artefacts.
"""
import io
import json

import pytest
from PIL import Image, ImageStat

from tests.conftest import need
from tools.comfyui import Server
from tools.install import DEMO_ONNX, LOCAL, comfyui
from tools.templates import HOW_TO_GET_A_BROWSER, LOAD, chromium, difference, names, open_page, template

ARTEFACTS = LOCAL / "artefacts"
TEXT_TO_IMAGE = "Sophgo text to image"
SECONDS = 240       # for a run in the simulator while other work goes on
# The frontend asks the node registry about every node it shows, and this browser lets it reach nothing.
NOT_OURS = "api.comfy.org"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    need((comfyui() / "main.py").exists(), "ComfyUI is not installed: run 'python tools/install.py dev'")
    need(any(DEMO_ONNX.glob("*.onnx")), "the demo model is not exported: run 'python tools/install.py host'")
    need(bool(chromium()), HOW_TO_GET_A_BROWSER)
    with Server(tmp_path_factory.mktemp("comfyui")) as server:
        yield server


@pytest.fixture(scope="module")
def browser(server):
    """(page, what its console says is wrong). One page for all tests: it takes seconds to load."""
    with open_page(server) as page:
        errors = []
        page.on("pageerror", lambda error: errors.append(error.stack or str(error)))
        page.on("console", lambda message: message.type == "error" and errors.append(f"{message.text} {message.location}"))
        page.reload()       # now with the console watched
        page.wait_for_function("window.app?.extensionManager && window.app.graph && app.graph.nodes.length")
        yield page, errors


@pytest.fixture
def page(browser):
    """The page; afterwards its console must hold no complaint that names the pack."""
    page, errors = browser
    yield page
    page.keyboard.press("Escape")       # a dialog that a test left open would cover the page in the next one
    assert not [text for text in errors if "sophgo" in text.lower() and NOT_OURS not in text]


def show(page, graph: dict) -> None:
    page.evaluate(LOAD, graph)


def press_run(page) -> None:
    page.get_by_test_id("queue-button").locator("button").first.click()


def shown_picture(page, server) -> Image.Image:
    """The picture in the SaveImage node, once it is there; it must be the file that the server saved."""
    page.wait_for_function("""document.querySelector("[role=dialog]")
        || app.graph.nodes.find(node => node.type === "SaveImage")?.imgs?.[0]?.naturalWidth""", timeout=SECONDS * 1000)
    assert not page.get_by_role("dialog").all_inner_texts()
    source, saved = page.evaluate("""async () => {
        const node = app.graph.nodes.find(node => node.type === "SaveImage");
        const bytes = await (await fetch(node.imgs[0].src)).arrayBuffer();
        return [Array.from(new Uint8Array(bytes)), app.nodeOutputs[node.id].images[0]];
    }""")
    assert bytes(source) == (server.base / "output" / saved["subfolder"] / saved["filename"]).read_bytes()
    return Image.open(io.BytesIO(bytes(source))).convert("RGB")


def keep_screenshot(page, name: str) -> None:
    ARTEFACTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=ARTEFACTS / f"browser-{name}.png")


def assert_red_on_white(picture: Image.Image) -> None:
    assert picture.size == (64, 64)
    red, green, blue = picture.getpixel((32, 32))
    assert red > 150 and green < 120 and blue < 120, "no red in the middle"
    assert min(ImageStat.Stat(picture.crop((0, 0, 64, 6))).mean) > 200, "no white at the top"


def test_a_template_from_the_template_browser_runs_in_the_simulator(page, server):
    page.evaluate("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    cards = page.locator("[data-testid^='template-workflow-']")
    cards.first.wait_for()
    assert cards.count() == len(names())
    for card in cards.all():
        card.scroll_into_view_if_needed()       # the frontend loads a picture when it comes into sight
        page.wait_for_function("card => card.querySelector('img')?.naturalWidth", arg=card.element_handle())
    card = page.get_by_test_id(f"template-workflow-{TEXT_TO_IMAGE}")
    card.scroll_into_view_if_needed()
    keep_screenshot(page, "template-browser")
    card.click()
    page.wait_for_function("app.graph.nodes.some(node => node.type === 'SophgoLoadCheckpoint')")
    press_run(page)
    picture = shown_picture(page, server)
    keep_screenshot(page, "text-to-image")
    assert_red_on_white(picture)


def test_the_same_graph_runs_from_onnx(page, server):
    graph = template(TEXT_TO_IMAGE)
    loader = next(node for node in graph["nodes"] if node["type"] == "SophgoLoadCheckpoint")
    loader["widgets_values"][0] = "shapes-onnx"
    show(page, graph)
    press_run(page)
    assert_red_on_white(shown_picture(page, server))


@pytest.mark.parametrize("name", names())
def test_templates_run_their_workflow(page, name):
    assert difference(page, name) == ""


@pytest.mark.parametrize("name", names())
def test_nodes_show_their_titles(page, server, name):
    known, graph = server.get("/object_info"), template(name)
    show(page, graph)
    shown = dict(page.evaluate("app.graph.nodes.map(node => [node.id, node.title])"))
    ours = [node for node in graph["nodes"] if node["type"].startswith(("Sophgo", "Ascend"))]
    assert ours
    for node in ours:
        assert shown[node["id"]] == node.get("title", known[node["type"]]["display_name"])


def test_a_failing_graph_says_why_in_one_sentence(page):
    graph = json.loads(json.dumps(template(TEXT_TO_IMAGE)).replace("shapes-bm1684x-f32", "../x"))
    show(page, graph)
    press_run(page)
    dialog = page.get_by_role("dialog")
    dialog.wait_for()
    keep_screenshot(page, "error")
    text = dialog.inner_text()
    assert "'../x' is no name of a model file or folder; there are " in text
    assert "Traceback" not in text
