"""Every shipped workflow runs as it is, without an accelerator, on a server that has nothing but the pack."""
from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image

from demo.shapes import Attributes
from tests.conftest import need
from tools.install import CHIPS, DEMO_SDXL, MINDSPORE, PACK, SIMULATOR

WORKFLOWS = PACK / "workflows"
NAMES = sorted(path.stem for path in (WORKFLOWS / "api").glob("*.json"))
# What their prompts ask for: shape, colour, background, size, position.
ASKED = {
    "Sophgo text to image": Attributes("circle", "red", "white", "large", "center"),
    "Ascend SDXL text to image": Attributes("star", "yellow", "blue", "large", "center"),
    "Ascend SDXL KSampler": Attributes("star", "red", "white", "large", "center"),
    "Ascend SDXL image to image": Attributes("heart", "orange", "white", "large", "center"),
    "Ascend and Sophgo mixed": Attributes("triangle", "green", "yellow", "large", "center"),
}


def api(name: str) -> dict:
    return json.loads((WORKFLOWS / "api" / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module", autouse=True)
def stand_ins_for_accelerators():
    need(all((SIMULATOR / chip / "libcmodel.so").exists() for chip in CHIPS),
         "Sophgo's simulator is not installed: run 'python tools/install.py simulator'")
    need((MINDSPORE / "bin" / "python").exists() and DEMO_SDXL.exists(),
         "MindSpore is not installed: run 'python tools/install.py mindspore'")


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_and_makes_its_picture(server, name):
    ran, nodes = set(), api(name)
    outputs = server.run(nodes, lambda kind, data: ran.add(data.get("node")) if kind == "executing" else None)
    shown = {node: [picture(server, image) for image in output.get("images", [])] for node, output in outputs.items()}
    assert any(shown.values()) or any(output.get("text") for output in outputs.values())
    assert all(one.std() > 5 for images in shown.values() for one in images), "a blank picture"
    if name in ASKED:
        from demo.score import judged
        saved = [one for node, images in shown.items() if nodes[node]["class_type"] == "SaveImage" for one in images]
        assert judged(np.stack(saved)).tolist() == [list(ASKED[name].labels())] * len(saved)


def picture(server, image: dict) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(server.picture(image))).convert("RGB"))


@pytest.mark.parametrize("name", NAMES)
def test_template_and_twin_belong_together(server, name):
    """The template in the browser holds the same nodes as the API file, has a picture, and asks for no one's device."""
    template = json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))
    notes = {"Note", "MarkdownNote"}
    assert (sorted(node["type"] for node in template["nodes"] if node["type"] not in notes)
            == sorted(node["class_type"] for node in api(name).values()))
    assert any(node["type"] in notes for node in template["nodes"])
    assert Image.open(WORKFLOWS / f"{name}.jpg").size[0] >= 128
    assert {node["inputs"]["device"] for node in api(name).values() if "device" in node["inputs"]} <= {"auto"}


def test_the_browser_lists_exactly_our_templates(server):
    listed = server.get("/api/workflow_templates")
    mine = next(names for pack, names in listed.items() if pack.startswith("sophgo-ascend"))
    assert sorted(mine) == NAMES
