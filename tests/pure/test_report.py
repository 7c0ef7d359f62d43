"""The text of the inspect node."""
from dataclasses import replace

from engines.bmodel import read_bmodel
from engines.network import ModelFile
from engines.report import brief, describe
from tests.helpers.bmodel_writer import WILD, network, unet_demo, vae_encoder, write_bmodel


def report(tmp_path, *networks, **how) -> str:
    return describe(read_bmodel(write_bmodel(tmp_path / "sd15.bmodel", networks, **how)))


def test_the_whole_text(tmp_path):
    text = report(tmp_path, WILD["article"], WILD["pooled and text"], weights=2_000_000, scratch=30_000_000, commands=60_000,
                  kernel=5_600_000)
    assert text == f"""\
sd15.bmodel
  chip           BM1684X
  file           4.0 MB
  device memory  about {(2 * 2_000_000 + 30_000_000 + 2 * 131072 + 8 + 473088 + 308 + 315392 + 4096) / 1e6:.1f} MB \
(weights, scratch area, inputs and outputs), and instructions 0.2 MB, kernels 5.6 MB
  compiler       2.2+v1.30
  created        Sat Nov 22 04:00:00 2025

unet_a: U-Net, SD 1.x
  input   latent      input.1              float32  2x4x64x64
  input   timestep    timesteps.1          int32    2
  input   context     input0.1             float32  2x77x768
  output  prediction  noise_pred_Conv_f32  float32  2x4x64x64
  - picture 512x512 (latent 64x64)
  - batch 2: condition and uncondition in one call
  - int32 timestep: whole timesteps only
  - memory: weights 2.0 MB, scratch area 30.0 MB, inputs and outputs 0.7 MB, instructions 0.1 MB

text_encoder: text encoder
  input   ids     input_ids.1  int32    1x77
  output  pooled  pooled       float32  1x1024
  output  hidden  hidden       float32  1x77x1024
  - also gives the pooled text
  - memory: weights 2.0 MB, scratch area 30.0 MB, inputs and outputs 0.3 MB, instructions 0.1 MB"""


def test_every_variant_is_listed_width_first(tmp_path):
    text = report(tmp_path, WILD["many sizes"])
    assert "unet_c: U-Net, SD 1.x, 3 variants" in text
    assert "2x4x64x64 or 2x4x96x64 or 2x4x64x96" in text
    assert "picture 512x768 (latent 64x96)" in text and "picture 768x512 (latent 96x64)" in text
    assert "ControlNet-capable: takes 13 residuals" in text


def test_variants_that_the_runtime_computes_wrongly_are_told(tmp_path):
    """In the runtime of TPU-MLIR 1.30.2 a variant that needs more scratch takes that of those before it away."""
    grows = "combine them again, the largest first"
    text = report(tmp_path, WILD["many sizes"], scratch=(10**6, 3 * 10**6, 10**6))
    assert grows in text and "memory of variant 2: weights 1.0 KB, scratch area 3.0 MB" in text
    for scratch in ((3 * 10**6, 10**6, 2 * 10**6), 10**6):
        assert grows not in report(tmp_path, WILD["many sizes"], scratch=scratch)


def test_a_node_shows_a_line_for_each_file(tmp_path):
    path = write_bmodel(tmp_path / "sd15.bmodel", [WILD["text"], WILD["many sizes"]], weights=10**9)
    assert brief(read_bmodel(path)).startswith("sd15.bmodel: text encoder; U-Net, picture 512x512, picture 512x768, picture "
                                               "768x512; BM1684X, 4,0")
    stranger = ModelFile(tmp_path / "a.onnx", "onnx", None, (network("resnet", {"x": (1,)}, {"y": (1,)}),), 3, 0)
    assert brief(stranger) == "a.onnx: role not recognised; ONNX"


def test_remarks(tmp_path):
    assert "U-Net, SDXL" in report(tmp_path, WILD["sdxl"])
    assert "9 latent channels: inpainting" in report(tmp_path, WILD["inpaint"])
    assert "the mean without its variance" in report(tmp_path, vae_encoder(channels=4))
    single = network("u", {"x": (1, 4, 8, 8), "t": (1,), "c": (1, 77, 1024)}, {"y": (1, 4, 8, 8)}, {"x": "float16"})
    text = report(tmp_path, replace(single, dynamic=True))
    assert "U-Net, SD 2.x" in text and "batch 1: condition and uncondition in two calls" in text
    assert "float16 inputs or outputs" in text and "free at run time, up to those above" in text
    assert "- picture 64x64 (latent 8x8)" in text


def test_every_family_has_a_role(tmp_path):
    for net in WILD.values():
        assert "not recognised" not in report(tmp_path, net)


def test_a_stranger_is_described_too(tmp_path):
    text = report(tmp_path, network("resnet", {"data": (1, 3, 224, 224)}, {"prob": (1, 1000)}))
    assert "resnet: role not recognised" in text and "data  float32  1x3x224x224" in text


def test_onnx_says_what_it_does_not_know(tmp_path):
    free = network("", {"x": (-1, 4, -1, -1), "t": (), "c": (-1, 77, 768)}, {"y": (-1, 4, -1, -1)}, dynamic=True)
    text = describe(ModelFile(tmp_path / "a.onnx", "onnx", None, (free, unet_demo()), 3_000_000, 0))
    assert "any (ONNX)" in text and "device memory  not stated" in text and "?x4x?x?" in text and "one number" in text
    assert "network: U-Net" in text and "picture of any size" in text and "sizes are free at run time" in text
