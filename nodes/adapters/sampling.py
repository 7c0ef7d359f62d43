"""A whole sampling loop in the worker that has the U-Net, with everything before and after it done by ComfyUI.

comfy.sample.sample_custom resolves conditions, areas, masks, time ranges and latent scale, and loads the model; then it
calls a Sampler. Ours does not loop: it hands the finished conditions to the worker, which does.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import comfy.k_diffusion.sampling
import comfy.sample
import comfy.samplers
import latent_preview
import numpy as np
import torch
from comfy.cli_args import LatentPreviewMethod, args
from comfy.patcher_extension import WrappersMP, get_all_wrappers

from ...engines.engine import from_wire
from ...engines.errors import EngineError
from ...engines.roles import VAE_SCALE
from ...engines.sdxl.samplers import GUIDERS, SAMPLERS, Options, noise_count
from ...engines.sdxl.schedules import DISCRETIZATIONS, from_pure_noise, schedule
from .choices import COMFY, MAX_SEED, NOISES
from .host import maker, one_of
from .model import as_array
from .sdxl import HOW_TO_CONDITION, SDXLModel
from .stepping import TRACE

ANCESTRAL = ("EulerAncestral", "DPMPP2SAncestral")
# Keys of a LATENT that are about the latent that came in, not about the one that goes out.
PASSING = (TRACE, "downscale_ratio_spacial", "downscale_ratio_temporal")

# What other nodes may put into a MODEL to be called at every step, where only the worker is.
STEP_OPTIONS = {"sampler_cfg_function": "replaces the guidance", "sampler_pre_cfg_function": "changes the guidance",
                "sampler_post_cfg_function": "changes the guidance", "sampler_calc_cond_batch_function": "calls the model",
                "model_function_wrapper": "wraps the model", "denoise_mask_function": "changes the mask",
                "context_handler": "cuts the latent into windows"}
STEP_WRAPPERS = (WrappersMP.PREDICT_NOISE, WrappersMP.CALC_COND_BATCH, WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL)
# What a condition may carry besides its text, and what to do instead.
STEP_CONDITIONS = {"control": ("a ControlNet", "remove it, or sample with a stock model"),
                   "gligen": ("GLIGEN boxes", "remove them, or sample with a stock model"),
                   "hooks": ("hooks (CreateHook...)", "remove them, or use KSampler, which takes what patches no weights"),
                   "default": ("a default (ConditioningSetDefaultCombine)", "use KSampler, which takes the same MODEL")}
TAKEN = {"c_crossattn", "y", "crossattn_controlnet"}      # of what ComfyUI makes of a condition for SDXL


# -- noise ---------------------------------------------------------------------------------------------------------
class ComfyNoise:
    """As stock samplers draw it on the CPU: the same seed means the same picture there and on every device."""

    def __init__(self, seed: int):
        self.seed = seed

    def first(self, latent: torch.Tensor, rows: Sequence[int] | None) -> torch.Tensor:
        noise = comfy.sample.prepare_noise(latent, self.seed, rows)
        self.after_first = torch.random.get_rng_state()
        return noise

    def steps(self, sampler: str, count: int, noise: torch.Tensor) -> np.ndarray:
        if sampler in ANCESTRAL:
            # Newer versions add 1 to the seed, which must still fit.
            draw = comfy.k_diffusion.sampling.default_noise_sampler(noise, seed=min(self.seed, MAX_SEED - 1))
            return np.stack([as_array(draw(None, None)) for _ in range(count)])
        # Stock euler and heun go on where the first noise ended: churn must not be that noise once more.
        generator = torch.Generator()
        generator.set_state(self.after_first)
        return np.stack([as_array(torch.randn(noise.shape, generator=generator)) for _ in range(count)])


class NumpyNoise:
    """As the article draws it: one RandomState, the noise of the start first."""

    def __init__(self, seed: int):
        # RandomState takes 32 bits as a number, more of them as a list.
        self.random = np.random.RandomState(seed if seed < 2 ** 32 else [seed & 0xFFFFFFFF, seed >> 32])

    def first(self, latent: torch.Tensor, rows: Sequence[int] | None) -> torch.Tensor:
        rows = list(range(len(latent)) if rows is None else rows)
        drawn = self.random.randn(max(rows) + 1, *latent.shape[1:])
        return torch.from_numpy(drawn[rows].astype(np.float32))

    def steps(self, sampler: str, count: int, noise: torch.Tensor) -> np.ndarray:
        return self.random.randn(count, *noise.shape).astype(np.float32)


# -- what the worker cannot do -------------------------------------------------------------------------------------
def refuse(what: str) -> EngineError:
    return EngineError(f"{what}, and AscendSDXLSampler takes all steps on the device, where that node is not: remove it, or "
                       "use KSampler, which takes the same MODEL.")


def check_model(model) -> None:
    """Raise EngineError unless `model` is an SDXL of AscendLoadSDXL whose steps nothing else takes part in."""
    if not isinstance(getattr(model, "model", None), SDXLModel):
        raise EngineError("AscendSDXLSampler runs models of AscendLoadSDXL only: use KSampler for this MODEL, or load it "
                          "with AscendLoadSDXL.")
    for name, patch in model.object_patches.items():
        raise refuse(f"{maker(patch)} replaces the model's '{name}'")


def check_options(model: SDXLModel, options: dict) -> None:
    model.diffusion_model.refuse_patches(options.get("transformer_options", {}))
    for key, what in STEP_OPTIONS.items():
        if functions := options.get(key):
            raise refuse(f"{maker(functions[-1] if isinstance(functions, list) else functions)} {what} at each step")
    for kind in STEP_WRAPPERS:
        for wrapper in get_all_wrappers(kind, options, is_model_options=True):
            raise refuse(f"{maker(wrapper)} wraps what each step does")


def check_conditioning(*conditionings: list) -> None:
    for context, options in (condition for conditioning in conditionings for condition in conditioning):
        for key, (what, instead) in STEP_CONDITIONS.items():
            if options.get(key):
                raise EngineError(f"The conditioning carries {what}, which AscendSDXLSampler cannot take along to the "
                                  f"device: {instead}.")
        if context is None or options.get("pooled_output") is None and "unclip_conditioning" not in options:
            raise EngineError("The conditioning has no pooled text, or no text at all, and SDXL needs both: "
                              f"{HOW_TO_CONDITION}.")


# -- conditions ----------------------------------------------------------------------------------------------------
def resolved(condition: dict, noise: torch.Tensor) -> tuple[dict, dict[str, np.ndarray]]:
    """A condition as ComfyUI prepares it -> what loop.sample takes of it: its settings, and its arrays.

    Arrays: context (1 or B,L,D), y (1 or B,V), weight (1 or B,1,h,w) unless it is 1 everywhere.
    """
    if extra := set(condition["model_conds"]) - TAKEN:
        raise EngineError("The conditioning carries more than SDXL's text-to-image U-Net takes "
                          f"({', '.join(sorted(extra))}): remove the node that added it.")
    height, width = noise.shape[-2:]
    if "area" in condition:
        middle = len(condition["area"]) // 2
        top, left = condition["area"][middle:middle + 2]
        if top >= height or left >= width:
            raise EngineError(f"The area of a condition begins at ({left * VAE_SCALE}, {top * VAE_SCALE}), outside the "
                              f"picture of {width * VAE_SCALE}x{height * VAE_SCALE}: move it (ConditioningSetArea).")
    # Whether it acts at a level is asked in the worker; here it always does.
    always = {key: value for key, value in condition.items() if key not in ("timestep_start", "timestep_end")}
    part = comfy.samplers.get_area_and_mult(always, noise, None)
    arrays = {name: as_array(condition["model_conds"][key].cond[:len(noise)])
              for name, key in (("context", "c_crossattn"), ("y", "y"))}
    weight = as_array(part.mult[:, :1])
    if (weight != 1).any():
        arrays["weight"] = weight[:1] if (weight == weight[:1]).all() else weight
    settings = {"area": None if part.area is None else [int(size) for size in part.area]}
    for name, key in (("start", "timestep_start"), ("end", "timestep_end")):
        settings[name] = float(condition[key]) if key in condition else None
    return settings, arrays


# -- the sampler ---------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Run:
    """What AscendSDXLSampler's widgets say. Raises EngineError for a choice that is none."""

    sampler: str
    discretization: str
    guider: str
    steps: int
    cfg: float
    denoise: float
    snap: bool
    options: Options

    def __post_init__(self):
        one_of("sampler_name", self.sampler, list(SAMPLERS))
        one_of("discretization", self.discretization, list(DISCRETIZATIONS))
        one_of("guider", self.guider, GUIDERS)

    @property
    def sigmas(self) -> list[float]:
        return schedule(self.discretization, self.steps, self.denoise)


class WorkerSampler(comfy.samplers.Sampler):
    """A SAMPLER for an SDXLModel: one call of the worker is the whole run."""

    def __init__(self, run: Run, noise: ComfyNoise | NumpyNoise):
        self.run, self.noise = run, noise

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None,
               disable_pbar=False):
        """As comfy.samplers.KSAMPLER.sample: noise and latent (B,4,h,w), the latent scaled -> latent, scaled."""
        model, run = model_wrap.inner_model, self.run
        check_options(model, extra_args["model_options"])
        sigmas = sigmas.tolist()
        arrays = {"noise": as_array(noise), "latent": as_array(latent_image)}
        if denoise_mask is not None:
            arrays["mask"] = as_array(denoise_mask[:, :1])
        if count := noise_count(run.sampler, sigmas, run.options):
            arrays["step_noise"] = self.noise.steps(run.sampler, count, noise)
        conditions = []
        for positive, condition in self._conditions(model_wrap.conds):
            settings, own = resolved(condition, noise)
            arrays |= {f"{name}.{len(conditions)}": array for name, array in own.items()}
            conditions.append({"positive": positive, **settings})
        settings = {
            "sampler": run.sampler, "sigmas": sigmas, "guider": run.guider, "cfg": float(run.cfg), "snap": run.snap,
            "max_denoise": from_pure_noise(sigmas, run.denoise), "options": vars(run.options), "conditions": conditions,
            "preview": args.preview_method != LatentPreviewMethod.NoPreviews}

        def progress(report: dict) -> None:
            denoised = report["denoised"] and torch.from_numpy(from_wire(*report["denoised"]))
            callback(report["step"] - 1, denoised, None, report["steps"])
        return torch.from_numpy(model.stage.sample(arrays, settings, progress))

    def _conditions(self, conds: dict) -> Iterator[tuple[bool, dict]]:
        yield from ((True, condition) for condition in conds["positive"])
        if self.run.guider != "Identity":
            yield from ((False, condition) for condition in conds["negative"])


def sample(model, positive: list, negative: list, latent: dict, seed: int, run: Run, noise: str) -> dict:
    """A LATENT after a whole run in the worker, its other keys kept. Raises EngineError."""
    one_of("noise", noise, NOISES)
    check_model(model)
    check_conditioning(positive, negative)
    sigmas = run.sigmas
    source = ComfyNoise(seed) if noise == COMFY else NumpyNoise(seed)
    start = comfy.sample.fix_empty_latent_channels(model, latent["samples"])
    samples = comfy.sample.sample_custom(
        model, source.first(start, latent.get("batch_index")), run.cfg, WorkerSampler(run, source),
        torch.tensor(sigmas), positive, negative, start, noise_mask=latent.get("noise_mask"),
        callback=latent_preview.prepare_callback(model, max(1, len(sigmas) - 1)), seed=seed)
    return {**{key: value for key, value in latent.items() if key not in PASSING}, "samples": samples}
