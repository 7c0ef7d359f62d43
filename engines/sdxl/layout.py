"""Where a parameter of diffusers' name is stored.

Two layouts are known. `SingleFile` is what a single-file checkpoint has (the LDM layout of sd_xl_base_1.0.safetensors):
blocks numbered through, bigG's query, key and value in one tensor, its projection transposed. `Diffusers` has diffusers'
own names, each below its part. MindSpore spells the last word of some names in its own way; `plain` undoes that.
"""
from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

PARTS = ("text_encoder", "text_encoder_2", "unet", "vae")


class Source(NamedTuple):
    """A tensor of the file that holds a parameter: whole, as one of three parts of its rows, or transposed."""

    name: str
    third: int | None = None
    transposed: bool = False


# What may lie in a checkpoint beside SDXL's own parameters, and means nothing for a picture.
EXTRAS = re.compile("|".join((
    r"(model_)?ema\..*", r".*\.position_ids", r".*\blogit_scale", r".*\.attn_mask",
    r"conditioner\.embedders\.0\.transformer\.text_projection\.weight",
    r"first_stage_model\.(loss|model_ema)\..*", r"denoiser\..*", r"model_sampling\..*",
    r"(alphas|betas|sqrt|log_one_minus|posterior|lvlb|logvar|scale_factor|scaled_fp8)\w*",
    r"global_step|epoch_num|step_num|loss_scale|learning_rate|__version__",
)))

_MINDSPORE = {"gamma": "weight", "beta": "bias", "embedding_table": "weight"}
# One published key list of gm gives the table of the first encoder this name.
_MISSPELT = "conditioner.embedders.1.model.token_embedding..embedding_table"
_TABLE_1 = "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight"


def plain(name: str) -> str:
    """A name as PyTorch spells it: MindSpore says gamma, beta and embedding_table, and some versions add ._backbone."""
    if name == _MISSPELT:
        return _TABLE_1
    name = name.replace("._backbone", "")
    front, dot, last = name.rpartition(".")
    return front + dot + _MINDSPORE.get(last, last) if dot else name


class Diffusers:
    """Names of diffusers and transformers, each below its part: "unet.conv_in.weight"."""

    PREFIXES = {part: f"{part}." for part in PARTS}
    _OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def sources(self, part: str, name: str) -> list[Source]:
        """Where `name` of `part` may be, the usual place first."""
        found = [Source(f"{part}.{name}")]
        if part.startswith("text_encoder") and name.startswith("text_model."):
            found.append(Source(f"{part}.{name[len('text_model.'):]}"))     # as transformers 5 writes it
        if part == "vae" and ".attentions.0." in name:
            for new, old in self._OLD_ATTENTION.items():
                found.append(Source(f"{part}.{name.replace(f'.{new}.', f'.{old}.')}"))      # as diffusers wrote until 0.17
        return found


class SingleFile:
    """The names of a single-file checkpoint; made from those names, because blocks are numbered through all levels."""

    PREFIXES = {"text_encoder": "conditioner.embedders.0.", "text_encoder_2": "conditioner.embedders.1.",
                "unet": "model.diffusion_model.", "vae": "first_stage_model."}

    def __init__(self, names: Iterable[str]):
        names = set(names)
        # each level of the U-Net has its blocks and then one that halves the size
        self.stride = next((block for block in range(2, 20)
                            if f"model.diffusion_model.input_blocks.{block}.0.op.weight" in names), 3)
        self.vae_levels = next((level for level in range(20)
                                if f"first_stage_model.decoder.up.{level}.block.0.conv1.weight" not in names), 20)

    def sources(self, part: str, name: str) -> list[Source]:
        """Where `name` of `part` may be, the usual place first."""
        return getattr(self, f"_{part}")(name)

    def _text_encoder(self, name: str) -> list[Source]:
        return [Source(f"conditioner.embedders.0.transformer.{name}")]

    def _text_encoder_2(self, name: str) -> list[Source]:
        prefix = "conditioner.embedders.1.model."
        if name == "text_projection.weight":
            return [Source(f"{prefix}text_projection", transposed=True), Source(prefix + name)]
        name = name.replace("text_model.", "")
        layer = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if not layer:
            return [Source(prefix + _OPEN_CLIP.get(name, name))]
        number, what, kind = layer.groups()
        block = f"{prefix}transformer.resblocks.{number}"
        if what in _QUERY_KEY_VALUE:
            return [Source(f"{block}.attn.in_proj_{kind}", third=_QUERY_KEY_VALUE.index(what))]
        return [Source(f"{block}.{_OPEN_CLIP_LAYER.get(what, what)}.{kind}")]

    def _unet(self, name: str) -> list[Source]:
        prefix = "model.diffusion_model."
        words = name.split(".")
        if words[0] not in ("down_blocks", "mid_block", "up_blocks"):
            front, _, kind = name.rpartition(".")
            return [Source(f"{prefix}{_UNET.get(front, front)}.{kind}")]
        if words[0] == "mid_block":
            what, index, rest = words[1], int(words[2]), ".".join(words[3:])
            return [Source(f"{prefix}middle_block.1.{rest}" if what == "attentions"
                           else f"{prefix}middle_block.{2 * index}.{_resnet(rest)}")]
        level, what, index, rest = int(words[1]), words[2], int(words[3]), ".".join(words[4:])
        if words[0] == "down_blocks":
            block = self.stride * level + 1 + index
            if what == "downsamplers":
                return [Source(f"{prefix}input_blocks.{self.stride * (level + 1)}.0.{rest.replace('conv', 'op')}")]
            blocks = f"{prefix}input_blocks.{block}"
        else:
            blocks = f"{prefix}output_blocks.{self.stride * level + index}"
            if what == "upsamplers":        # comes third in its block, or second where no attention comes before it
                blocks = f"{prefix}output_blocks.{self.stride * (level + 1) - 1}"
                return [Source(f"{blocks}.2.{rest}"), Source(f"{blocks}.1.{rest}")]
        return [Source(f"{blocks}.1.{rest}" if what == "attentions" else f"{blocks}.0.{_resnet(rest)}")]

    def _vae(self, name: str) -> list[Source]:
        for new, old in _VAE:
            name = name.replace(new, old)
        # the decoder's levels count from the picture in this layout, from the latent in diffusers'
        name = re.sub(r"^decoder\.up_blocks\.(\d+)\.", lambda m: f"decoder.up.{self.vae_levels - 1 - int(m[1])}.", name)
        if ".mid.attn_1." in name:
            for new, old in _VAE_ATTENTION:
                name = name.replace(new, old)
        return [Source(f"first_stage_model.{name}")]


def _resnet(rest: str) -> str:
    front, _, kind = rest.rpartition(".")
    return f"{_RESNET[front]}.{kind}" if front in _RESNET else rest


_QUERY_KEY_VALUE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_OPEN_CLIP = {"embeddings.token_embedding.weight": "token_embedding.weight",
              "embeddings.position_embedding.weight": "positional_embedding",
              "final_layer_norm.weight": "ln_final.weight", "final_layer_norm.bias": "ln_final.bias"}
_OPEN_CLIP_LAYER = {"self_attn.out_proj": "attn.out_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2",
                    "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
_UNET = {"conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
         "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
         "conv_norm_out": "out.0", "conv_out": "out.2"}
_RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
           "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
_VAE = (("mid_block.resnets.0.", "mid.block_1."), ("mid_block.resnets.1.", "mid.block_2."),
        ("mid_block.attentions.0.", "mid.attn_1."), ("conv_norm_out.", "norm_out."), ("conv_shortcut.", "nin_shortcut."),
        ("encoder.down_blocks.", "encoder.down."), (".resnets.", ".block."), (".downsamplers.0.", ".downsample."),
        (".upsamplers.0.", ".upsample."))
_VAE_ATTENTION = ((".group_norm.", ".norm."), (".to_q.", ".q."), (".to_k.", ".k."), (".to_v.", ".v."),
                  (".to_out.0.", ".proj_out."))
