"""Record, compare and gate in the real ComfyUI: stock torch networks, compiled ones, and what is connected wrongly."""
from __future__ import annotations

import itertools
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engines.alignment.recording import Recording
from tests.conftest import need
from tests.helpers import onnx_nets
from tests.host import expected
from tests.host.graphs import CATS, DOGS, Graph, latents, load_picture, pictures, plain_sentence, refusal
from tools.comfyui import ServerError
from tools.install import DEMO_CHECKPOINT

DEMO, ONNX = "shapes.safetensors", "shapes-onnx"
PROMPT, NEGATIVE = "a large red circle on a blue background", ""
NAMES = (f"run {number}" for number in itertools.count())


@pytest.fixture(scope="module", autouse=True)
def checkpoint():
    need(DEMO_CHECKPOINT.exists(), "the demo's checkpoint is not built: run 'python tools/install.py host'")


class Run:
    """A text-to-image run of which `parts` (model, clip, vae) are recorded."""

    def __init__(self, graph: Graph, parts, name: str | None = None, limit_mb: int = 64, prompts=(PROMPT, NEGATIVE),
                 **sampling):
        self.graph, self.name, self.parts = graph, name or next(NAMES), parts
        model, clip, vae = parts
        record = graph.SophgoRecord(name=self.name, limit_mb=limit_mb, model=model, clip=clip, vae=vae)
        self.recording, self.model, self.clip, self.vae = (record[slot] for slot in range(4))
        self.positive, self.negative = (graph.prompt(self.clip, text) for text in prompts)
        self.latent = graph.sample(self.model, self.positive, self.negative, graph.empty(),
                                   **{"steps": 3, "cfg": 3.0, **sampling})
        self.image = graph.VAEDecode(samples=self.latent, vae=self.vae)

    def file(self, base) -> Recording:
        return Recording.open(base / "output" / "recordings" / f"{self.name}.npz")


def white(graph):
    return graph.EmptyImage(width=64, height=64, batch_size=1, color=0xFFFFFF)


def torch_parts(graph):
    loader = graph.SophgoLoadReference(ckpt_name=DEMO)
    return loader[0], loader[1], loader[2]


def compare(run: Run, **inputs):
    return run.graph.SophgoParity(**{"reference": run.recording, "reference_images": run.image, "causes": "when it differs",
                                     **inputs})


def said(server, node) -> str:
    """The text of a comparison."""
    return server.run(node.graph)[node.id]["text"][0]


def fails(server, graph, *words) -> str:
    with pytest.raises(ServerError) as refused:
        server.run(graph)
    return plain_sentence(str(refused.value), *words)


# -- the reference -----------------------------------------------------------------------------------------------------
def test_reference_and_onnx_draw_the_same(server, graph):
    def picture(model, clip, vae):
        latent = graph.sample(model, graph.prompt(clip, PROMPT), graph.prompt(clip, NEGATIVE), graph.empty(), cfg=3.0)
        return graph.VAEDecode(samples=latent, vae=vae)
    reference, onnx = (pictures(server, picture(*parts)) for parts in (torch_parts(graph), graph.checkpoint(ONNX)))
    assert np.abs(reference - onnx).max() <= 1 and reference.std() > 20


def test_reference_takes_stock_nodes(server, graph):
    model, clip, vae = torch_parts(graph)
    merged = graph.ModelMergeSimple(model1=model, model2=model, ratio=0.5)
    skipped = graph.CLIPSetLastLayer(clip=clip, stop_at_clip_layer=-2)
    image = graph.VAEDecodeTiled(samples=graph.empty(), vae=vae, tile_size=64, overlap=0, temporal_size=64,
                                 temporal_overlap=8)
    encoded = graph.VAEEncode(pixels=image, vae=vae)
    plain, other = latents(server, graph.sample(merged, graph.prompt(clip, PROMPT), graph.prompt(clip, ""), encoded),
                           graph.sample(merged, graph.prompt(skipped, PROMPT), graph.prompt(clip, ""), encoded))
    assert np.isfinite(plain).all() and np.abs(plain - other).max() > 0.1


@pytest.fixture(scope="module")
def checkpoints(base):
    """Files that are no checkpoints for this loader."""
    folder, weights = base / "models" / "checkpoints", load_file(DEMO_CHECKPOINT)
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "no-metadata.safetensors")
    save_file({name: weight for name, weight in weights.items() if not name.startswith("first_stage")},
              folder / "no-vae.safetensors")
    save_file({"model.diffusion_model.x": torch.zeros(3)}, folder / "other.safetensors")
    wide = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    save_file(weights | {wide: torch.zeros(32, 2048)}, folder / "xl.safetensors")
    (folder / "short.safetensors").write_bytes(DEMO_CHECKPOINT.read_bytes()[:1_000_000])
    (folder / "garbage.safetensors").write_bytes(b"garbage" * 100)
    first = "model.diffusion_model.input_blocks.0.0.weight"
    inpaint = torch.cat([weights[first], torch.randn(32, 5, 3, 3).to(weights[first]) / 20], 1)
    gap = "model.diffusion_model.out.0.weight"
    metadata = {"sophgo_ascend": '{"unet": {"heads": 4, "groups": 4}, "vae": {"groups": 1}, "text_encoder": {"heads": 4}}'}
    save_file({name: weight for name, weight in weights.items() if name != gap}, folder / "gap.safetensors", metadata)
    save_file(weights | {first: inpaint}, folder / "inpaint.safetensors", metadata)


@pytest.mark.parametrize(("name", "words"), [
    ("no-metadata", ["32 wide", "sophgo_ascend"]), ("no-vae", ["no VAE"]), ("other", ["other.safetensors"]),
    ("xl", ["SDXL"]), ("short", ["cut short"]), ("garbage", ["damaged"]), ("gap", ["U-Net lacks out.0.weight"]),
    ("nothing", ["There is no checkpoint 'nothing.safetensors'", "there are:"]),
])
def test_checkpoints_that_are_none(server, checkpoints, graph, name, words):
    loader = graph.SophgoLoadReference(ckpt_name=f"{name}.safetensors")
    refusal(server, graph.VAEEncode(pixels=white(graph), vae=loader[2]), *words)


# -- recording ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("parts", [torch_parts, lambda graph: graph.checkpoint(ONNX)], ids=["torch", "compiled"])
def test_what_a_recording_holds(server, base, graph, parts):
    run = Run(graph, parts(graph))
    levels = pictures(server, run.image)
    found = run.file(base)
    assert [call.stage for call in found.calls] == ["text_encoder"] * 2 + ["unet"] * 3 + ["vae_decoder"]
    text, _, first, *_, last, decoded = found.calls
    assert text.inputs["ids"].shape == (1, 77) and text.outputs["hidden"].shape == (1, 77, 64)
    assert text.facts["part"] == "clip_l" and set(text.outputs) == {"hidden", "pooled"}
    assert first.inputs["timestep"].tolist() == [999, 999] and first.inputs["context"].shape == (2, 77, 64)
    assert {name: first.facts[name] for name in ("step", "steps", "cond_or_uncond")} == {
        "step": 1, "steps": 3, "cond_or_uncond": [1, 0]}
    assert last.facts["step"] == 3 and first.facts["sigma"] == pytest.approx(expected.SIGMAS[-1], rel=1e-5)
    image = np.clip((decoded.outputs["image"] + 1) / 2, 0, 1)
    np.testing.assert_array_equal((255 * image.transpose(0, 2, 3, 1)).astype(int), levels)
    assert set(found.networks) == {"text_encoder", "unet", "vae_decoder", "vae_encoder"}
    assert all(what.startswith("torch") or "onnxruntime" in what for what in found.networks.values())


def test_recorded_numbers_are_the_networks(server, base, graph):
    """With networks whose results can be computed by hand."""
    run = Run(graph, graph.checkpoint(), prompts=(CATS, DOGS))
    latents(server, run.latent)
    for call in run.file(base).of("unet"):
        wanted = onnx_nets.unet_result(call.inputs["latent"], call.inputs["timestep"], call.inputs["context"])
        expected.close(call.outputs["prediction"], wanted)
    for call in run.file(base).of("text_encoder"):
        prompt = CATS if expected.TOKENS["cat"] in call.inputs["ids"] else DOGS
        expected.close(call.outputs["hidden"][0], expected.hidden(prompt))


def test_recording_changes_nothing(server, base, graph):
    """Same numbers, and what is not connected through the recorder is not recorded."""
    parts = torch_parts(graph)
    run = Run(graph, parts, sampler_name="dpmpp_2m_sde")
    model, clip, _ = parts
    other = graph.sample(model, graph.prompt(clip, PROMPT), graph.prompt(clip, NEGATIVE), graph.empty(), steps=3, cfg=3.0,
                         sampler_name="dpmpp_2m_sde")
    recorded, plain = latents(server, run.latent, other)
    np.testing.assert_array_equal(recorded, plain)
    assert len(run.file(base).of("unet")) == 3 and len(run.file(base).of("text_encoder")) == 2


def test_copies_made_by_other_nodes_are_recorded(server, base, graph):
    """CLIP skip, patched models, image to image in tiles, and single steps."""
    run = Run(graph, torch_parts(graph))
    clip = graph.CLIPSetLastLayer(clip=run.clip, stop_at_clip_layer=-1)
    model = graph.RescaleCFG(model=run.model, multiplier=0.5)
    positive, negative = (graph.prompt(clip, text) for text in (PROMPT, NEGATIVE))
    start = graph.SophgoVAEEncode(pixels=white(graph), vae=run.vae, overlap=0)
    step = {"model": model, "positive": positive, "negative": negative, "steps": 3, "cfg": 3.0, "sampler_name": "euler",
            "scheduler": "simple", "seed": 0, "add_noise": True}
    one = graph.SophgoUNetStep(latent_image=start, step=1, **step)
    two = graph.SophgoUNetStep(latent_image=one, step=2, **step)
    pictures(server, graph.SophgoVAEDecode(samples=two, vae=run.vae, overlap=0))
    found = run.file(base)
    assert Counter(call.stage for call in found.calls) == {"vae_encoder": 1, "text_encoder": 2, "unet": 2, "vae_decoder": 1}
    assert found.of("vae_encoder")[0].inputs["image"].shape == (1, 3, 64, 64)


def test_two_recorders_in_a_row(server, base, graph):
    first = Run(graph, torch_parts(graph))
    second = Run(graph, (first.model, first.clip, first.vae))
    pictures(server, second.image)
    for run in (first, second):
        assert Counter(call.stage for call in run.file(base).calls) == {"text_encoder": 2, "unet": 3, "vae_decoder": 1}


def test_every_queue_is_a_new_recording(server, base, graph):
    """Nothing is cached, so that a recording is always of one whole run."""
    run = Run(graph, torch_parts(graph))
    node = compare(run, model=run.parts[0])
    for _ in range(2):
        assert "cosine" in said(server, node)
        assert len(run.file(base).of("unet")) == 3 and len(run.file(base).of("text_encoder")) == 2


def test_limit(server, base, graph):
    run = Run(graph, torch_parts(graph), limit_mb=1, steps=2)
    many = graph.empty(batch=80)         # of two calls of 160 rows each has 0.3 MB of latents and 3 MB of contexts
    graph[run.latent.id]["inputs"]["latent_image"] = [many.id, 0]
    text = said(server, compare(run, clip=run.parts[1]))
    found = run.file(base)
    assert found.full and [call.stage for call in found.calls] == ["text_encoder"] * 2 and "had reached its limit" in text
    assert (base / "output" / "recordings" / f"{run.name}.npz").stat().st_size < 1 << 20


def test_condition_and_uncondition_in_calls_of_their_own(server, base, graph):
    """cfg 1 asks for no uncondition: one row a call."""
    run = Run(graph, torch_parts(graph), cfg=1.0)
    latents(server, run.latent)
    assert [call.facts["cond_or_uncond"] for call in run.file(base).of("unet")] == [[0]] * 3


@pytest.mark.parametrize(("change", "words"), [
    ({"name": "../x"}, ["cannot be the name"]), ({"name": ""}, ["cannot be the name"]),
    ({"model": None, "clip": None, "vae": None}, ["nothing to record"]),
    ({"vae": None}, ["recorded VAE is used", "no VAE is connected"]),
])
def test_records_that_are_refused(server, graph, change, words):
    run = Run(graph, torch_parts(graph))
    record = graph[run.recording.id]["inputs"]
    for name, value in change.items():
        if value is None:
            del record[name]
        else:
            record[name] = value
    refusal(server, graph.VAEEncode(pixels=run.image, vae=run.parts[2]), *words)


def test_two_recordings_of_one_name(server, graph):
    run = Run(graph, torch_parts(graph))
    Run(graph, run.parts, name=run.name)
    refusal(server, run.latent, f"2 nodes of this workflow record as '{run.name}'")


@pytest.mark.parametrize(("sampler_name", "scheduler"), [
    ("euler_ancestral", "normal"), ("dpmpp_sde", "karras"), ("dpmpp_2m", "exponential"), ("lcm", "sgm_uniform"),
    ("uni_pc", "simple"), ("dpm_adaptive", "normal"),
])
def test_samplers(server, base, graph, sampler_name, scheduler):
    """Also those that call the network between the steps, as often as they like, or not at the last level."""
    run = Run(graph, torch_parts(graph), sampler_name=sampler_name, scheduler=scheduler)
    text = said(server, compare(run, model=run.parts[0]))
    steps = [call.facts["step"] for call in run.file(base).of("unet")]
    assert steps[0] == 1 and steps[-1] == 3 and steps == sorted(steps) and run.file(base).stopped_at == ""
    assert "The U-Net answers exactly as the reference does." in text, text


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_batches_and_areas(server, base, graph, cfg):
    """Rows that differ in number and size from call to call."""
    parts = torch_parts(graph)
    runs = [Run(graph, parts, cfg=cfg), Run(graph, parts, cfg=cfg)]
    for run in runs:
        area = graph.ConditioningSetArea(conditioning=graph.prompt(run.clip, "a small star"), width=64, height=64, x=64, y=0,
                                         strength=1.0)
        both = graph.ConditioningCombine(conditioning_1=run.positive, conditioning_2=area)
        graph[run.latent.id]["inputs"] |= {"positive": [both.id, 0], "latent_image": [graph.empty(128, batch=2).id, 0]}
    text = said(server, compare(runs[0], model=parts[0], clip=parts[1], candidate=runs[1].recording,
                                candidate_images=runs[1].image))
    assert "The U-Net answers exactly" in text and "The pictures are equal." in text and "No classic cause" in text, text
    assert {call.inputs["latent"].shape[-1] for call in runs[0].file(base).of("unet")} == {8, 16}


def test_a_picture_in_tiles(server, base, graph):
    """Image to image; each tile is a call."""
    run = Run(graph, torch_parts(graph), denoise=0.5)
    wide = graph.EmptyImage(width=128, height=64, batch_size=1, color=0xFF8800)
    graph[run.latent.id]["inputs"]["latent_image"] = [graph.VAEEncode(pixels=wide, vae=run.vae).id, 0]
    tiled = graph.VAEDecodeTiled(samples=run.latent, vae=run.vae, tile_size=64, overlap=32, temporal_size=64,
                                 temporal_overlap=8)
    model, clip, vae = run.parts
    text = said(server, compare(run, reference_images=tiled, model=model, clip=clip, vae=vae))
    assert "No classic cause" in text and "VAE encoder" in text, text
    assert len(run.file(base).of("vae_decoder")) > 3


def test_an_inpainting_model(server, base, checkpoints, graph):
    """Nine channels: latent, mask and the picture without what is masked."""
    loader = graph.SophgoLoadReference(ckpt_name="inpaint.safetensors")
    run = Run(graph, (loader[0], loader[1], loader[2]))
    made = graph.InpaintModelConditioning(positive=run.positive, negative=run.negative, vae=run.vae, pixels=white(graph),
                                          mask=graph.SolidMask(value=1.0, width=64, height=64), noise_mask=True)
    graph[run.latent.id]["inputs"] |= {"positive": [made.id, 0], "negative": [made.id, 1], "latent_image": [made.id, 2]}
    assert "answers exactly" in said(server, compare(run, model=run.parts[0]))
    assert run.file(base).of("unet")[0].inputs["latent"].shape == (2, 9, 8, 8)
    other = Graph()
    loaded = other.SophgoLoadRecording(recording_name=run.name)
    other.SophgoParity(reference=loaded, causes="no", model=torch_parts(other)[0])
    fails(server, other, "U-Net cannot take what the recording holds at step 1 of 3", "latent [2, 9, 8, 8]", "one family")


def test_sdxl(server, base, tiny_sdxl, graph):
    """Two text encoders and a vector beside the context; a sampler that makes no single calls says what to do."""
    run = Run(graph, graph.sdxl(), steps=2)
    model, clip, vae = run.parts
    text = said(server, compare(run, model=model, clip=clip, vae=vae))
    assert "The U-Net answers exactly" in text and text.count("text encoder  4") == 2, text
    assert {"y", "context"} < set(run.file(base).of("unet")[0].inputs)
    refusal(server, graph.sample_sdxl(run.model, *graph.condition(clip, "a star"), graph.empty()), "SophgoRecord",
            "use KSampler")
    for part, words in ((0, "U-Net cannot take"), (1, "text encoder 'clip_g'")):
        other = Graph()
        loaded = other.SophgoLoadRecording(recording_name=run.name)
        other.SophgoParity(reference=loaded, causes="no", **{"model" if part == 0 else "clip": torch_parts(other)[part]})
        fails(server, other, words, "one family")


def test_two_runs_queued_at_once(server, base, graph):
    """One after the other, each its own recording."""
    run = Run(graph, torch_parts(graph))
    node = compare(run, model=run.parts[0])
    with ThreadPoolExecutor() as pool:
        outputs = list(pool.map(lambda _: server.run(graph), range(2)))
    assert all("answers exactly" in found[node.id]["text"][0] for found in outputs)
    assert len(run.file(base).of("unet")) == 3


def test_an_interrupted_run(server, base, graph):
    """What it did is there and says so; the next run is whole."""
    whole, other = Run(graph, torch_parts(graph)), Graph()
    run = Run(other, torch_parts(other), name="interrupted", steps=2000)
    pictures(server, whole.image)
    other.SaveImage(images=run.image, filename_prefix="never")
    path = base / "output" / "recordings" / "interrupted.npz"

    def interrupt():
        while not path.exists() or path.stat().st_size < 100_000:      # two calls of the text encoder, some of the U-Net
            time.sleep(0.05)
        server.post("/interrupt")
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(interrupt)
        with pytest.raises(ServerError, match="^interrupted$"):
            server.run(other)
        waiting.result()
    early = run.file(base)
    assert early.stopped_at and early.stopped_at.endswith("of 2000")
    later = Graph()
    loaded = [later.SophgoLoadRecording(recording_name=name) for name in (whole.name, "interrupted")]
    later.SophgoParity(reference=loaded[0], causes="no", candidate=loaded[1])
    fails(server, later, "'interrupted' ends at step", "record it again")
    fresh = Graph()
    again = Run(fresh, torch_parts(fresh), name="interrupted")
    pictures(server, again.image)
    assert len(again.file(base).of("unet")) == 3 and not again.file(base).stopped_at


def test_a_recording_that_would_replace_the_one_it_is_compared_with(server, graph):
    run = Run(graph, torch_parts(graph))
    pictures(server, run.image)
    compare(run, reference=graph.SophgoLoadRecording(recording_name=run.name), candidate=run.recording)
    fails(server, graph, f"loads the recording '{run.name}' and would replace it", "another name")


# -- comparing ---------------------------------------------------------------------------------------------------------
def test_torch_and_onnx_compared(server, base, graph):
    reference = Run(graph, torch_parts(graph))
    candidate = Run(graph, graph.checkpoint(ONNX))
    model, clip, vae = candidate.parts
    node = compare(reference, model=model, clip=clip, vae=vae, candidate=candidate.recording,
                   candidate_images=candidate.image)
    gate = graph.SophgoParityGate(parity=node[2], min_cosine=0.99999, min_cosine_free=0.9999, min_psnr=50.0,
                                  image=candidate.image)
    plot = graph.SaveImage(images=node[1], filename_prefix="plot")
    passed = graph.SaveImage(images=gate, filename_prefix="passed")
    outputs = server.run(graph)
    text = outputs[node.id]["text"][0]
    assert "that of single precision" in text and "No classic cause" in text and "PSNR" in text, text
    for line in ("text encoder  1     hidden", "U-Net         3/3   prediction", "VAE decoder   1     image"):
        assert text.count(line) == 2, text
    assert "torch UNetModel, float32" in text and "unet.onnx on onnx" in text
    assert outputs[plot.id]["images"] and outputs[passed.id]["images"]


def test_a_recording_loaded_later(server, base, graph):
    run = Run(graph, torch_parts(graph))
    latents(server, run.latent)
    later = Graph()
    loaded = later.SophgoLoadRecording(recording_name=run.name)
    model, clip, vae = later.checkpoint(ONNX)
    node = later.SophgoParity(reference=loaded, causes="no", model=model, clip=clip, vae=vae)
    text = said(server, node)
    assert "3/3   prediction" in text and "has no call of the VAE decoder" in text


def test_causes_are_told(server, graph):
    """Of a VAE with the wrong latent_scale, forced, and of prompts in each other's place, free."""
    reference = Run(graph, graph.checkpoint(ONNX))
    wrong = graph.SophgoLoadVAE(decoder_name=ONNX, encoder_name="same", device="auto", latent_scale="inside")
    exchanged = Run(graph, graph.checkpoint(ONNX), prompts=(NEGATIVE, PROMPT))
    text = said(server, compare(reference, vae=wrong, candidate=exchanged.recording, candidate_images=exchanged.image))
    assert "latent scale 0.18215 is not applied at all" in text and "Condition and uncondition are exchanged" in text, text


def test_nan_is_told_with_its_step(server, base, graph):
    """A compiled U-Net that overflows at one timestep, compared with one that does not."""
    onnx_nets.unet(base / "models" / "sophgo" / "overflows.onnx", nan_at=666)
    run = Run(graph, graph.checkpoint(), prompts=(CATS, DOGS))
    bad = graph.SophgoLoadUNet(unet_name="overflows.onnx", device="auto")
    node = compare(run, model=bad)
    text = said(server, node)
    assert "not finite" in text and "NaN or infinite values at step 2 of 3" in text, text
    graph.SophgoParityGate(parity=node[2], min_cosine=0.0, min_cosine_free=0.0, min_psnr=0.0)
    fails(server, graph, "U-Net, step 2 of 3, prediction, teacher-forced", "NaN")


@pytest.mark.parametrize(("thresholds", "words"), [
    ({"min_cosine": 0.9999}, ["U-Net, step 1 of 3, prediction, teacher-forced", "0.9999"]),
    ({"min_cosine_free": 0.9999}, ["free-running"]), ({"min_psnr": 60.0}, ["PSNR", "60 dB"]),
])
def test_gate_that_stays_shut(server, graph, thresholds, words):
    """The arithmetic networks are another model altogether."""
    reference = Run(graph, graph.checkpoint(ONNX))
    other = Run(graph, graph.checkpoint(ONNX), prompts=("a small green star", ""))
    skewed = graph.SophgoLoadUNet(unet_name="arithmetic/unet_8x8.onnx", device="auto")
    node = compare(reference, causes="no", model=skewed, candidate=other.recording, candidate_images=other.image)
    gate = graph.SophgoParityGate(parity=node[2], latent=reference.latent,
                                  **{"min_cosine": 0.0, "min_cosine_free": 0.0, "min_psnr": 0.0, **thresholds})
    refusal(server, gate[1], *words)


def test_gate_with_nothing_to_pass(server, graph):
    run = Run(graph, torch_parts(graph))
    parity = compare(run, model=run.parts[0])[2]
    gate = graph.SophgoParityGate(parity=parity, min_cosine=0.9, min_cosine_free=0.0, min_psnr=0.0)
    refusal(server, gate[1], "gate's latent is used", "connect one")


@pytest.mark.parametrize(("change", "words"), [
    ({"reference_images": None}, ["no call of its", "connect the pictures"]),
    ({"model": None}, ["nothing to compare"]),
    ({"causes": "perhaps"}, ["causes cannot be 'perhaps'"]),
])
def test_comparisons_that_are_refused(server, graph, change, words):
    run = Run(graph, torch_parts(graph))
    inputs = {"model": run.parts[0], **change}
    compare(run, **{name: value for name, value in inputs.items() if value is not None})
    for name, value in change.items():
        if value is None:
            graph[str(len(graph))]["inputs"].pop(name, None)
    fails(server, graph, *words)


def test_runs_of_another_batch_or_seed(server, graph):
    reference, two, seed = (Run(graph, torch_parts(graph), **more) for more in ({}, {}, {"seed": 5}))
    graph[two.latent.id]["inputs"]["latent_image"] = [graph.empty(batch=2).id, 0]
    text = said(server, compare(reference, candidate=seed.recording, candidate_images=seed.image))
    assert "do not belong together: they do not start from the same latent" in text, text
    compare(reference, candidate=two.recording, candidate_images=two.image)
    fails(server, graph, "calls the U-Net with 6 rows in all", "12 rows in all", "batch size")


def test_runs_of_another_length(server, graph):
    reference, longer = Run(graph, torch_parts(graph)), Run(graph, torch_parts(graph), steps=4)
    compare(reference, candidate=longer.recording, candidate_images=longer.image)
    fails(server, graph, "calls the U-Net 3 times", "4 times")


def test_conditioning_of_another_width(server, graph):
    """A recording of one model through a U-Net of another: the sentence of the U-Net."""
    run = Run(graph, torch_parts(graph), steps=1)
    wide = graph.SophgoLoadUNet(unet_name="wide.onnx", device="auto")
    onnx_nets.unet(server.base / "models" / "sophgo" / "wide.onnx", width=128)
    compare(run, model=wide)
    fails(server, graph, "64 wide", "128")


@pytest.mark.parametrize(("name", "words"), [("nothing", ["There is no recording"]), ("../x", ["cannot be the name"]),
                                             ("damaged", ["damaged.npz is no recording"])])
def test_recordings_that_are_none(server, base, graph, name, words):
    (base / "output" / "recordings").mkdir(parents=True, exist_ok=True)
    (base / "output" / "recordings" / "damaged.npz").write_bytes(b"PK\x03\x04 nothing")
    loaded = graph.SophgoLoadRecording(recording_name=name)
    graph.PreviewAny(source=loaded[1])
    fails(server, graph, *words)


def test_controlnet_residuals(server, base, graph):
    """They are recorded at their places, replayed, and found out where they are exchanged."""
    parts = torch_parts(graph)
    hint = load_picture(graph, base, np.full((64, 64, 3), 128))

    def controlled(order: str) -> Run:
        run = Run(graph, parts)
        applied = graph.ControlNetApplyAdvanced(
            positive=run.positive, negative=run.negative, control_net=graph.TestControlNet(order=order, kind="controlnet"),
            image=hint, strength=0.5, start_percent=0.0, end_percent=1.0)
        graph[run.latent.id]["inputs"] |= {"positive": [applied.id, 0], "negative": [applied.id, 1]}
        return run
    reference, exchanged = controlled("0123"), controlled("1023")
    text = said(server, compare(reference, model=parts[0], candidate=exchanged.recording, candidate_images=exchanged.image))
    call = reference.file(base).of("unet")[0]
    assert {name: array.shape[1:] for name, array in call.inputs.items() if name.startswith("residual.")} == {
        "residual.0": (32, 8, 8), "residual.1": (32, 8, 8), "residual.2": (32, 4, 4), "residual.3": (64, 4, 4),
        "residual.mid": (64, 4, 4)}
    assert "U-Net  1/3   prediction  0.00e+00  0.00e+00  0.00e+00  1.0000000" in text, text
    assert "residual.1 as residual.0, residual.0 as residual.1" in text, text
