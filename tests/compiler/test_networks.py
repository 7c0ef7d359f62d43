"""The graphs built from a checkpoint compute what torch computes, and are what accelerators' compilers want."""
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file

from compiler import networks
from compiler.checkpoint import Checkpoint
from compiler.errors import CompilerError
from compiler.networks import Graph, Weights, check, text_encoder, unet, vae_decoder, vae_encoder
from demo import checkpoint as demo
from demo import export
from engines.files import read_model
from engines.roles import identify
from tests.helpers.sd15 import write_sparse

MAKERS = {
    "text_encoder": ("text_encoder", text_encoder),
    "unet": ("unet", lambda part, weights: unet(part, weights, 64, 64)),
    "vae_decoder": ("vae", lambda part, weights: vae_decoder(part, weights, 64, 64)),
    "vae_encoder": ("vae", lambda part, weights: vae_encoder(part, weights, 64, 64)),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Checkpoint:
    return Checkpoint(demo.write(tmp_path_factory.mktemp("checkpoint") / "shapes.safetensors"))


@pytest.fixture(scope="module")
def stages() -> dict[str, export.Stage]:
    """The same networks in torch, with inputs."""
    return {stage.name: stage for stage in export.stages()}


def build(part, make, folder: Path, file: str = "weights") -> tuple[Graph, Path]:
    with Weights(folder / file) as weights:
        graph = make(part, weights)
        return graph, graph.save(folder)


def run(path: Path, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, feeds)


def close(got: np.ndarray, wanted: torch.Tensor) -> None:
    """To the rounding of float32: 1e-5 of the largest number."""
    wanted = wanted.numpy()
    assert got.shape == wanted.shape
    assert np.abs(got - wanted).max() <= 1e-5 * max(1, np.abs(wanted).max())


@pytest.mark.parametrize("name", MAKERS)
def test_a_stage_computes_what_torch_computes(checkpoint, stages, tmp_path, name):
    kind, make = MAKERS[name]
    graph, path = build(checkpoint.part(kind), make, tmp_path)
    stage = stages[name]
    feeds = dict(zip([value.name for value in graph.inputs], [tensor.numpy() for tensor in stage.inputs.values()]))
    for got, wanted in zip(run(path, feeds), stage(), strict=True):
        close(got, wanted)
    network = read_model(path).networks[0]
    assert identify(network).role == name and not network.dynamic
    assert [port.shapes[0] for port in network.outputs] == [value.shape for value in graph.outputs]


def test_residuals_are_added_where_diffusers_adds_them(checkpoint, stages, tmp_path):
    """Each of its own random numbers, so that no two can be swapped unnoticed."""
    part, stage = checkpoint.part("unet"), stages["unet"]
    _, path = build(part, lambda part, weights: unet(part, weights, 64, 64, control=True), tmp_path)
    binding = identify(read_model(path).networks[0])
    rng = np.random.default_rng(0)
    shapes = networks.residual_shapes(part, 2, 8, 8)
    residuals = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    names = [port.name for port in read_model(path).networks[0].inputs]
    assert {role: names[index] for role, index in binding.inputs.items() if role.startswith("residual")} == {
        f"residual.{name.removeprefix('residual_')}": name for name in residuals}
    latent, timestep, context = stage.inputs.values()
    with torch.no_grad():
        wanted = stage.module.unet(
            latent, timestep, context, return_dict=False,
            mid_block_additional_residual=torch.from_numpy(residuals["residual_mid"]),
            down_block_additional_residuals=[torch.from_numpy(residuals[f"residual_{i}"]) for i in range(len(shapes) - 1)],
        )[0]
    feeds = {"latent": latent.numpy(), "timestep": timestep.numpy(), "context": context.numpy()}
    close(run(path, feeds | residuals)[0], wanted)
    zeros = {name: np.zeros_like(array) for name, array in residuals.items()}
    close(run(path, feeds | zeros)[0], stage()[0])


def test_clip_skip_leaves_out_the_last_layers_and_keeps_the_pooled_row(checkpoint, stages, tmp_path):
    stage = stages["text_encoder"]
    _, path = build(checkpoint.part("text_encoder"), lambda part, weights: text_encoder(part, weights, skip=1), tmp_path)
    model, ids = stage.module.encoder, stage.inputs["input_ids"]
    with torch.no_grad():
        states = model(ids, attention_mask=stage.module.mask, output_hidden_states=True)
        wanted = model.final_layer_norm(states.hidden_states[-2])
    hidden, pooled = run(path, {"input_ids": ids.numpy()})
    close(hidden, wanted)
    close(pooled, stage()[1])


def test_several_sizes_share_one_file_of_weights(checkpoint, tmp_path):
    part = checkpoint.part("unet")
    with Weights(tmp_path / "unet.weights") as weights:
        unet(part, weights, 64, 64).save(tmp_path)
        size = weights.file.tell()
        wide = unet(part, weights, 128, 64, batch=1, tokens=154).save(tmp_path)
        assert weights.file.tell() == size
    inputs = {port.name: port.shapes[0] for port in read_model(wide).networks[0].inputs}
    assert inputs == {"latent": (1, 4, 8, 16), "timestep": (1,), "context": (1, 154, 64)}
    rng = np.random.default_rng(0)
    latent, context = rng.standard_normal((1, 4, 8, 16)), rng.standard_normal((1, 77, 64))
    feeds = {"latent": latent.astype(np.float32), "timestep": np.array([7]), "context": np.tile(context, (1, 2, 1))}
    twice = run(wide, feeds | {"context": feeds["context"].astype(np.float32)})[0]
    _, short = build(part, lambda part, weights: unet(part, weights, 128, 64, batch=1), tmp_path)
    once = run(short, feeds | {"context": context.astype(np.float32)})[0]
    np.testing.assert_allclose(twice, once, atol=1e-5)     # the same tokens twice say nothing new


# -- what compilers stumble on ---------------------------------------------------------------------------------------
def test_the_graphs_keep_the_rules(checkpoint, tmp_path):
    for kind, make in MAKERS.values():
        graph, _ = build(checkpoint.part(kind), make, tmp_path)
        model = graph.model()
        check(model)
        kinds = {node.op_type for node in model.graph.node}
        assert not kinds & {"Einsum", "Expand", "Sin", "Cos"}
    unet_graph, _ = build(checkpoint.part("unet"), MAKERS["unet"][1], tmp_path)
    ports = {value.name: value for value in unet_graph.inputs}
    assert ports["timestep"].shape == (2,) and ports["timestep"].dtype == onnx.TensorProto.INT64
    uses = [node.op_type for node in unet_graph.nodes if "timestep" in node.input]
    assert uses == ["Gather"], "the timestep is looked up, once, and neither cast nor broadcast"


@pytest.mark.parametrize(("node", "inputs", "words"), [
    (onnx.helper.make_node("Einsum", ["a", "a"], ["b"], equation="ij,ij->ij"), [("a", 1, (2, 2))], "Einsum"),
    (onnx.helper.make_node("Identity", ["a"], ["b"]), [("a", 1, ("n", 2))], "'a', which is no tensor of a fixed size"),
    (onnx.helper.make_node("Identity", ["timestep"], ["b"]), [("timestep", 1, (2,))], "as floats"),
])
def test_a_graph_that_breaks_a_rule_is_refused(node, inputs, words):
    values = [onnx.helper.make_tensor_value_info(*value) for value in inputs]
    out = onnx.helper.make_tensor_value_info("b", 1, (2, 2))
    with pytest.raises(CompilerError, match=words):
        check(onnx.helper.make_model(onnx.helper.make_graph([node], "it", values, [out])))


# -- the real size -----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def sd15(tmp_path_factory) -> Checkpoint:
    """Stable Diffusion 1.5 without its numbers."""
    return Checkpoint(write_sparse(tmp_path_factory.mktemp("full") / "sd15.safetensors"))


SD15 = {        # parameters, 1e9 multiplications, outputs
    "text_encoder": (text_encoder, 123_060_480, 6.6, {"last_hidden_state": (1, 77, 768), "pooled": (1, 768)}),
    "unet": (lambda p, w: unet(p, w, 512, 512), 859_520_964, 803, {"prediction": (2, 4, 64, 64)}),
    "vae_decoder": (lambda p, w: vae_decoder(p, w, 512, 512), 49_490_199, 1240, {"picture": (1, 3, 512, 512)}),
    "vae_encoder": (lambda p, w: vae_encoder(p, w, 512, 512), 34_163_664, 558, {"moments": (1, 8, 64, 64)}),
}


@pytest.mark.parametrize("name", SD15)
def test_the_real_sd15_fits_tensor_by_tensor(sd15, name):
    make, parameters, giga, outputs = SD15[name]
    part = sd15.part(MAKERS[name][0], dry=True)
    graph = make(part, Weights(None))
    check(graph.model())
    assert {value.name: value.shape for value in graph.outputs} == outputs
    assert graph.parameters == parameters and graph.macs / 1e9 == pytest.approx(giga, rel=0.02)
    half = {"vae_decoder": ("encoder.", "quant_conv."), "vae_encoder": ("decoder.", "post_quant_conv.")}.get(name, ())
    assert {tensor for tensor in part.tensors if not half or not tensor.startswith(half)} == part.used
    if name == "unet":
        assert networks.unet_levels(part) == 4


def test_the_sixteen_inputs_of_the_real_unet(sd15):
    graph = unet(sd15.part("unet", dry=True), Weights(None), 512, 512, control=True)
    downs = [(320, 64)] * 3 + [(320, 32)] + [(640, 32)] * 2 + [(640, 16)] + [(1280, 16)] * 2 + [(1280, 8)] * 3
    shapes = [(2, channels, side, side) for channels, side in [(1280, 8), *downs]]
    assert [value.shape for value in graph.inputs] == [(2, 4, 64, 64), (2,), (2, 77, 768), *shapes]
    assert [value.name for value in graph.inputs[3:5]] == ["residual_mid", "residual_0"]


# -- checkpoints from strangers ----------------------------------------------------------------------------------------
def write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict | None = None) -> Path:
    save_file(tensors, path, metadata)
    return path


def test_numbers_come_as_they_are_in_every_type(tmp_path):
    wanted = torch.randn(3, 5)
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    tensors = {f"{kind}": wanted.to(kind) for kind in kinds}
    read = Checkpoint(write(tmp_path / "all.safetensors", tensors))
    for name, tensor in tensors.items():
        got = read.read(name)
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, tensor.float().numpy())


def _entry(**changes) -> bytes:
    entry = {"dtype": "F16", "shape": [2, 2], "data_offsets": [0, 8], **changes}
    head = json.dumps({"a": entry}).encode()
    return len(head).to_bytes(8, "little") + head + bytes(8)


@pytest.mark.parametrize(("content", "words"), [
    (b"", "no .safetensors file"), (b"x" * 100, "no .safetensors file"), (b"\x80\x02PK" * 30, "no .safetensors file"),
    ((20).to_bytes(8, "little") + b'{"a": {"dtype": 1}} ', "no .safetensors file"),
    (_entry(shape=[2.0, 2]), "no .safetensors file"), (_entry(shape=[-2, -2]), "no .safetensors file"),
    (_entry(data_offsets=[8, 0]), "no .safetensors file"), (_entry(dtype="F77"), "no .safetensors file"),
    (_entry(data_offsets=[0, 99]), "no .safetensors file"),
    (_entry(shape=[1 << 40], data_offsets=[0, 2 << 40]), "cut short"),
    ((1 << 60).to_bytes(8, "little") + b"{}", "no .safetensors file"),
    ((2).to_bytes(8, "little") + b"[]", "no .safetensors file"),
    ((200_000).to_bytes(8, "little") + b"[" * 200_000, "no .safetensors file"),
    (None, "cut short"),
])
def test_what_is_no_checkpoint_is_said_in_one_sentence(tmp_path, content, words):
    path = tmp_path / "odd.safetensors"
    if content is None:
        write(path, {"a": torch.zeros(1000)})
        content = path.read_bytes()[:-100]
    path.write_bytes(content)
    with pytest.raises(CompilerError, match=words) as error:
        Checkpoint(path)
    assert "\n" not in str(error.value)


def header(path: Path, shapes: dict[str, tuple[int, ...]]) -> Checkpoint:
    return Checkpoint(write(path, {name: torch.zeros(shape, dtype=torch.float16) for name, shape in shapes.items()}))


KEY = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"


@pytest.mark.parametrize(("shapes", "words"), [
    ({KEY: (64, 1024)}, "is SD 2.x"), ({KEY: (64, 2048)}, "is SDXL"),
    ({KEY: (64, 768), "model.diffusion_model.label_emb.0.0.weight": (4, 4)}, "is SDXL"),
    ({KEY: (64, 1024), "model.diffusion_model.input_blocks.1.0.time_stack.a": (4, 4)}, "is a video model"),
    ({"first_stage_model.quant_conv.weight": (8, 8, 1, 1)}, "holds no U-Net, only: VAE"),
    ({"lora_unet.down": (4, 4)}, "only: none of the networks"),
    ({"model.diffusion_model.other.weight": (4, 4)}, "no tensor .model.diffusion_model.input_blocks.0.0.weight"),
    ({"conditioner.embedders.0.a": (4, 4)}, "is SDXL"), ({"model.diffusion_model.double_blocks.0.a": (4, 4)}, "is Flux"),
    ({"model.diffusion_model.joint_blocks.0.a": (4, 4)}, "is SD 3"),
    ({"down_blocks.0.attentions.0.norm.weight": (4,)}, "in diffusers' layout: load its parts in ComfyUI"),
    ({"text_model.encoder.layers.0.a": (4, 4)}, "in diffusers' layout"),
])
def test_other_models_are_refused_by_name(tmp_path, shapes, words):
    with pytest.raises(CompilerError, match=words) as error:
        part = header(tmp_path / "other.safetensors", shapes).part("unet")
        unet(part, Weights(tmp_path / "weights"), 64, 64)
    assert "\n" not in str(error.value) and "other.safetensors" in str(error.value)


@pytest.mark.parametrize(("shapes", "words"), [
    ({KEY: (64, 1024), "cond_stage_model.model.transformer.a": (4, 4)}, "is SD 2.x"),
    ({KEY: (64, 2048), "conditioner.embedders.0.a": (4, 4)}, "is SDXL"),
    ({KEY: (64, 768), "first_stage_model.a": (4,)}, "holds no text encoder, only: U-Net, VAE; .* or leave that part out"),
])
@pytest.mark.parametrize("model", ["model", "model_ema"])
def test_other_families_are_named_whatever_part_is_asked_for(tmp_path, shapes, words, model):
    """The weights' moving average, which some checkpoints keep too, is not what is compiled, and says as much."""
    shapes = {name.replace("model.diffusion_model", f"{model}.diffusion_model"): shape for name, shape in shapes.items()}
    words = words.replace("U-Net, VAE", "VAE") if model == "model_ema" else words
    with pytest.raises(CompilerError, match=words):
        header(tmp_path / "other.safetensors", shapes).part("text_encoder")


def test_eight_bit_floats_are_refused(tmp_path):
    path = write(tmp_path / "small.safetensors", {"a": torch.zeros(4, dtype=torch.float8_e4m3fn)})
    with pytest.raises(CompilerError, match="keeps 'a' as F8_E4M3"):
        Checkpoint(path).read("a")


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named(tmp_path, kind, bad):
    path = write(tmp_path / "merge.safetensors", {"a": torch.tensor([1, bad, 2], dtype=kind)})
    with pytest.raises(CompilerError, match="'merge.safetensors' is damaged: 'a' has NaN or infinity"):
        Checkpoint(path).read("a")


def test_shapes_that_do_not_fit_each_other_are_named(checkpoint, tmp_path):
    tensors = demo.state_dict()
    name = "model.diffusion_model.input_blocks.3.0.in_layers.2.weight"
    tensors[name] = torch.zeros(64, 40, 3, 3)
    path = write(tmp_path / "odd.safetensors", tensors, {"sophgo_ascend": json.dumps(demo.SHAPE)})
    with pytest.raises(CompilerError, match="'input_blocks.3.0.in_layers.2' takes 40 channels where 32 come in"):
        unet(Checkpoint(path).part("unet"), Weights(tmp_path / "weights"), 64, 64)
