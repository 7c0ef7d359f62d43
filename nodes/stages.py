"""The stages of a picture one by one: prompts, one sampling step, VAE. They take any MODEL, CLIP and VAE."""
from __future__ import annotations

import comfy.samplers
from comfy_api.latest import io

from .adapters.choices import DEFAULT_OVERLAP, MAX_SEED
from .base import CATEGORY, PackNode

MAX_STEPS = 10000


class SophgoTextEncode(PackNode):
    ALIASES = ("prompt", "negative prompt", "clip text encode", "sophgo", "text encoder", "提示词")

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SophgoTextEncode", display_name="Text Encode (Sophgo)", category=f"{CATEGORY}/conditioning",
            description="Encodes prompt and negative prompt at once, with (word:1.3) weights.",
            inputs=[
                io.Clip.Input("clip", tooltip="A compiled CLIP, or any other."),
                io.String.Input("prompt", multiline=True, dynamic_prompts=True, tooltip="What the picture shows."),
                io.String.Input("negative_prompt", multiline=True, dynamic_prompts=True, default="",
                                tooltip="What it must not show; may stay empty."),
            ],
            outputs=[io.Conditioning.Output("positive", display_name="positive", tooltip="The prompt."),
                     io.Conditioning.Output("negative", display_name="negative", tooltip="The negative prompt.")],
        )

    @classmethod
    def execute(cls, clip, prompt, negative_prompt) -> io.NodeOutput:
        return io.NodeOutput(*(clip.encode_from_tokens_scheduled(clip.tokenize(text))
                               for text in (prompt, negative_prompt)))


class SophgoUNetStep(PackNode):
    ALIASES = ("sampler step", "single step", "u-net step", "ksampler", "denoise step", "sophgo", "单步采样")

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SophgoUNetStep", display_name="U-Net Step (Sophgo)", category=f"{CATEGORY}/sampling",
            description="One step of a sampler. A chain of n of these gives exactly what one KSampler of n steps gives, "
                        "with every sampler, and shows what happens in between.",
            inputs=[
                io.Model.Input("model", tooltip="A compiled U-Net, or any other model."),
                io.Conditioning.Input("positive", tooltip="The prompt."),
                io.Conditioning.Input("negative", tooltip="The negative prompt."),
                io.Latent.Input("latent_image", tooltip="An empty latent or a picture's for the first step, then the "
                                                        "latent of the step before."),
                io.Int.Input("step", default=0, min=0, max=MAX_STEPS - 1, tooltip="Which step this is, counted from 0."),
                io.Int.Input("steps", default=8, min=1, max=MAX_STEPS, tooltip="Steps of the whole run."),
                io.Float.Input("cfg", default=5.0, min=0.0, max=100.0, step=0.1, round=0.01,
                               tooltip="Classifier-free guidance: how strongly the prompt is followed."),
                io.Combo.Input("sampler_name", options=comfy.samplers.SAMPLER_NAMES, default="euler",
                               tooltip="The sampler, as in KSampler."),
                io.Combo.Input("scheduler", options=comfy.samplers.SCHEDULER_NAMES, default="simple",
                               tooltip="The schedule of noise levels, as in KSampler."),
                # Not asked to change after each run: that would break the chain (some frontends do so by the name).
                io.Int.Input("seed", default=0, min=0, max=MAX_SEED,
                             tooltip="Of the noise; the same in every step of a run."),
                io.Boolean.Input("add_noise", default=True,
                                 tooltip="Add noise to the latent that begins a run. Later steps never add any."),
            ],
            outputs=[io.Latent.Output("latent", display_name="latent",
                                      tooltip="The latent after this step, for the next one."),
                     io.Latent.Output("denoised", display_name="denoised",
                                      tooltip="The model's estimate of the finished picture at this step.")],
        )

    @classmethod
    def execute(cls, model, positive, negative, latent_image, step, steps, cfg, sampler_name, scheduler, seed,
                add_noise) -> io.NodeOutput:
        from .adapters.stepping import sample_step
        return io.NodeOutput(*sample_step(model, positive, negative, latent_image, step, steps, cfg, sampler_name,
                                          scheduler, seed, add_noise))


class SophgoVAEDecode(PackNode):
    ALIASES = ("vae decode", "latent to image", "tiled decode", "sophgo", "解码")

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SophgoVAEDecode", display_name="VAE Decode (Sophgo)", category=f"{CATEGORY}/latent",
            description="Decodes latents to pictures. A compiled VAE covers sizes it was not compiled for with "
                        "overlapping tiles.",
            inputs=[
                io.Latent.Input("samples", tooltip="The latent to decode."),
                io.Vae.Input("vae", tooltip="A compiled VAE, or any other."),
                _overlap(),
            ],
            outputs=[io.Image.Output("image", tooltip="The decoded picture.")],
        )

    @classmethod
    def execute(cls, samples, vae, overlap) -> io.NodeOutput:
        from .adapters.vae import decode
        return io.NodeOutput(decode(vae, samples["samples"], overlap))


class SophgoVAEEncode(PackNode):
    ALIASES = ("vae encode", "image to latent", "img2img", "tiled encode", "sophgo", "编码")

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SophgoVAEEncode", display_name="VAE Encode (Sophgo)", category=f"{CATEGORY}/latent",
            description="Encodes pictures to latents. A compiled VAE covers sizes it was not compiled for with "
                        "overlapping tiles.",
            inputs=[
                io.Image.Input("pixels", tooltip="The picture to encode; sizes are cut to multiples of 8."),
                io.Vae.Input("vae", tooltip="A compiled VAE with an encoder, or any other."),
                _overlap(),
            ],
            outputs=[io.Latent.Output("latent", tooltip="The encoded latent.")],
        )

    @classmethod
    def execute(cls, pixels, vae, overlap) -> io.NodeOutput:
        from .adapters.vae import encode
        return io.NodeOutput({"samples": encode(vae, pixels, overlap)})


def _overlap() -> io.Int.Input:
    return io.Int.Input("overlap", default=DEFAULT_OVERLAP, min=0, max=512, step=8,
                        tooltip="Pixels that neighbouring tiles share and blend over; half a tile at most. Used only when "
                                "a compiled VAE needs tiles.")
