"""The demo's weights as one ordinary Stable Diffusion 1.x checkpoint, in the layout that ComfyUI saves and loads.

    python -m demo.checkpoint [--out FILE]

What the shapes of the tensors do not show, and SD 1.x's conventions get wrong for so small a model, is in the file's
metadata, key `sophgo_ascend`, as JSON: the heads of the attentions and the groups of the group norms.
"""

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from . import nets

OUT = Path(__file__).parent / "models" / "checkpoints" / "shapes.safetensors"
METADATA = "sophgo_ascend"
SHAPE = {"text_encoder": {"heads": 4}, "unet": {"heads": 4, "groups": 4}, "vae": {"groups": 1}}
PREFIXES = {
    "text_encoder": "cond_stage_model.transformer.text_model.",
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
}

# diffusers' names within a block -> those of the checkpoint
UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_OTHER = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
VAE_NAMES = {
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
}


def _unet_blocks(names: list[str]) -> dict[str, str]:
    """Places of the blocks: diffusers counts them by level, the checkpoint one after the other."""
    count, blocks = lambda pattern: len({m[0] for name in names if (m := re.match(pattern, name))}), dict(UNET_OTHER)
    number = 1  # input_blocks.0 is conv_in
    for level in range(count(r"down_blocks\.\d+")):
        for layer in range(count(rf"down_blocks\.{level}\.resnets\.\d+")):
            blocks[f"down_blocks.{level}.resnets.{layer}"] = f"input_blocks.{number}.0"
            blocks[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{number}.1"
            number += 1
        blocks[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
        number += 1
    number = 0
    for level in range(count(r"up_blocks\.\d+")):
        attends = count(rf"up_blocks\.{level}\.attentions\.\d+")
        for layer in range(count(rf"up_blocks\.{level}\.resnets\.\d+")):
            blocks[f"up_blocks.{level}.resnets.{layer}"] = f"output_blocks.{number}.0"
            blocks[f"up_blocks.{level}.attentions.{layer}"] = f"output_blocks.{number}.1"
            number += 1
        # the upsampler follows what the level's last block holds
        blocks[f"up_blocks.{level}.upsamplers.0"] = f"output_blocks.{number - 1}.{2 if attends else 1}"
    return blocks


def _unet(weights: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    blocks = _unet_blocks(list(weights))
    for name, tensor in weights.items():
        place = max((block for block in blocks if name.startswith(block + ".")), key=len)
        rest = name[len(place) + 1 :]
        if ".resnets." in place:
            layer, _, kind = rest.partition(".")
            rest = f"{UNET_RESNET[layer]}.{kind}"
        yield f"{blocks[place]}.{rest}", tensor


def _vae(weights: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    levels = 1 + max(int(m[1]) for name in weights if (m := re.match(r"decoder\.up_blocks\.(\d+)", name)))
    for name, tensor in weights.items():
        name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
        # the decoder's levels are counted from the picture's side
        name = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{levels - 1 - int(m[1])}.block", name)
        name = re.sub(r"down_blocks\.(\d+)", r"down.\1", name)
        name = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{levels - 1 - int(m[1])}", name)
        for old, new in VAE_NAMES.items():
            name = re.sub(rf"(?<=\.){re.escape(old)}(?=\.)", new, name)
        # attention's projections are 1x1 convolutions there
        yield name, tensor[:, :, None, None] if re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name) else tensor


def state_dict(weights: Path = nets.WEIGHTS) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors, float16 as they were trained to be."""
    text = load_file(weights / "text_encoder.safetensors")
    vocabulary = nets.Vocabulary(text.pop("seen_tokens").tolist())
    text[nets.TOKEN_TABLE] = vocabulary.expand(text[nets.TOKEN_TABLE])
    parts = {
        "text_encoder": text.items(),
        "unet": _unet(load_file(weights / "unet.safetensors")),
        "vae": _vae(load_file(weights / "vae.safetensors")),
    }
    return {PREFIXES[part] + name: tensor.contiguous() for part, tensors in parts.items() for name, tensor in tensors}


def write(out: Path = OUT, weights: Path = nets.WEIGHTS) -> Path:
    """The file; it appears whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_suffix(".part")
    save_file(state_dict(weights), part, {"format": "pt", METADATA: json.dumps(SHAPE)})
    return part.replace(out)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--weights", type=Path, default=nets.WEIGHTS)
    args = parser.parse_args()
    print(write(args.out, args.weights))


if __name__ == "__main__":
    main()
