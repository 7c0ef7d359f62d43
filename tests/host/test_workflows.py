"""Every shipped workflow runs as it is, on the simulator, on a server that has nothing but the pack."""
from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image

from tests.conftest import need
from tools.install import CHIPS, PACK, SIMULATOR

WORKFLOWS = PACK / "workflows"
NAMES = sorted(path.stem for path in (WORKFLOWS / "api").glob("*.json"))


def api(name: str) -> dict:
    return json.loads((WORKFLOWS / "api" / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module", autouse=True)
def simulator():
    need(all((SIMULATOR / chip / "libcmodel.so").exists() for chip in CHIPS),
         "Sophgo's simulator is not installed: run 'python tools/install.py simulator'")


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_and_makes_its_picture(server, name):
    ran, nodes = set(), api(name)
    outputs = server.run(nodes, lambda kind, data: ran.add(data.get("node")) if kind == "executing" else None)
    pictures = [image for output in outputs.values() for image in output.get("images", [])]
    for image in pictures:
        picture = np.asarray(Image.open(io.BytesIO(server.picture(image))).convert("RGB"), np.float32)
        assert picture.std() > 5, "a blank picture"
    assert pictures or any(output.get("text") for output in outputs.values())


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
