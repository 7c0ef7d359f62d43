"""Makes the templates that ComfyUI's template browser shows out of the workflows in workflows/api.

    python -m tools.templates [--check] [name ...]

A workflow is written once, in the API format, with a text that explains it: workflows/api/<name>.json and <name>.md.
ComfyUI's own frontend, in a headless Chromium, turns it into a template (workflows/<name>.json); this file only says
where the nodes go. A template must give back exactly its workflow when a person presses Run; it is then run, and its
pictures become the one in the template browser (workflows/<name>.jpg). --check does the comparison alone.

In a workflow the ids are the order of the nodes within a column, from the top, and `_meta.title` is a title other
than the node's own.
"""
from __future__ import annotations

import argparse
import io
import json
import math
import shutil
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from PIL import Image, ImageOps
from playwright.sync_api import Page, sync_playwright

from tools.comfyui import Server
from tools.install import LOCAL, PACK

WORKFLOWS = PACK / "workflows"
BASE = LOCAL / "templates"                   # the server's own input, output, user folders
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PATIENCE = 120_000                           # milliseconds, for the page on a machine that computes pictures meanwhile
HOW_TO_GET_A_BROWSER = "Chromium is missing: apt-get install chromium"
# Without the first, a modal for newcomers blocks every click.
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.Locale": "en"}

SHOWN = "preview"                            # not an input of PreviewAny, but sent along: the text it shows
NOTE = "MarkdownNote"
NOTE_SIZE = (900, 110)
# By type or title: where the frontend's size has no room for a text or for what a node shows after a run.
SIZES = {"CLIPTextEncode": (320, 110), "SophgoTextEncode": (320, 200), "SaveImage": (240, 270), "PreviewImage": (240, 240),
         "PreviewAny": (640, 640), "SophgoInspect": (320, 160), "SophgoCompile": (360, 490), "StringConcatenate": (260, 160),
         "SophgoLoadCheckpoint": (440, 276), "SophgoLoadCLIP": (340, 160), "SophgoLoadUNet": (340, 140),
         "SophgoLoadVAE": (340, 220), "AscendLoadSDXL": (400, 170), "AscendSDXLConditioner": (320, 370),
         "SophgoLoadRecording": (440, 240), "SophgoParity": (340, 420), "SophgoParityGate": (320, 180),
         "L1 and cosine": (320, 480), "AscendVAEDecode": (230, 46),
         "AscendVAEEncode": (230, 46)}
COLUMNS = 6                                  # more than these continue below, as lines of a text do
GAP_X, GAP_Y, TITLE = 60, 24, 30             # a node's title lies above its position
SCREEN = (80, 170, 1500, 690)                # left, top, width, height of what toolbars leave free on a small screen
READABLE = 0.6                               # the frontend leaves texts out below this scale
THUMBNAIL = 320

TO_TEMPLATE = """workflow => {
    app.loadApiJson(workflow, "template");
    for (const node of app.graph.nodes)
        for (const widget of node.widgets ?? [])
            if (widget.name === "control_after_generate") widget.value = "fixed";   // so that a run can be repeated
    return JSON.stringify(app.graph.serialize());
}"""
LOAD = """async template => {
    await app.loadGraphData(template);
    return JSON.stringify([app.graph.serialize(), (await app.graphToPrompt()).output]);
}"""


def names() -> list[str]:
    return sorted(path.stem for path in (WORKFLOWS / "api").glob("*.json"))


def workflow(name: str) -> dict:
    """The workflow `name` in the API format."""
    return json.loads((WORKFLOWS / "api" / f"{name}.json").read_text(encoding="utf-8"))


def template(name: str) -> dict:
    return json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))


def chromium() -> str | None:
    return next(filter(None, map(shutil.which, BROWSERS)), None)


@contextmanager
def open_page(server: Server) -> Iterator[Page]:
    """ComfyUI's page, ready to use, in a browser that reaches this machine and nothing else."""
    server.post("/settings", SETTINGS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1600, "height": 900})
        page.set_default_timeout(PATIENCE)
        page.route(lambda url: not url.startswith((f"http://{server.address}/", "data:", "blob:")),
                   lambda route: route.abort())
        page.goto(f"http://{server.address}/")
        page.wait_for_function("window.app?.extensionManager && window.app.graph && app.graph.nodes.length")
        yield page
        browser.close()


def difference(page: Page, name: str) -> str:
    """How what the template `name` runs differs from its workflow, in a sentence; empty if it does not."""
    _, output = json.loads(page.evaluate(LOAD, template(name)))
    wanted, got = ({node: (data["class_type"], {**data["inputs"], SHOWN: None}) for node, data in prompt.items()}
                   for prompt in (workflow(name), output))
    wrong = [node for node in sorted({*wanted, *got}) if wanted.get(node) != got.get(node)]
    return "; ".join(f"node {node}: {got.get(node)} instead of {wanted.get(node)}" for node in wrong)


def arrange(graph: dict) -> None:
    """Give each node of a UI-format graph a place: in columns, just left of what it feeds, in lines of COLUMNS."""
    nodes = {node["id"]: node for node in graph["nodes"]}
    feeds = {(origin, target) for _, origin, _, target, *_ in graph["links"]}

    @cache
    def depth(id: int) -> int:
        return max((depth(origin) + 1 for origin, target in feeds if target == id), default=0)

    @cache
    def column(id: int) -> int:
        return min((column(target) - 1 for origin, target in feeds if origin == id), default=depth(id))

    def height(stack: list[int]) -> int:
        return sum(nodes[id]["size"][1] + TITLE + GAP_Y for id in stack)

    for node in nodes.values():
        node["size"] = list(SIZES.get(node.get("title"), SIZES.get(node["type"], node["size"])))
    columns: list[list[int]] = [[] for _ in range(1 + max(map(depth, nodes)))]
    for id in sorted(nodes, key=lambda id: (depth(id) == 0, column(id), id)):
        last = column(id)                           # loaders and the like may be further left: they fill short columns
        choices = [last] if depth(id) else range(last, last // COLUMNS * COLUMNS - 1, -1)
        columns[min(choices, key=lambda choice: height(columns[choice]))].append(id)
    top = 0
    for first in range(0, len(columns), COLUMNS):
        line, left = columns[first:first + COLUMNS], 0
        for stack in map(sorted, line):
            for i, id in enumerate(stack):
                nodes[id]["pos"] = [left, top + height(stack[:i])]
            left += max(nodes[id]["size"][0] for id in stack) + GAP_X
        top += max(map(height, line)) + GAP_Y


def view(graph: dict) -> dict:
    """Where the frontend looks at first: the whole graph if its texts can be read then, else its beginning."""
    left, top = (min(node["pos"][i] for node in graph["nodes"]) for i in (0, 1))
    right, bottom = (max(node["pos"][i] + node["size"][i] for node in graph["nodes"]) for i in (0, 1))
    scale = max(READABLE, min(1, SCREEN[2] / (right - left), SCREEN[3] / (bottom - top)))
    return {"scale": round(scale, 2), "offset": [round(SCREEN[0] / scale - left), round(SCREEN[1] / scale - top)]}


def make(page: Page, name: str) -> None:
    """Write workflows/<name>.json."""
    graph = json.loads(page.evaluate(TO_TEMPLATE, workflow(name)))
    arrange(graph)
    text = (WORKFLOWS / "api" / f"{name}.md").read_text(encoding="utf-8")
    graph["last_node_id"] += 1
    graph["nodes"].append({"id": graph["last_node_id"], "type": NOTE, "title": "About this workflow", "order": 0, "mode": 0,
                           "pos": [0, -NOTE_SIZE[1] - TITLE - GAP_Y], "size": NOTE_SIZE, "flags": {}, "properties": {},
                           "widgets_values": [text]})
    graph, _ = json.loads(page.evaluate(LOAD, graph))
    graph["id"] = str(uuid.uuid5(uuid.NAMESPACE_URL, name))     # the frontend's is another one each time
    graph["extra"]["ds"] = view(graph)
    (WORKFLOWS / f"{name}.json").write_text(json.dumps(graph, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def thumbnail(pictures: list[Image.Image]) -> Image.Image:
    """The pictures of a run, in order, as tiles of a square."""
    across = math.ceil(math.sqrt(len(pictures)))
    side = THUMBNAIL // across
    top = (THUMBNAIL - math.ceil(len(pictures) / across) * side) // 2
    square = Image.new("RGB", (THUMBNAIL, THUMBNAIL), "white")
    for i, picture in enumerate(pictures):
        # Small ones stay sharp, larger ones readable.
        method = Image.Resampling.NEAREST if max(picture.size) <= side else Image.Resampling.LANCZOS
        tile = ImageOps.contain(picture.convert("RGB"), (side, side), method)
        left, above = i % across * side + (side - tile.width) // 2, i // across * side + (side - tile.height) // 2
        square.paste(tile, (left, top + above))
    return square


def look(page: Page, name: str) -> Image.Image:
    """What a template that makes no picture shows after a run: the beginning of its text."""
    page.evaluate(LOAD, template(name))
    page.get_by_test_id("queue-button").locator("button").first.click()
    text = page.locator(".comfy-markdown", has=page.locator("pre, table"))
    text.wait_for()
    return Image.open(io.BytesIO(text.screenshot())).crop((0, 0, THUMBNAIL, THUMBNAIL))


def run(server: Server, page: Page, name: str) -> None:
    """Run a template and write workflows/<name>.jpg: its pictures or, if it makes none, its last node."""
    began = time.monotonic()
    outputs = server.run(workflow(name))
    print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
    images = [image for node in sorted(outputs, key=int) for image in outputs[node].get("images", [])]
    pictures = [Image.open(io.BytesIO(server.picture(image))) for image in images]
    pictures = [picture for picture in pictures if max(picture.size) > THUMBNAIL] or pictures      # a plot needs all room
    if not pictures:
        pictures = [look(page, name)]
    thumbnail(pictures).save(WORKFLOWS / f"{name}.jpg", quality=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="*", help="only these")
    parser.add_argument("--check", action="store_true", help="compare the templates with their workflows, write nothing")
    args = parser.parse_args()
    if not chromium():
        sys.exit(HOW_TO_GET_A_BROWSER)
    with Server(BASE) as server, open_page(server) as page:
        for name in args.name or names():
            if not args.check:
                make(page, name)
            if wrong := difference(page, name):
                sys.exit(f"{name}: the template does not run its workflow: {wrong}")
            if not args.check:
                run(server, page, name)


if __name__ == "__main__":
    main()
