"""Every parameter that a part of SDXL has, by diffusers' and transformers' names, with its shape.

A checkpoint is compared with this before anything is built, so that what is missing, left over or of another size is
named. Configs come from strangers' files as well: sizes and counts are bounded.
"""
from __future__ import annotations

from collections.abc import Iterator

from .tensors import CheckpointError

Parameters = Iterator[tuple[str, tuple[int, ...]]]      # names with shapes

MOST = 1 << 20          # no width of any model is above this,
MOST_LAYERS = 64        # and no count of layers above this


def parameters(part: str, config: dict) -> dict[str, tuple[int, ...]]:
    """name -> shape of every parameter of `part` ("text_encoder", "text_encoder_2", "unet", "vae").

    Raises CheckpointError, an unfinished sentence, where the config is not one of SDXL's kind.
    """
    return dict(_PARTS[part](config))


def text_encoder(config: dict) -> Parameters:
    width, inner = number(config, "hidden_size"), number(config, "intermediate_size")
    divides(config, "num_attention_heads", number(config, "num_attention_heads"), width)
    yield "text_model.embeddings.token_embedding.weight", (number(config, "vocab_size"), width)
    yield "text_model.embeddings.position_embedding.weight", (number(config, "max_position_embeddings", 77), width)
    for layer in range(number(config, "num_hidden_layers", most=MOST_LAYERS)):
        at = f"text_model.encoder.layers.{layer}"
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _linear(f"{at}.self_attn.{projection}", width, width)
        yield from _norm(f"{at}.layer_norm1", width)
        yield from _norm(f"{at}.layer_norm2", width)
        yield from _linear(f"{at}.mlp.fc1", width, inner)
        yield from _linear(f"{at}.mlp.fc2", inner, width)
    yield from _norm("text_model.final_layer_norm", width)


def text_encoder_2(config: dict) -> Parameters:
    yield from text_encoder(config)
    yield "text_projection.weight", (number(config, "projection_dim"), number(config, "hidden_size"))


def unet(config: dict) -> Parameters:
    widths = numbers(config, "block_out_channels")
    levels, layers = len(widths), number(config, "layers_per_block", 2, 16)
    depths = numbers(config, "transformer_layers_per_block", levels, MOST_LAYERS)
    context, time = number(config, "cross_attention_dim"), 4 * widths[0]
    linear = config.get("use_linear_projection") is True
    down = _attentions(config, "down_block_types", levels)
    up = _attentions(config, "up_block_types", levels)
    stated(config, "addition_embed_type", "text_time")
    # diffusers calls the number of heads so, unless it is stated under its name as well
    heads = "num_attention_heads" if config.get("num_attention_heads") is not None else "attention_head_dim"
    for width, count, looks in zip(widths, numbers(config, heads, levels), down):
        divides(config, heads, count if looks else 1, width)
        divides(config, "norm_num_groups", number(config, "norm_num_groups", 32), width)

    def resnet(at: str, inputs: int, outputs: int) -> Parameters:
        yield from _resnet(at, inputs, outputs)
        yield from _linear(f"{at}.time_emb_proj", time, outputs)

    def transformer(at: str, width: int, depth: int) -> Parameters:
        yield from _norm(f"{at}.norm", width)
        for projection in ("proj_in", "proj_out"):
            at_projection = f"{at}.{projection}"
            yield from _linear(at_projection, width, width) if linear else _conv(at_projection, width, width, 1)
        for block in range(depth):
            yield from _transformer_block(f"{at}.transformer_blocks.{block}", width, context)

    yield from _conv("conv_in", number(config, "in_channels", 4), widths[0])
    yield from _linear("time_embedding.linear_1", widths[0], time)
    yield from _linear("time_embedding.linear_2", time, time)
    yield from _linear("add_embedding.linear_1", number(config, "projection_class_embeddings_input_dim"), time)
    yield from _linear("add_embedding.linear_2", time, time)

    before = widths[0]
    for level, width in enumerate(widths):
        for layer in range(layers):
            yield from resnet(f"down_blocks.{level}.resnets.{layer}", before, width)
            if down[level]:
                yield from transformer(f"down_blocks.{level}.attentions.{layer}", width, depths[level])
            before = width
        if level < levels - 1:
            yield from _conv(f"down_blocks.{level}.downsamplers.0.conv", width, width)

    yield from resnet("mid_block.resnets.0", before, before)
    yield from transformer("mid_block.attentions.0", before, depths[-1])
    yield from resnet("mid_block.resnets.1", before, before)

    for level, width in enumerate(reversed(widths)):
        below = widths[max(0, levels - 2 - level)]      # the last skip of a level comes from the one before it
        for layer in range(layers + 1):
            skip = below if layer == layers else width
            yield from resnet(f"up_blocks.{level}.resnets.{layer}", before + skip, width)
            if up[level]:
                yield from transformer(f"up_blocks.{level}.attentions.{layer}", width, depths[levels - 1 - level])
            before = width
        if level < levels - 1:
            yield from _conv(f"up_blocks.{level}.upsamplers.0.conv", width, width)

    yield from _norm("conv_norm_out", widths[0])
    yield from _conv("conv_out", widths[0], number(config, "out_channels", 4))


def vae(config: dict) -> Parameters:
    widths = numbers(config, "block_out_channels")
    levels, layers = len(widths), number(config, "layers_per_block", 1, 16)
    latent = number(config, "latent_channels", 4)
    for width in widths:
        divides(config, "norm_num_groups", number(config, "norm_num_groups", 32), width)
    # the sampler and ComfyUI scale latents by this number, and by nothing else
    stated(config, "scaling_factor", 0.13025)
    for key in ("shift_factor", "latents_mean", "latents_std"):
        stated(config, key, None)

    def middle(at: str) -> Parameters:
        yield from _resnet(f"{at}.mid_block.resnets.0", widths[-1], widths[-1])
        if config.get("mid_block_add_attention", True):
            yield from _norm(f"{at}.mid_block.attentions.0.group_norm", widths[-1])
            for projection in ("to_q", "to_k", "to_v", "to_out.0"):
                yield from _linear(f"{at}.mid_block.attentions.0.{projection}", widths[-1], widths[-1])
        yield from _resnet(f"{at}.mid_block.resnets.1", widths[-1], widths[-1])

    yield from _conv("encoder.conv_in", number(config, "in_channels", 3), widths[0])
    before = widths[0]
    for level, width in enumerate(widths):
        for layer in range(layers):
            yield from _resnet(f"encoder.down_blocks.{level}.resnets.{layer}", before, width)
            before = width
        if level < levels - 1:
            yield from _conv(f"encoder.down_blocks.{level}.downsamplers.0.conv", width, width)
    yield from middle("encoder")
    yield from _norm("encoder.conv_norm_out", before)
    yield from _conv("encoder.conv_out", before, 2 * latent)

    yield from _conv("decoder.conv_in", latent, before)
    yield from middle("decoder")
    for level, width in enumerate(reversed(widths)):
        for layer in range(layers + 1):
            yield from _resnet(f"decoder.up_blocks.{level}.resnets.{layer}", before, width)
            before = width
        if level < levels - 1:
            yield from _conv(f"decoder.up_blocks.{level}.upsamplers.0.conv", width, width)
    yield from _norm("decoder.conv_norm_out", before)
    yield from _conv("decoder.conv_out", before, number(config, "out_channels", 3))

    if config.get("use_quant_conv", True):
        yield from _conv("quant_conv", 2 * latent, 2 * latent, 1)
    if config.get("use_post_quant_conv", True):
        yield from _conv("post_quant_conv", latent, latent, 1)


_PARTS = {"text_encoder": text_encoder, "text_encoder_2": text_encoder_2, "unet": unet, "vae": vae}


def _linear(at: str, inputs: int, outputs: int, bias: bool = True) -> Parameters:
    yield f"{at}.weight", (outputs, inputs)
    if bias:
        yield f"{at}.bias", (outputs,)


def _conv(at: str, inputs: int, outputs: int, kernel: int = 3) -> Parameters:
    yield f"{at}.weight", (outputs, inputs, kernel, kernel)
    yield f"{at}.bias", (outputs,)


def _norm(at: str, width: int) -> Parameters:
    yield f"{at}.weight", (width,)
    yield f"{at}.bias", (width,)


def _resnet(at: str, inputs: int, outputs: int) -> Parameters:
    yield from _norm(f"{at}.norm1", inputs)
    yield from _conv(f"{at}.conv1", inputs, outputs)
    yield from _norm(f"{at}.norm2", outputs)
    yield from _conv(f"{at}.conv2", outputs, outputs)
    if inputs != outputs:
        yield from _conv(f"{at}.conv_shortcut", inputs, outputs, 1)


def _transformer_block(at: str, width: int, context: int) -> Parameters:
    for attention, source in (("attn1", width), ("attn2", context)):
        yield from _linear(f"{at}.{attention}.to_q", width, width, bias=False)
        yield from _linear(f"{at}.{attention}.to_k", source, width, bias=False)
        yield from _linear(f"{at}.{attention}.to_v", source, width, bias=False)
        yield from _linear(f"{at}.{attention}.to_out.0", width, width)
    for norm in ("norm1", "norm2", "norm3"):
        yield from _norm(f"{at}.{norm}", width)
    yield from _linear(f"{at}.ff.net.0.proj", width, 8 * width)     # GEGLU: twice the four-fold width
    yield from _linear(f"{at}.ff.net.2", 4 * width, width)


def number(config: dict, key: str, default: int | None = None, most: int = MOST) -> int:
    value = config.get(key, default)
    if type(value) is not int or not 0 < value <= most:
        raise CheckpointError(f"its config has {key} = {str(value)[:40]}, which no SDXL has")
    return value


def numbers(config: dict, key: str, count: int = 0, most: int = MOST) -> list[int]:
    """A list of sizes, one a level; a single number stands for the same at each of `count` levels."""
    value = config.get(key, 1 if count else None)
    value = [value] * count if count and type(value) is int else value
    if (not isinstance(value, (list, tuple)) or not 0 < len(value) <= 8 or count and len(value) != count
            or not all(type(size) is int and 0 < size <= most for size in value)):
        raise CheckpointError(f"its config has {key} = {str(value)[:40]}, which no SDXL has")
    return list(value)


def divides(config: dict, key: str, count: int, width: int) -> None:
    if width % count:
        raise CheckpointError(f"its config has {key} = {str(config.get(key))[:40]}, which does not divide its width {width}")


def stated(config: dict, key: str, expected: object) -> None:
    if config.get(key) != expected:
        raise CheckpointError(f"its config has {key} = {str(config.get(key))[:40]}, and SDXL's is {expected}")


def _attentions(config: dict, key: str, levels: int) -> list[bool]:
    """For each level, whether its blocks look at the text."""
    kinds = config.get(key)
    known = {"CrossAttnDownBlock2D": True, "DownBlock2D": False, "CrossAttnUpBlock2D": True, "UpBlock2D": False}
    if not isinstance(kinds, (list, tuple)) or len(kinds) != levels or not all(
            isinstance(kind, str) and kind in known for kind in kinds):
        raise CheckpointError(f"its config has {key} = {str(kinds)[:80]}, which no SDXL has")
    return [known[kind] for kind in kinds]
