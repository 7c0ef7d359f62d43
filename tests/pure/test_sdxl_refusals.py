"""Files that cannot be used as SDXL: each is refused in one sentence that says what it is, at once, and never crashes."""
import json
import pickle
import random
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from engines.sdxl.checkpoint import CheckpointError, open_checkpoint
from tests.helpers.sdxl_models import (
    TinySDXL,
    ckpt_records,
    write_ckpt,
    write_folder,
    write_full_size,
    write_header,
    write_single,
)

CONTEXT = "model.diffusion_model.input_blocks.{}.1.transformer_blocks.0.attn2.to_k.weight"


@pytest.fixture(scope="module")
def model() -> TinySDXL:
    return TinySDXL(rows=1000)


@pytest.fixture(scope="module")
def single(model, tmp_path_factory):
    return write_single(model, tmp_path_factory.mktemp("single") / "tiny.safetensors")


@pytest.fixture(scope="module")
def ckpt(model, tmp_path_factory):
    return write_ckpt(model, tmp_path_factory.mktemp("ckpt") / "tiny.ckpt")


@pytest.fixture
def folder(model, tmp_path):
    return write_folder(model, tmp_path / "tiny")


def refusal(path, *parts) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path).require(*parts)
    message = str(caught.value)
    assert message.startswith(path.name) and message.endswith(".") and message.count(". ") == 0 and message.isprintable()
    return message.removeprefix(path.name)


def header(path, shapes: dict, dtype: str = "F16"):
    """A file of zeros with these tensors."""
    entries, end = {}, 0
    for name, shape in shapes.items():
        size = torch.Size(shape).numel() * {"F16": 2, "F8_E4M3": 1}[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    return write_header(path, entries, end)


@pytest.mark.parametrize("shapes, what", [
    ({"cond_stage_model.transformer.text_model.final_layer_norm.weight": (768,)}, "a Stable Diffusion 1.x model"),
    ({CONTEXT.format(1): (320, 768)}, "a Stable Diffusion 1.x model"),
    ({"cond_stage_model.model.transformer.resblocks.0.ln_1.weight": (1024,)}, "a Stable Diffusion 2.x model"),
    ({CONTEXT.format(1): (320, 1024)}, "a Stable Diffusion 2.x model"),
    ({"conditioner.embedders.0.model.transformer.resblocks.0.ln_1.weight": (1280,)}, "the SDXL refiner"),
    ({CONTEXT.format(4): (768, 1280), "model.diffusion_model.label_emb.0.0.weight": (1536, 2560)}, "the SDXL refiner"),
    ({"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": (4608, 1536)}, "a Stable Diffusion 3 model"),
    ({"double_blocks.0.img_attn.qkv.weight": (9216, 3072)}, "a Flux model or one of its relatives"),
    ({"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": (9216, 3072)}, "a Flux model or one of its relatives"),
    ({"model.diffusion_model.input_blocks.1.0.time_stack.in_layers.0.weight": (320,)}, "a video model"),
    ({"lora_unet_down_blocks_1_attentions_0_proj_in.lora_down.weight": (8, 640)}, "a LoRA"),
    ({"unet.down_blocks.1.attentions.0.proj_in.lora_A.weight": (8, 640)}, "a LoRA"),
    ({"control_model.input_hint_block.0.weight": (16, 3, 3, 3)}, "a ControlNet"),
    ({"clip_g": (4, 1280), "clip_l": (4, 768)}, "a textual inversion embedding"),
    ({"decoder.up.0.block.0.conv1.weight": (128, 256, 3, 3)}, "one part of a model by itself"),
    ({"text_model.final_layer_norm.weight": (768,)}, "one part of a model by itself"),
])
def test_another_model_is_named(tmp_path, shapes, what):
    path = header(tmp_path / "other.safetensors", shapes)
    assert refusal(path) == f": it is {what}, and only SDXL base checkpoints can be used."


def test_what_holds_nothing_of_sdxl(tmp_path):
    assert refusal(header(tmp_path / "a.safetensors", {"x": (1, 2)})) == ": it holds no part of an SDXL model."
    assert refusal(header(tmp_path / "a.safetensors", {})) == ": it holds no part of an SDXL model."


def test_eight_bit_floats(tmp_path):
    path = write_full_size(tmp_path / "fp8.safetensors", "F8_E4M3")
    assert refusal(path) == (": its parameters are 8-bit floats, which MindSpore does not load: take the float16, bfloat16 "
                             "or float32 file.")


@pytest.mark.parametrize("keep", [4, 1000, 0.5, 0.999999])
def test_a_file_that_is_cut_short(tmp_path, single, keep):
    whole = single.read_bytes()
    path = tmp_path / "cut.safetensors"
    path.write_bytes(whole[:keep if keep > 1 else int(keep * len(whole))])
    expected = ": it is no safetensors file." if keep == 4 else ": it is cut short, with "
    assert refusal(path).startswith(expected)


@pytest.mark.parametrize("keep", [0.3, 0.9])
def test_a_mindspore_file_that_is_cut_short(tmp_path, ckpt, keep):
    whole = ckpt.read_bytes()
    path = tmp_path / "cut.ckpt"
    path.write_bytes(whole[:int(keep * len(whole))])
    assert refusal(path).startswith(": it is cut short, or damaged: ")


def test_a_file_that_becomes_shorter_while_it_is_read(tmp_path, single):
    path = shutil.copy(single, tmp_path / "tiny.safetensors")
    parameters = list(open_checkpoint(path).parameters("vae"))
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(CheckpointError, match="^tiny.safetensors: it became shorter while it was read.$"):
        for parameter in parameters:
            parameter.read()


@pytest.mark.parametrize("name", ["model.ckpt", "model.safetensors"])
@pytest.mark.parametrize("save", ["zip", "old", "plain"])
def test_pickles(tmp_path, name, save):
    path = tmp_path / name
    if save == "plain":
        path.write_bytes(pickle.dumps({"x": 1}))
    else:
        torch.save({"state_dict": {"x": torch.ones(3)}}, path, _use_new_zipfile_serialization=save == "zip")
    message = refusal(path)
    assert "pickle" in message and "only .safetensors files and MindSpore's .ckpt files are read" in message


@pytest.mark.parametrize("content, why", [
    (b"", "it is empty"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 6938078334\n", "it is a Git LFS pointer"),
    (b"<!DOCTYPE html><html></html>", "it is a web page"),
    (b"GGUF\3\0\0\0", "it is a GGUF file"),
    (b"something else that is no model", "it is no "),
])
@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_what_is_no_checkpoint_at_all(tmp_path, content, why, suffix):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(content)
    assert refusal(path).startswith(f": {why}")


def test_other_paths(tmp_path):
    assert refusal(tmp_path / "absent.safetensors") == ": there is no such file or folder."
    (tmp_path / "a.bin").write_bytes(b"x")
    assert refusal(tmp_path / "a.bin") == (": only .safetensors files, MindSpore's .ckpt files and diffusers folders can be "
                                           "read.")
    (tmp_path / "empty").mkdir()
    assert refusal(tmp_path / "empty") == ": it is no diffusers folder: it has no model_index.json."


def test_missing_parts_are_told_when_they_are_asked_for(tmp_path, model):
    path = write_single(model, tmp_path / "tiny.safetensors", parts=("text_encoder", "unet"))
    checkpoint = open_checkpoint(path)
    assert checkpoint.missing == ["text_encoder_2", "vae"]
    checkpoint.require("unet", "text_encoder")
    assert refusal(path, "unet", "text_encoder_2") == ": it has no second text encoder: take a checkpoint with all parts."
    assert refusal(path, "unet", "vae", "text_encoder_2") == (": it has no second text encoder and no VAE: take a "
                                                              "checkpoint with all parts.")
    for needs in (lambda: checkpoint.widths, lambda: next(checkpoint.parameters("text_encoder_2"))):
        with pytest.raises(CheckpointError, match="it has no second text encoder"):
            needs()


@pytest.mark.parametrize("change, why", [
    (lambda all: all.pop("model.diffusion_model.middle_block.1.proj_in.weight"),
     "its U-Net is not SDXL's, or incomplete: it has no mid_block.attentions.0.proj_in.weight"),
    (lambda all: all.pop("model.diffusion_model.input_blocks.0.0.weight"),
     "its U-Net is not SDXL's, or incomplete: it has no conv_in.weight"),
    (lambda all: all.pop("conditioner.embedders.1.model.text_projection"),
     "its second text encoder is not SDXL's, or incomplete: it has no text_projection.weight"),
    (lambda all: all.update({"model.diffusion_model.extra": torch.ones(2), "more": torch.ones(1)}),
     "it has tensors that SDXL has not: model.diffusion_model.extra, more"),
    (lambda all: all.update({"first_stage_model.quant_conv.weight": torch.ones(8, 4, 1, 1)}),
     "its VAE is not SDXL's, or damaged: first_stage_model.quant_conv.weight has the shape [8, 4, 1, 1], which does"),
    (lambda all: all.update({"conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_bias": torch.ones(385)}),
     "its second text encoder is not SDXL's, or damaged: "),
    (lambda all: all.update({"model.diffusion_model.out.2.bias": torch.ones(4, dtype=torch.int8)}),
     "its parameters are int8 numbers, which MindSpore does not load"),
    (lambda all: all.update({"v_pred": torch.zeros(0)}),
     "its U-Net predicts velocity, and only models that predict noise can be sampled here"),
    (lambda all: all.update({"model.diffusion_model.input_blocks.0.0.weight": torch.ones(32, 9, 3, 3)}),
     "its U-Net takes 9 channels, as models for inpainting or editing do"),
    (lambda all: all.update({"model.diffusion_model.label_emb.0.0.weight": torch.ones(128, 2560)}),
     "its text encoders and its U-Net do not fit: they give a context 192 wide and a vector of 1664, it takes 192 and 2560"),
    (lambda all: all.update({"model.diffusion_model.time_embed.0.weight\n": torch.ones(2)}),
     "it is damaged: one of its tensors has no readable name"),
    (lambda all: all.update({"first_stage_model.quant_conv.gamma": torch.ones(2)}),
     "it is damaged: it has a parameter under PyTorch's name and under MindSpore's"),
])
def test_what_does_not_fit_is_named(tmp_path, single, change, why):
    tensors = load_file(single)
    change(tensors)
    save_file(tensors, tmp_path / "changed.safetensors")
    assert refusal(tmp_path / "changed.safetensors").startswith(f": {why}")


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("change, where, why", [
    (lambda at: edit(at / "model_index.json", _class_name="StableDiffusionPipeline"), "",
     "it is a StableDiffusionPipeline, and only StableDiffusionXLPipeline folders can be used"),
    (lambda at: edit(at / "model_index.json", _class_name=["x"]), "", "it is a ['x'], and only"),
    (lambda at: (at / "model_index.json").write_text("{"), "/model_index.json", "it is damaged: its JSON cannot be read"),
    (lambda at: (at / "model_index.json").write_text("[" * 100_000), "/model_index.json", "it is damaged: its JSON"),
    (lambda at: (at / "unet" / "config.json").unlink(), "/unet/config.json", "the file cannot be read (No such file"),
    (lambda at: edit(at / "unet" / "config.json", transformer_layers_per_block=[[1], 2, 10]), "",
     "its config has transformer_layers_per_block = [[1], 2, 10], which no SDXL has"),
    (lambda at: edit(at / "unet" / "config.json", layers_per_block=10**12), "",
     "its config has layers_per_block = 1000000000000, which no SDXL has"),
    (lambda at: edit(at / "unet" / "config.json", block_out_channels=[32, 64, 256]), "",
     "its U-Net is not SDXL's, or damaged: down_blocks.2.resnets.0.conv1.weight has"),
    (lambda at: edit(at / "unet" / "config.json", down_block_types=["AttnDownBlock2D"] * 3), "",
     "its config has down_block_types = "),
    (lambda at: edit(at / "unet" / "config.json", attention_head_dim=[1, 1, 3]), "",
     "its config has attention_head_dim = [1, 1, 3], which does not divide its width 128"),
    (lambda at: edit(at / "vae" / "config.json", scaling_factor=0.5), "",
     "its config has scaling_factor = 0.5, and SDXL's is 0.13025"),
    (lambda at: edit(at / "scheduler" / "scheduler_config.json", prediction_type="v_prediction"), "",
     "its U-Net predicts v_prediction, and only models that predict noise"),
    (lambda at: (at / "vae" / "diffusion_pytorch_model.safetensors").unlink(), "",
     "its VAE has no weights: there is no safetensors file in vae"),
    (lambda at: (at / "vae" / "diffusion_pytorch_model.safetensors").rename(at / "vae" / "diffusion_pytorch_model.bin"), "",
     "its VAE is in diffusion_pytorch_model.bin, a pickle, which can run any program when it is opened: save the pipeline"),
    (lambda at: (at / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"\x10" + bytes(30)),
     "/vae/diffusion_pytorch_model.safetensors", "it is no safetensors file"),
])
def test_folders_that_cannot_be_used(folder, change, where, why):
    change(folder)
    assert refusal(folder).startswith(f"{where}: {why}")


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/hostname", "..\\secret.safetensors", "absent.safetensors"])
def test_an_index_may_not_lead_out_of_its_folder(model, tmp_path, name):
    path = write_folder(model, tmp_path / "tiny", shards=2)
    shutil.copy(path / "unet" / "diffusion_pytorch_model-00001-of-00002.safetensors", path / "secret.safetensors")
    index = path / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    edit(index, weight_map=json.loads(index.read_text())["weight_map"] | {"conv_in.bias": name})
    message = refusal(path)
    assert message.startswith(f"/unet/{index.name}: it says that weights lie in {name!r}, which is ")


def test_a_folder_without_a_part_and_with_other_spellings(folder):
    shutil.rmtree(folder / "vae")
    file = folder / "text_encoder" / "model.safetensors"        # as transformers 5 names it
    save_file({name.removeprefix("text_model."): tensor for name, tensor in load_file(file).items()}, file)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.missing == ["vae"]
    assert "text_model.final_layer_norm.bias" in {parameter.name for parameter in checkpoint.parameters("text_encoder")}


@pytest.mark.parametrize("entry", [
    {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]},
    {"dtype": "F32", "shape": [2**50, 2**50], "data_offsets": [0, 8]},
    {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]},
    {"dtype": "F32", "shape": [1.5], "data_offsets": [0, 8]},
    {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]},
    {"dtype": "F32", "shape": [1] * 100, "data_offsets": [0, 4]},
    {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]},
    {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]},
    {"dtype": "F32", "shape": [2], "data_offsets": [0]},
    {"dtype": 7, "shape": [2], "data_offsets": [0, 8]},
    {"shape": [2]}, [], None, 3,
])
def test_headers_that_make_no_sense(tmp_path, entry):
    path = write_header(tmp_path / "a.safetensors", {"model.diffusion_model.x": entry}, 64)
    assert refusal(path).startswith(": it is damaged: ")


def test_headers_that_are_huge(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes((2**40).to_bytes(8, "little") + b"{" + bytes(100))
    assert "its header is said to have 1,099,511,627,776 bytes" in refusal(path)
    many = {f"t{index}": {"dtype": "F16", "shape": [], "data_offsets": [0, 2]} for index in range(20_001)}
    assert "more than 20,000 tensors" in refusal(write_header(path, many, 2))
    path.write_bytes((40).to_bytes(8, "little") + b'{"a": 1, "a": 2}'.ljust(40))
    assert "its JSON cannot be read" in refusal(path)


@pytest.mark.parametrize("kind", ["single", "ckpt"])
def test_damage_anywhere_is_refused_or_harmless(tmp_path, single, kind):
    """Random changes to what describes the tensors: only CheckpointError, and soon."""
    path = tmp_path / f"a.{'safetensors' if kind == 'single' else 'ckpt'}"
    if kind == "single":
        with single.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            whole, total = length.to_bytes(8, "little") + file.read(length), single.stat().st_size
    else:
        small = {f"model.diffusion_model.input_blocks.{block}.0.op.weight": torch.ones(2, block) for block in range(1, 60)}
        whole = b"".join(record for name, tensor in small.items() for record in ckpt_records(name, tensor))
        total = len(whole)
    random.seed(5)
    start, refused, tries = time.process_time(), 0, 200
    for _ in range(tries):
        damaged = bytearray(whole)
        for _ in range(random.choice((1, 3, 200))):
            damaged[random.randrange(len(whole))] = random.randrange(256)
        with path.open("wb") as file:
            file.write(damaged)
            file.truncate(random.randrange(total) if random.random() < 0.3 else total)
        try:
            open_checkpoint(path)
        except CheckpointError as why:
            assert str(why).startswith(path.name) and str(why).endswith(".")
            refused += 1
    assert refused > tries // 2 and time.process_time() - start < tries / 4
