"""SDXL on Ascend NPUs, or on the CPU, through MindSpore: loader, conditioner, sampler, VAE."""
from __future__ import annotations

import folder_paths
from comfy_api.latest import io

from ..engines.sdxl import AUTO, PRECISIONS
from ..engines.sdxl.samplers import GUIDERS, SAMPLERS, Options
from ..engines.sdxl.schedules import DISCRETIZATIONS
from . import library
from .adapters.choices import COMFY, ENCODE, MAX_SEED, NOISES, ZEROS
from .adapters.host import one_of, poll, tell
from .base import CATEGORY, PackNode

FORMAT = "mindspore"         # what the devices must run
MAX_STEPS = 10000
MAX_SIDE = 16384             # picture pixels, as stock nodes


class AscendLoadSDXL(PackNode):
    ALIASES = ("ascend", "mindspore", "npu", "910", "sdxl", "load checkpoint", "diffusers", "昇腾")

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AscendLoadSDXL", display_name="Load SDXL (Ascend)", category=f"{CATEGORY}/loaders",
            description="Loads an SDXL checkpoint into MindSpore, on an Ascend NPU or on the CPU, and gives an ordinary "
                        "MODEL, CLIP and VAE: put it in the place of Load Checkpoint.",
            inputs=[
                io.Combo.Input("model_name", options=sorted(library.sdxl_models()),
                               tooltip="A .safetensors file or a MindSpore .ckpt of models/checkpoints, or a diffusers "
                                       "folder of models/diffusers."),
                io.Combo.Input("device", options=library.device_names(FORMAT), default=AUTO,
                               tooltip="Where it runs. auto: the first Ascend NPU, else MindSpore on the CPU. The server's "
                                       "owner names more devices in sophgo_ascend.toml."),
                io.Combo.Input("precision", options=list(PRECISIONS), default=AUTO,
                               tooltip="Of text encoders and U-Net. auto: float16 on Ascend, float32 on the CPU. The VAE "
                                       "always computes in float32."),
            ],
            outputs=[io.Model.Output("MODEL", tooltip="The U-Net, for SDXL Sampler (Ascend) or any other sampler."),
                     io.Clip.Output("CLIP", tooltip="Both text encoders, for any node that encodes prompts."),
                     io.Vae.Output("VAE", tooltip="The VAE, for sizes divisible by 8.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, model_name, **_):
        return library.fingerprint(model_name, files=library.sdxl_files)

    @classmethod
    def execute(cls, model_name, device, precision) -> io.NodeOutput:
        from ..engines.sdxl.checkpoint import open_checkpoint
        from ..engines.sdxl.stages import open_sdxl
        from .adapters import sdxl
        one_of("precision", precision, PRECISIONS)
        checkpoint = open_checkpoint(library.sdxl_model(model_name))
        model = open_sdxl(checkpoint, library.devices().choose_worker(FORMAT, device), precision, poll)
        tell(model.describe(), cls.hidden.unique_id)
        embeddings = folder_paths.get_folder_paths("embeddings")
        return io.NodeOutput(sdxl.as_model(model.unet), sdxl.as_clip(model, embeddings), sdxl.as_vae(model))


class AscendSDXLConditioner(PackNode):
    ALIASES = ("sdxl prompt", "clip text encode sdxl", "conditioner", "size conditioning", "ascend", "提示词")

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AscendSDXLConditioner", display_name="SDXL Conditioner (Ascend)", category=f"{CATEGORY}/conditioning",
            description="Encodes prompt and negative prompt with the sizes SDXL is conditioned on. For any sampler.",
            inputs=[
                io.Clip.Input("clip", tooltip="The CLIP of Load SDXL (Ascend), or any stock SDXL one."),
                io.String.Input("prompt", multiline=True, dynamic_prompts=True, tooltip="What the picture shows."),
                io.String.Input("negative_prompt", multiline=True, dynamic_prompts=True, default="",
                                tooltip="What it must not show."),
                _side("original_width", 1024, "Width of the picture this would be a copy of; small ones look blurred."),
                _side("original_height", 1024, "Its height."),
                _side("crop_top", 0, "How many of its rows are cut off above; 0 keeps things in the middle."),
                _side("crop_left", 0, "How many of its columns are cut off on the left."),
                _side("target_width", 1024, "Width of the picture that is made."),
                _side("target_height", 1024, "Its height."),
                io.Combo.Input("unconditional", options=[ENCODE, ZEROS], default=ENCODE,
                               tooltip="What the picture is guided away from. encode: the negative prompt, an empty one "
                                       "too, as stock nodes. zeros: numbers that are all 0, as the article; for this "
                                       "negative_prompt must be empty."),
            ],
            outputs=[io.Conditioning.Output("positive", display_name="positive", tooltip="For a sampler's positive."),
                     io.Conditioning.Output("negative", display_name="negative", tooltip="For a sampler's negative.")],
        )

    @classmethod
    def execute(cls, clip, prompt, negative_prompt, original_width, original_height, crop_top, crop_left, target_width,
                target_height, unconditional) -> io.NodeOutput:
        from .adapters.sdxl import conditions
        sizes = {"width": original_width, "height": original_height, "crop_w": crop_left, "crop_h": crop_top,
                 "target_width": target_width, "target_height": target_height}
        return io.NodeOutput(*conditions(clip, prompt, negative_prompt, sizes, unconditional))


class AscendSDXLSampler(PackNode):
    ALIASES = ("ksampler", "sdxl sampler", "euler edm", "heun", "dpm++", "mindspore", "ascend", "采样器")

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AscendSDXLSampler", display_name="SDXL Sampler (Ascend)", category=f"{CATEGORY}/sampling",
            description="Samples with the whole loop beside the U-Net, on the device of Load SDXL (Ascend).",
            inputs=[
                io.Model.Input("model", tooltip="The MODEL of Load SDXL (Ascend); for others there is KSampler."),
                io.Conditioning.Input("positive", tooltip="The prompt."),
                io.Conditioning.Input("negative", tooltip="The negative prompt."),
                io.Latent.Input("latent_image", tooltip="An empty latent, or a picture's; with a noise mask only what it "
                                                        "covers is made anew."),
                io.Int.Input("seed", default=0, min=0, max=MAX_SEED, control_after_generate=True, tooltip="Of the noise."),
                io.Int.Input("steps", default=40, min=1, max=MAX_STEPS, tooltip="How many noise levels are visited."),
                io.Float.Input("cfg", default=5.0, min=0.0, max=100.0, step=0.1, round=0.01,
                               tooltip="Classifier-free guidance: how strongly the prompt is followed."),
                io.Float.Input("denoise", default=1.0, min=0.0, max=1.0, step=0.01,
                               tooltip="How much of the latent is made anew: less keeps more of its picture."),
                io.Combo.Input("sampler_name", options=list(SAMPLERS),
                               tooltip="How the noise is removed from level to level. EulerEDM is KSampler's euler."),
                io.Combo.Input("discretization", options=list(DISCRETIZATIONS),
                               tooltip="Which noise levels are visited. LegacyDDPM is KSampler's scheduler simple."),
                io.Combo.Input("guider", options=list(GUIDERS),
                               tooltip="VanillaCFG: prompt and negative prompt, by cfg. Identity: the prompt alone."),
                _option("s_churn", 100.0, "EDM samplers: noise that is put back during the whole run; 0 puts none back."),
                _option("s_tmin", 1000.0, "s_churn acts at noise levels from this one up."),
                _option("s_tmax", 1000.0, "s_churn acts at noise levels up to this one."),
                _option("s_noise", 100.0, "What noise added after the start is multiplied by."),
                io.Boolean.Input("snap_sigmas", default=True,
                                 tooltip="Ask the U-Net at the nearest of the 1000 levels it was trained with, as the "
                                         "article does; off: at the level itself, as KSampler. The same unless there is "
                                         "churn, the discretization is EDM or the sampler DPMPP2SAncestral."),
                io.Combo.Input("noise", options=list(NOISES), default=COMFY,
                               tooltip="comfy: a seed gives the noise that stock samplers draw. numpy: what the article "
                                       "draws."),
            ],
            outputs=[io.Latent.Output("latent", display_name="latent", tooltip="The finished latent, for VAE Decode.")],
        )

    @classmethod
    def execute(cls, model, positive, negative, latent_image, seed, steps, cfg, denoise, sampler_name, discretization,
                guider, s_churn, s_tmin, s_tmax, s_noise, snap_sigmas, noise) -> io.NodeOutput:
        from .adapters.sampling import Run, sample
        options = Options(s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=s_noise)
        run = Run(sampler_name, discretization, guider, steps, cfg, denoise, snap_sigmas, options)
        return io.NodeOutput(sample(model, positive, negative, latent_image, seed, run, noise))


class AscendVAEDecode(PackNode):
    ALIASES = ("vae decode", "latent to image", "ascend", "mindspore", "解码")

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AscendVAEDecode", display_name="VAE Decode (Ascend)", category=f"{CATEGORY}/latent",
            description="Decodes latents to pictures, in float32.",
            inputs=[io.Latent.Input("samples", tooltip="The latent to decode."),
                    io.Vae.Input("vae", tooltip="The VAE of Load SDXL (Ascend), or any other.")],
            outputs=[io.Image.Output("image", display_name="image", tooltip="The decoded picture.")],
        )

    @classmethod
    def execute(cls, samples, vae) -> io.NodeOutput:
        from .adapters.vae import decode
        return io.NodeOutput(decode(vae, samples["samples"]))


class AscendVAEEncode(PackNode):
    ALIASES = ("vae encode", "image to latent", "img2img", "ascend", "mindspore", "编码")

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AscendVAEEncode", display_name="VAE Encode (Ascend)", category=f"{CATEGORY}/latent",
            description="Encodes pictures to latents, in float32.",
            inputs=[io.Image.Input("pixels", tooltip="The picture to encode; sizes are cut to multiples of 8."),
                    io.Vae.Input("vae", tooltip="The VAE of Load SDXL (Ascend), or any other.")],
            outputs=[io.Latent.Output("latent", display_name="latent", tooltip="The encoded latent.")],
        )

    @classmethod
    def execute(cls, pixels, vae) -> io.NodeOutput:
        from .adapters.vae import encode
        return io.NodeOutput({"samples": encode(vae, pixels)})


def _side(id: str, default: int, tooltip: str) -> io.Int.Input:
    return io.Int.Input(id, default=default, min=0, max=MAX_SIDE, tooltip=f"{tooltip} In pixels.")


def _option(id: str, most: float, tooltip: str) -> io.Float.Input:
    return io.Float.Input(id, default=getattr(Options, id), min=0.0, max=most, step=0.01, tooltip=tooltip)
