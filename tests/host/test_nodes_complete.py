"""Every node of the pack is complete: texts in both languages, help, a template, and an API that does not change.

Everything is read from the running server, as the frontend reads it. Only the API is written down here.
"""
from __future__ import annotations

import json
import urllib.error

import pytest

from tools.comfyui import PACK_NAME
from tools.install import PACK

MODULE = f"custom_nodes.{PACK_NAME}"
CATEGORY = "Sophgo & Ascend"
LANGUAGES = ("en", "zh")
COMPILED_BY_VUE_I18N = set("{}@|")      # the frontend would read these as its own syntax, not as text
HELP_CHARACTERS = 300

# Node ids, input ids, and the order of inputs and outputs are what saved workflows hold: a change breaks them.
API = {
    "SophgoLoadCheckpoint": (
        {"model_name": "COMBO", "device": "COMBO", "unet_device": "COMBO", "long_prompts": "COMBO"},
        {"MODEL": "MODEL", "CLIP": "CLIP", "VAE": "VAE"}),
    "SophgoLoadUNet": (
        {"unet_name": "COMBO", "device": "COMBO"},
        {"MODEL": "MODEL"}),
    "SophgoLoadCLIP": (
        {"clip_name": "COMBO", "device": "COMBO", "long_prompts": "COMBO"},
        {"CLIP": "CLIP"}),
    "SophgoLoadVAE": (
        {"decoder_name": "COMBO", "encoder_name": "COMBO", "device": "COMBO", "latent_scale": "COMBO"},
        {"VAE": "VAE"}),
    "SophgoTextEncode": (
        {"clip": "CLIP", "prompt": "STRING", "negative_prompt": "STRING"},
        {"positive": "CONDITIONING", "negative": "CONDITIONING"}),
    "SophgoUNetStep": (
        {"model": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING", "latent_image": "LATENT", "step": "INT",
         "steps": "INT", "cfg": "FLOAT", "sampler_name": "COMBO", "scheduler": "COMBO", "seed": "INT",
         "add_noise": "BOOLEAN"},
        {"latent": "LATENT", "denoised": "LATENT"}),
    "SophgoVAEDecode": (
        {"samples": "LATENT", "vae": "VAE", "overlap": "INT"},
        {"IMAGE": "IMAGE"}),
    "SophgoVAEEncode": (
        {"pixels": "IMAGE", "vae": "VAE", "overlap": "INT"},
        {"LATENT": "LATENT"}),
    "SophgoInspect": (
        {"file_name": "COMBO"},
        {"STRING": "STRING"}),
    "SophgoCompile": (
        {"name": "STRING", "chip": "COMBO", "model_precision": "COMBO", "clip_precision": "COMBO", "vae_precision": "COMBO",
         "sizes": "STRING", "batch_size": "INT", "controlnet": "BOOLEAN", "context_length": "INT", "verify_minutes": "FLOAT",
         "dry_run": "BOOLEAN", "model": "MODEL", "clip": "CLIP", "vae": "VAE"},
        {"STRING": "STRING"}),
    "SophgoLoadReference": (
        {"ckpt_name": "COMBO"},
        {"MODEL": "MODEL", "CLIP": "CLIP", "VAE": "VAE"}),
    "SophgoRecord": (
        {"name": "STRING", "limit_mb": "INT", "model": "MODEL", "clip": "CLIP", "vae": "VAE"},
        {"recording": "SOPHGO_RECORDING", "MODEL": "MODEL", "CLIP": "CLIP", "VAE": "VAE"}),
    "SophgoLoadRecording": (
        {"recording_name": "COMBO"},
        {"recording": "SOPHGO_RECORDING", "text": "STRING"}),
    "SophgoParity": (
        {"reference": "SOPHGO_RECORDING", "causes": "COMBO", "reference_images": "IMAGE", "model": "MODEL", "clip": "CLIP",
         "vae": "VAE", "candidate": "SOPHGO_RECORDING", "candidate_images": "IMAGE"},
        {"text": "STRING", "plot": "IMAGE", "parity": "SOPHGO_PARITY"}),
    "SophgoParityGate": (
        {"parity": "SOPHGO_PARITY", "min_cosine": "FLOAT", "min_cosine_free": "FLOAT", "min_psnr": "FLOAT", "image": "IMAGE",
         "latent": "LATENT"},
        {"IMAGE": "IMAGE", "LATENT": "LATENT"}),
    "AscendLoadSDXL": (
        {"model_name": "COMBO", "device": "COMBO", "precision": "COMBO"},
        {"MODEL": "MODEL", "CLIP": "CLIP", "VAE": "VAE"}),
    "AscendSDXLConditioner": (
        {"clip": "CLIP", "prompt": "STRING", "negative_prompt": "STRING", "original_width": "INT", "original_height": "INT",
         "crop_top": "INT", "crop_left": "INT", "target_width": "INT", "target_height": "INT", "unconditional": "COMBO"},
        {"positive": "CONDITIONING", "negative": "CONDITIONING"}),
    "AscendSDXLSampler": (
        {"model": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING", "latent_image": "LATENT", "seed": "INT",
         "steps": "INT", "cfg": "FLOAT", "denoise": "FLOAT", "sampler_name": "COMBO", "discretization": "COMBO",
         "guider": "COMBO", "s_churn": "FLOAT", "s_tmin": "FLOAT", "s_tmax": "FLOAT", "s_noise": "FLOAT",
         "snap_sigmas": "BOOLEAN", "noise": "COMBO"},
        {"latent": "LATENT"}),
    "AscendVAEDecode": (
        {"samples": "LATENT", "vae": "VAE"},
        {"image": "IMAGE"}),
    "AscendVAEEncode": (
        {"pixels": "IMAGE", "vae": "VAE"},
        {"latent": "LATENT"}),
}


@pytest.fixture(scope="module")
def nodes(server) -> dict[str, dict]:
    """Node id -> what /object_info says of it, for the nodes of this pack."""
    return {id: node for id, node in server.get("/object_info").items() if node["python_module"] == MODULE}


@pytest.fixture(scope="module")
def served_texts(server) -> dict:
    return server.get("/i18n")


@pytest.fixture(scope="module")
def templates() -> dict[str, set[str]]:
    """File name -> node types in it, subgraphs included."""
    found = {}
    for path in sorted((PACK / "workflows").glob("*.json")):
        workflow = json.loads(path.read_text(encoding="utf-8"))
        graphs = [workflow, *workflow.get("definitions", {}).get("subgraphs", [])]
        found[path.name] = {node["type"] for graph in graphs for node in graph["nodes"]}
    return found


def inputs_of(node: dict) -> dict[str, list]:
    """Input id -> [type, options], in the order of the schema, hidden ones left out."""
    return {id: node["input"][kind][id] for kind in ("required", "optional") for id in node["input_order"].get(kind, ())}


def gaps(nodes: dict[str, dict], check) -> list[str]:
    """What `check(id, node)` finds missing, over all nodes: one line each, so that a failure lists everything."""
    return [f"{id}: {gap}" for id, node in nodes.items() for gap in check(id, node)]


def test_api_is_what_saved_workflows_expect(nodes):
    found = {id: ([(name, spec[0]) for name, spec in inputs_of(node).items()],
                  list(zip(node["output_name"], node["output"]))) for id, node in nodes.items()}
    assert found == {id: (list(inputs.items()), list(outputs.items())) for id, (inputs, outputs) in API.items()}


def test_schema_is_complete(nodes):
    def check(id, node):
        for field in ("display_name", "description", "search_aliases"):
            if not node.get(field):
                yield f"no {field}"
        if node["display_name"] == id:
            yield "the display name is the id"
        if node["category"].split("/")[0] != CATEGORY:
            yield f"category '{node['category']}' is not under '{CATEGORY}'"
        for name, (_, options) in inputs_of(node).items():
            if not options.get("tooltip"):
                yield f"input {name} has no tooltip"
        tooltips = node.get("output_tooltips") or ()
        for index, name in enumerate(node["output_name"]):
            if index >= len(tooltips) or not tooltips[index]:
                yield f"output {name} has no tooltip"
        if len(set(node["output_name"])) < len(node["output_name"]):
            yield f"outputs cannot be told apart: {node['output_name']}"
    assert not gaps(nodes, check)


@pytest.mark.parametrize("language", LANGUAGES)
def test_texts_are_complete(nodes, language):
    texts = read_texts(language)

    def check(id, node):
        said = texts.get(id, {})
        for field in ("display_name", "description"):
            if not said.get(field):
                yield f"no {field}"
        if list(said.get("inputs", {})) != list(inputs_of(node)):
            yield f"texts for inputs {list(said.get('inputs', {}))}, the schema has {list(inputs_of(node))}"
        if list(said.get("outputs", {})) != [str(index) for index in range(len(node["output"]))]:
            yield f"texts for outputs {list(said.get('outputs', {}))}, the schema has {len(node['output'])}"
        for side in ("inputs", "outputs"):
            for port, text in said.get(side, {}).items():
                if not text.get("name") or not text.get("tooltip"):
                    yield f"{side} {port} lacks a name or a tooltip"
        for text in strings(said):
            if COMPILED_BY_VUE_I18N & set(text):
                yield f"the frontend cannot show {sorted(COMPILED_BY_VUE_I18N)} as they are: {text}"
    assert not gaps(nodes, check)
    assert not set(texts) - set(nodes), "texts for nodes that do not exist"


def test_english_texts_are_the_schema(nodes):
    texts = read_texts("en")

    def check(id, node):
        said = texts[id]
        for field in ("display_name", "description"):
            if said[field] != node[field]:
                yield f"{field} is '{node[field]}', its text '{said[field]}'"
        for name, (_, options) in inputs_of(node).items():
            if said["inputs"][name] != {"name": name, "tooltip": options["tooltip"]}:
                yield f"input {name} is '{options['tooltip']}', its text {said['inputs'][name]}"
        for index, (name, kind, tooltip) in enumerate(zip(node["output_name"], node["output"], node["output_tooltips"])):
            text = said["outputs"][str(index)]
            if text["tooltip"] != tooltip or (name != kind and text["name"] != name):
                yield f"output {name} is '{tooltip}', its text {text}"
    assert not gaps(nodes, check)


def test_chinese_texts_are_chinese():
    def check(id, said):
        texts = {field: said[field] for field in ("display_name", "description")}
        texts |= {f"{side} {port}": text["tooltip"] for side in ("inputs", "outputs") for port, text in said[side].items()}
        yield from (f"{field} is not translated: {text}" for field, text in texts.items() if not is_chinese(text))
    assert not gaps(read_texts("zh"), check)


@pytest.mark.parametrize("language", LANGUAGES)
def test_server_hands_out_the_texts(served_texts, language):
    ours = read_texts(language)
    served = served_texts[language]["nodeDefs"]
    assert {id: served.get(id) for id in ours} == ours


def test_frontend_is_told_to_load_the_texts(server):
    """For frontends that lose what /i18n says; see web/texts.js."""
    assert f"/extensions/{PACK_NAME}/texts.js" in server.get("/extensions")


@pytest.mark.parametrize("language", LANGUAGES)
def test_help_is_there(server, nodes, language):
    """At the address where the frontend looks when someone asks for help on a node."""
    def check(id, node):
        try:
            page = server.read(f"/extensions/{PACK_NAME}/docs/{id}/{language}.md").decode("utf-8")
        except urllib.error.HTTPError as error:
            yield f"no help: {error}"
            return
        if len(page) < HELP_CHARACTERS:
            yield f"the help is {len(page)} characters long"
        if is_chinese(page) != (language == "zh"):
            yield "the help is in another language"
        outputs = [text["name"] for text in read_texts("en")[id]["outputs"].values()]
        yield from (f"the help does not name {name}" for name in [*inputs_of(node), *outputs] if f"`{name}`" not in page)
    assert not gaps(nodes, check)


def test_every_node_is_in_a_template(nodes, templates):
    used = set().union(*templates.values()) if templates else set()
    assert not sorted(set(nodes) - used), f"not in any of {sorted(templates)}"


def read_texts(language: str) -> dict[str, dict]:
    return json.loads((PACK / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))


def strings(value) -> list[str]:
    return [value] if isinstance(value, str) else [text for item in value.values() for text in strings(item)]


def is_chinese(text: str) -> bool:
    return any("\u4e00" <= character <= "\u9fff" for character in text)
