"""Loaders: compiled files become an ordinary MODEL, CLIP and VAE."""
from __future__ import annotations

import folder_paths
from comfy_api.latest import io

from ..engines.devices import COMPILED
from . import library
from .adapters.choices import ERROR, TRUNCATE
from .adapters.host import one_of, poll, tell
from .base import CATEGORY, PackNode

SAME = "same"
INSIDE, OUTSIDE = "inside", "outside"
DEVICE_TOOLTIP = ("Where it runs. auto: hardware of the file's chip, else Sophgo's simulator, else onnxruntime for .onnx "
                  "files. The server's owner names more devices in sophgo_ascend.toml.")
LONG_PROMPTS_TOOLTIP = ("What to do with a prompt of more than 75 tokens, which a compiled model cannot take: cut it with "
                        "a warning on the node, or stop with an error.")


def _files(id: str, tooltip: str, first: str | None = None) -> io.Combo.Input:
    options = ([first] if first else []) + library.models()
    return io.Combo.Input(id, options=options, default=first, tooltip=tooltip)


def _device(id: str = "device", first: str | None = None, tooltip: str = DEVICE_TOOLTIP) -> io.Combo.Input:
    options = ([first] if first else []) + library.device_names(*COMPILED)
    return io.Combo.Input(id, options=options, default=options[0], tooltip=tooltip)


def _long_prompts() -> io.Combo.Input:
    return io.Combo.Input("long_prompts", options=[TRUNCATE, ERROR], default=TRUNCATE, tooltip=LONG_PROMPTS_TOOLTIP)


def _clip(stage, long_prompts: str, tokens: int = 0):
    from .adapters.clip import as_clip
    return as_clip(stage, long_prompts, folder_paths.get_folder_paths("embeddings"), tokens)


class SophgoLoadCheckpoint(PackNode):
    ALIASES = ("sophgo", "bmodel", "tpu", "BM1684", "BM1684X", "load checkpoint", "stable diffusion", "算能")

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SophgoLoadCheckpoint", display_name="Load Checkpoint (Sophgo)", category=f"{CATEGORY}/loaders",
            description="Loads text encoder, U-Net and VAE compiled for a Sophgo TPU (or as ONNX) and gives an ordinary "
                        "MODEL, CLIP and VAE: put it in the place of Load Checkpoint.",
            inputs=[
                _files("model_name", "A folder of bmodels (or one combined file) under models/sophgo."),
                _device(),
                _device("unet_device", SAME, "A device of its own for the U-Net, as cards with little memory need. "
                                             "same: where the rest runs."),
                _long_prompts(),
            ],
            outputs=[io.Model.Output("MODEL", tooltip="The U-Net, for any sampler."),
                     io.Clip.Output("CLIP", tooltip="The text encoder, for CLIP Text Encode."),
                     io.Vae.Output("VAE", tooltip="The VAE; it decodes any size divisible by 8, in tiles if need be.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, model_name, **_):
        return library.fingerprint(model_name)

    @classmethod
    def execute(cls, model_name, device, unet_device, long_prompts) -> io.NodeOutput:
        from .adapters.model import as_model
        from .adapters.vae import as_vae
        source, devices = library.source(model_name), library.devices()
        encoder = source.text_encoder(devices, device, poll)
        unet = source.unet(devices, device if unet_device == SAME else unet_device, poll)
        vae_decoder = source.vae_decoder(devices, device, poll)
        vae_encoder = source.vae_encoder(devices, device, poll)
        stages = [stage for stage in (encoder, unet, vae_decoder, vae_encoder) if stage]
        tell("\n".join(stage.describe() for stage in stages), cls.hidden.unique_id)
        return io.NodeOutput(as_model(unet), _clip(encoder, long_prompts, unet.tokens), as_vae(vae_decoder, vae_encoder))


class SophgoLoadUNet(PackNode):
    ALIASES = ("sophgo unet", "bmodel unet", "diffusion model", "load diffusion model", "tpu", "算能")

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SophgoLoadUNet", display_name="Load U-Net (Sophgo)", category=f"{CATEGORY}/loaders",
            description="Loads a compiled SD 1.x U-Net as an ordinary MODEL.",
            inputs=[_files("unet_name", "A bmodel or ONNX file with a U-Net under models/sophgo; of a folder, all sizes."),
                    _device()],
            outputs=[io.Model.Output("MODEL", tooltip="The U-Net, for any sampler.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, unet_name, **_):
        return library.fingerprint(unet_name)

    @classmethod
    def execute(cls, unet_name, device) -> io.NodeOutput:
        from .adapters.model import as_model
        stage = library.source(unet_name).unet(library.devices(), device, poll)
        tell(stage.describe(), cls.hidden.unique_id)
        return io.NodeOutput(as_model(stage))


class SophgoLoadCLIP(PackNode):
    ALIASES = ("sophgo clip", "bmodel text encoder", "load clip", "tpu", "算能")

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SophgoLoadCLIP", display_name="Load CLIP (Sophgo)", category=f"{CATEGORY}/loaders",
            description="Loads a compiled SD 1.x text encoder as an ordinary CLIP.",
            inputs=[_files("clip_name", "A bmodel or ONNX file with a text encoder under models/sophgo."), _device(),
                    _long_prompts()],
            outputs=[io.Clip.Output("CLIP", tooltip="The text encoder, for CLIP Text Encode.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, clip_name, **_):
        return library.fingerprint(clip_name)

    @classmethod
    def execute(cls, clip_name, device, long_prompts) -> io.NodeOutput:
        stage = library.source(clip_name).text_encoder(library.devices(), device, poll)
        tell(stage.describe(), cls.hidden.unique_id)
        return io.NodeOutput(_clip(stage, long_prompts))


class SophgoLoadVAE(PackNode):
    ALIASES = ("sophgo vae", "bmodel vae", "load vae", "taesd", "tpu", "算能")

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SophgoLoadVAE", display_name="Load VAE (Sophgo)", category=f"{CATEGORY}/loaders",
            description="Loads a compiled VAE decoder, and an encoder if there is one, as an ordinary VAE.",
            inputs=[
                _files("decoder_name", "A bmodel or ONNX file with a VAE decoder under models/sophgo."),
                _files("encoder_name", "A file with the VAE encoder. same: the decoder's file or folder, if it holds one.",
                       first=SAME),
                _device(),
                io.Combo.Input("latent_scale", options=[OUTSIDE, INSIDE], default=OUTSIDE,
                               tooltip="Where SD's latent scale 0.18215 is applied: outside the network (Sophgo's files), "
                                       "or inside it (OpenVINO's). Washed out or garish pictures mean the other one."),
            ],
            outputs=[io.Vae.Output("VAE", tooltip="The VAE; it takes any size divisible by 8, in tiles if need be.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, decoder_name, encoder_name, **_):
        return library.fingerprint(decoder_name, *([] if encoder_name == SAME else [encoder_name]))

    @classmethod
    def execute(cls, decoder_name, encoder_name, device, latent_scale) -> io.NodeOutput:
        from .adapters.vae import as_vae
        one_of("latent_scale", latent_scale, (OUTSIDE, INSIDE))
        devices, inside = library.devices(), latent_scale == INSIDE
        source = library.source(decoder_name)
        decoder = source.vae_decoder(devices, device, poll, inside)
        other = source if encoder_name == SAME else library.source(encoder_name)
        encoder = other.vae_encoder(devices, device, poll, inside, required=encoder_name != SAME)
        tell("\n".join(stage.describe() for stage in (decoder, encoder) if stage), cls.hidden.unique_id)
        return io.NodeOutput(as_vae(decoder, encoder))
