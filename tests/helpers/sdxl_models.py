"""Tiny SDXL models with random weights, as a diffusers folder, as a single file and as a MindSpore .ckpt.

The networks are diffusers' and transformers' own, so that a test can compare with them. Both encoders and every level of
the U-Net have another width, so that a swapped or misplaced parameter does not fit. Heads have 64 channels and norms 32
groups, as a single file's config is inferred by these conventions of SDXL.
"""
from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TOKENS = 77


@dataclass
class TinySDXL:
    """Four networks in eval mode, float32. `rows` of the token tables: 49408 takes any prompt, fewer makes small files."""

    rows: int = 49408
    seed: int = 0
    text_encoder: nn.Module = field(init=False)
    text_encoder_2: nn.Module = field(init=False)
    unet: nn.Module = field(init=False)
    vae: nn.Module = field(init=False)

    def __post_init__(self):
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            self.text_encoder = CLIPTextModel(text_config(self.rows, 64, 2, "quick_gelu"))
            self.text_encoder_2 = CLIPTextModelWithProjection(text_config(self.rows, 128, 3, "gelu"))
            self.unet = UNet2DConditionModel(**UNET)
            self.vae = AutoencoderKL(**VAE)
            for network in self.parts().values():
                network.eval().requires_grad_(False)
                for parameter in network.parameters():
                    if parameter.ndim == 1:     # ones and zeros everywhere would hide a norm in another's place
                        parameter += 0.1 * torch.randn_like(parameter)

    def parts(self) -> dict[str, nn.Module]:
        return {part: getattr(self, part) for part in ("text_encoder", "text_encoder_2", "unet", "vae")}

    def state(self, part: str, dtype: str = "float32") -> dict[str, torch.Tensor]:
        """The parameters as files on the Hub name them."""
        tensors = _hub_names(part, getattr(self, part).state_dict())
        return {name: tensor.to(DTYPES[dtype]).contiguous() for name, tensor in tensors.items()}


def _hub_names(part: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers 5 leaves the first encoder's "text_model." out."""
    if part == "text_encoder" and not any(name.startswith("text_model.") for name in tensors):
        return {f"text_model.{name}": tensor for name, tensor in tensors.items()}
    return tensors


def text_config(rows: int, width: int, layers: int, act: str) -> CLIPTextConfig:
    # ids as the Hub's SDXL configs have them: with eos 2 the pooled row is that of the highest id
    return CLIPTextConfig(vocab_size=rows, hidden_size=width, intermediate_size=4 * width, projection_dim=width,
                          num_hidden_layers=layers, num_attention_heads=width // 64, max_position_embeddings=TOKENS,
                          hidden_act=act, bos_token_id=0, eos_token_id=2, pad_token_id=1)


UNET = dict(
    sample_size=16, in_channels=4, out_channels=4, layers_per_block=2, block_out_channels=(32, 64, 128),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 1, 2),
    attention_head_dim=(1, 1, 2), cross_attention_dim=64 + 128, use_linear_projection=True,
    addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=128 + 6 * 256)
VAE = dict(
    sample_size=128, latent_channels=4, layers_per_block=2, block_out_channels=(32, 32, 64, 96), scaling_factor=0.13025,
    down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
SCHEDULER = {"_class_name": "EulerDiscreteScheduler", "_diffusers_version": "0.39.0", "beta_end": 0.012,
             "beta_schedule": "scaled_linear", "beta_start": 0.00085, "num_train_timesteps": 1000,
             "prediction_type": "epsilon", "interpolation_type": "linear", "timestep_spacing": "leading",
             "steps_offset": 1, "use_karras_sigmas": False}
CLASSES = {"text_encoder": ("transformers", "CLIPTextModel"),
           "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
           "unet": ("diffusers", "UNet2DConditionModel"), "vae": ("diffusers", "AutoencoderKL"),
           "scheduler": ("diffusers", "EulerDiscreteScheduler"),
           "tokenizer": ("transformers", "CLIPTokenizer"), "tokenizer_2": ("transformers", "CLIPTokenizer")}


def write_folder(model: TinySDXL, path: Path, dtype: str = "float32", tokenizer: Path | None = None, variant: str = "",
                 shards: int = 1) -> Path:
    """A diffusers folder, named and laid out as the Hub's. `tokenizer`: a folder such as ComfyUI's comfy/sd1_tokenizer."""
    path.mkdir(parents=True, exist_ok=True)
    names = [name for name in CLASSES if tokenizer or not name.startswith("tokenizer")]
    _json(path / "model_index.json", {"_class_name": "StableDiffusionXLPipeline", "_diffusers_version": "0.39.0",
                                      "force_zeros_for_empty_prompt": True, **{name: CLASSES[name] for name in names}})
    _json(path / "scheduler" / "scheduler_config.json", SCHEDULER)
    for part, network in model.parts().items():
        (path / part).mkdir(exist_ok=True)
        config = network.config
        (config.save_pretrained if part.startswith("text_encoder") else network.save_config)(path / part)
        stem = "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"
        _save(path / part, stem, model.state(part, dtype), f".{variant}" if variant else "", shards)
    for name, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")) if tokenizer else ():
        shutil.copytree(tokenizer, path / name, dirs_exist_ok=True)
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            content = json.loads((path / name / file).read_text(encoding="utf-8"))
            content["pad_token"] = pad
            if "model_max_length" in content:
                content["model_max_length"] = TOKENS
            _json(path / name / file, content)
    return path


def _save(folder: Path, stem: str, tensors: dict, variant: str, shards: int) -> None:
    if shards == 1:
        save_file(tensors, folder / f"{stem}{variant}.safetensors", {"format": "pt"})
        return
    names = sorted(tensors)
    places = {}
    for shard in range(shards):
        file = f"{stem}{variant}-{shard + 1:05}-of-{shards:05}.safetensors"
        mine = {name: tensors[name] for name in names[shard::shards]}
        save_file(mine, folder / file, {"format": "pt"})
        places |= dict.fromkeys(mine, file)
    _json(folder / f"{stem}.safetensors.index{variant}.json", {"metadata": {}, "weight_map": places})


def _json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def write_single(model: TinySDXL, path: Path, dtype: str = "float32", parts: tuple[str, ...] = tuple(CLASSES)[:4]) -> Path:
    """One .safetensors file in the layout of sd_xl_base_1.0, the extras of real files included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for part in parts:
        tensors |= single_file(part, model.state(part, dtype))
    tensors["conditioner.embedders.0.transformer.text_model.embeddings.position_ids"] = torch.arange(TOKENS)[None]
    tensors["conditioner.embedders.1.model.logit_scale"] = torch.tensor(4.6)
    tensors["alphas_cumprod"] = torch.linspace(1, 0, 1000)
    save_file(tensors, path, {"format": "pt", "modelspec.architecture": "stable-diffusion-xl-v1-base"})
    return path


def write_full_size(path: Path, dtype: str = "F16") -> Path:
    """A file with the names, shapes and size of sd_xl_base_1.0 and zeros as numbers: sparse, so that it takes no disk.

    The shapes are those of diffusers' and transformers' own networks, built on the meta device.
    """
    with torch.device("meta"):
        networks = {"text_encoder": CLIPTextModel(CLIPTextConfig(**FULL_CONFIGS["text_encoder"])),
                    "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**FULL_CONFIGS["text_encoder_2"])),
                    "unet": UNet2DConditionModel(**FULL_CONFIGS["unet"]), "vae": AutoencoderKL(**FULL_CONFIGS["vae"])}
    header, end = {}, 0
    for part, network in networks.items():
        for name, tensor in single_file(part, _hub_names(part, network.state_dict())).items():
            size = tensor.numel() * {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1}[dtype]
            header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [end, end + size]}
            end += size
    return write_header(path, header, end)


def write_header(path: Path, header: dict, data_bytes: int) -> Path:
    """A .safetensors file with this header and sparse zeros."""
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + data_bytes)
    return path


# What stabilityai/stable-diffusion-xl-base-1.0 states in its config.json files, less versions and unused features.
FULL_CONFIGS = {
    "text_encoder": dict(
        attention_dropout=0.0, bos_token_id=0, eos_token_id=2, hidden_act="quick_gelu", hidden_size=768,
        initializer_factor=1.0, initializer_range=0.02, intermediate_size=3072, layer_norm_eps=1e-5,
        max_position_embeddings=77, num_attention_heads=12, num_hidden_layers=12, pad_token_id=1, projection_dim=768,
        vocab_size=49408),
    "text_encoder_2": dict(
        attention_dropout=0.0, bos_token_id=0, eos_token_id=2, hidden_act="gelu", hidden_size=1280,
        initializer_factor=1.0, initializer_range=0.02, intermediate_size=5120, layer_norm_eps=1e-5,
        max_position_embeddings=77, num_attention_heads=20, num_hidden_layers=32, pad_token_id=1, projection_dim=1280,
        vocab_size=49408),
    "unet": dict(
        act_fn="silu", addition_embed_type="text_time", addition_time_embed_dim=256, attention_head_dim=[5, 10, 20],
        block_out_channels=[320, 640, 1280], center_input_sample=False, cross_attention_dim=2048,
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"], downsample_padding=1,
        flip_sin_to_cos=True, freq_shift=0, in_channels=4, layers_per_block=2, mid_block_scale_factor=1, norm_eps=1e-5,
        norm_num_groups=32, out_channels=4, projection_class_embeddings_input_dim=2816, sample_size=128,
        transformer_layers_per_block=[1, 2, 10], use_linear_projection=True,
        up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"]),
    "vae": dict(
        act_fn="silu", block_out_channels=[128, 256, 512, 512], down_block_types=["DownEncoderBlock2D"] * 4,
        force_upcast=True, in_channels=3, latent_channels=4, layers_per_block=2, norm_num_groups=32, out_channels=3,
        sample_size=1024, scaling_factor=0.13025, up_block_types=["UpDecoderBlock2D"] * 4),
}


def write_ckpt(model: TinySDXL, path: Path, dtype: str = "float32", names: str = "gm", piece: int = 512 << 20,
               crc: bool = False) -> Path:
    """A MindSpore checkpoint, as `mindspore.save_checkpoint` writes it, with the names of gm or of diffusers.

    Tensors above `piece` bytes are cut into several records. Written by hand, as there is no MindSpore where torch is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for part in tuple(CLASSES)[:4]:
        state = model.state(part, dtype)
        tensors |= single_file(part, state) if names == "gm" else {f"{part}.{name}": state[name] for name in state}
    if names == "gm":
        tensors["conditioner.embedders.1.model.logit_scale"] = torch.tensor(4.6)
        tensors["conditioner.embedders.1.model.attn_mask"] = torch.zeros(TOKENS, TOKENS)
        tensors["global_step"] = torch.tensor(7, dtype=torch.int32)
    written = b""
    with path.open("wb") as file:
        for name, tensor in mindspore_names(tensors).items():
            for record in ckpt_records(name, tensor, piece):
                file.write(record)
                written = record
        if crc:
            file.write(b"crc_num" + len(written).to_bytes(10, "big"))     # nobody here checks the number itself
    return path


def mindspore_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """PyTorch's names -> MindSpore's: a norm has gamma and beta, an embedding has a table."""
    norms = {name[:-len(".weight")] for name, tensor in tensors.items() if name.endswith(".weight") and tensor.ndim == 1}
    found = {}
    for name, tensor in tensors.items():
        front, dot, last = name.rpartition(".")
        if front in norms:
            last = {"weight": "gamma", "bias": "beta"}[last]
        elif front.endswith(("token_embedding", "position_embedding")):
            last = "embedding_table"
        found[front + dot + last] = tensor
    return found


def ckpt_records(name: str, tensor: torch.Tensor, piece: int = 512 << 20) -> Iterator[bytes]:
    """checkpoint.proto by hand: Checkpoint {1: Value {1: tag, 2: TensorProto {1: dims, 2: type, 3: content}}}."""
    kind = str(tensor.dtype)[len("torch."):].replace("float", "Float").replace("b", "B").replace("int", "Int")
    content = (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy().tobytes()
    dims = b"".join(b"\x08" + _varint(size) for size in tensor.shape)
    for start in range(0, len(content), piece):
        inner = dims + _field(2, kind.encode()) + _field(3, content[start:start + piece])
        yield _field(1, _field(1, name.encode()) + _field(2, inner))


def _field(number: int, payload: bytes) -> bytes:
    return bytes([number << 3 | 2]) + _varint(len(payload)) + payload


def _varint(value: int) -> bytes:
    found = b""
    while value > 0x7F:
        found += bytes([value & 0x7F | 0x80])
        value >>= 7
    return found + bytes([value])


def single_file(part: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of diffusers' names -> the same under a single file's. Works on the meta device too."""
    found = {"text_encoder": _first, "text_encoder_2": _second, "unet": _unet, "vae": _vae}[part](dict(tensors))
    return {name: tensor.contiguous().clone() for name, tensor in found.items()}


def _first(tensors: dict) -> dict:
    return {f"conditioner.embedders.0.transformer.{name}": tensor for name, tensor in tensors.items()}


def _second(tensors: dict) -> dict:
    prefix = "conditioner.embedders.1.model."
    found = {prefix + "text_projection": tensors.pop("text_projection.weight").T}
    for name in [name for name in tensors if ".q_proj." in name]:
        three = [tensors.pop(name.replace("q_proj", f"{letter}_proj")) for letter in "qkv"]
        layer, kind = re.search(r"layers\.(\d+)\..*\.(weight|bias)", name).groups()
        found[f"{prefix}transformer.resblocks.{layer}.attn.in_proj_{kind}"] = torch.cat(three)
    return found | {prefix + _renamed(name, (
        (r"^text_model\.", ""), (r"encoder\.layers", "transformer.resblocks"), (r"self_attn", "attn"),
        (r"final_layer_norm", "ln_final"), (r"layer_norm", "ln_"), (r"fc1", "c_fc"), (r"fc2", "c_proj"),
        (r"embeddings\.token", "token"), (r"embeddings\.position_embedding\.weight", "positional_embedding"),
    )): tensor for name, tensor in tensors.items()}


def _unet(tensors: dict) -> dict:
    """Blocks are counted through: at each level two, then one that changes the size."""
    blocks = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
              "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
              "mid_block.resnets.1": "middle_block.2",
              "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
              "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
    for level in range(3):
        for layer in range(3):
            blocks[f"down_blocks.{level}.resnets.{layer}"] = f"input_blocks.{1 + 3 * level + layer}.0"
            blocks[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{1 + 3 * level + layer}.1"
            blocks[f"up_blocks.{level}.resnets.{layer}"] = f"output_blocks.{3 * level + layer}.0"
            blocks[f"up_blocks.{level}.attentions.{layer}"] = f"output_blocks.{3 * level + layer}.1"
        looks = any(name.startswith(f"up_blocks.{level}.attentions") for name in tensors)
        blocks[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{3 + 3 * level}.0.op"
        blocks[f"up_blocks.{level}.upsamplers.0"] = f"output_blocks.{2 + 3 * level}.{1 + looks}"
    resnet = ((r"\.norm1\.", ".in_layers.0."), (r"\.conv1\.", ".in_layers.2."), (r"\.norm2\.", ".out_layers.0."),
              (r"\.conv2\.", ".out_layers.3."), (r"\.time_emb_proj\.", ".emb_layers.1."),
              (r"\.conv_shortcut\.", ".skip_connection."))
    found = {}
    for name, tensor in tensors.items():
        block = max((block for block in blocks if name.startswith(block + ".")), key=len)
        rest = name[len(block):]
        found[f"model.diffusion_model.{blocks[block]}" + (_renamed(rest, resnet) if "resnets" in block else rest)] = tensor
    return found


def _vae(tensors: dict) -> dict:
    found = {}
    for name, tensor in tensors.items():
        name = _renamed(name, (
            (r"decoder\.up_blocks\.(\d)", lambda m: f"decoder.up.{3 - int(m[1])}"),
            (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
            (r"mid_block\.attentions\.0", "mid.attn_1"), (r"encoder\.down_blocks", "encoder.down"),
            (r"\.resnets\.", ".block."), (r"(down|up)samplers\.0", r"\1sample"), (r"conv_shortcut", "nin_shortcut"),
            (r"conv_norm_out", "norm_out"), (r"group_norm", "norm"), (r"to_([qkv])", r"\1"), (r"to_out\.0", "proj_out")))
        found[f"first_stage_model.{name}"] = tensor[:, :, None, None] if "attn_1" in name and tensor.ndim == 2 else tensor
    return found


def _renamed(name: str, rules: tuple) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name
