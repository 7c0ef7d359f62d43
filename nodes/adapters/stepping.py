"""One step of any ComfyUI sampler at a time, with the result of the whole run.

Most samplers remember: the multistep ones earlier predictions, the ancestral ones a noise generator. A chain of
nodes has no such memory, so a latent carries the predictions made so far, and each step runs the sampler from its
start again, answering the earlier model calls from that record. Only the calls of the new step reach the model, and
the sampler cannot tell the difference: n chained steps equal one run of n steps, bit for bit.
"""
from __future__ import annotations

from dataclasses import dataclass

import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch

from ...engines.errors import EngineError

TRACE = "sophgo_trace"       # key of the record in a LATENT
POST_CFG = "sampler_post_cfg_function"


@dataclass(frozen=True, eq=False)
class Trace:
    """What earlier steps of one run left behind. All tensors float32, latents in ComfyUI's unscaled space."""

    settings: tuple                      # sampler, scheduler, steps, seed
    start: int                           # the step at which the run began
    next: int                            # the step that continues it
    begin: dict                          # the LATENT it began with
    noise: torch.Tensor
    calls: tuple                         # (denoised, uncond_denoised or None) of every model call so far
    result: torch.Tensor                 # the latent that this record was given out with


class _StepDone(Exception):
    def __init__(self, x: torch.Tensor):
        self.x = x


class _Recorder:
    """Stands between a sampler and the model: answers known calls, passes on new ones, ends at call `stop`."""

    def __init__(self, model, known: tuple, stop: int | None, own_functions: int):
        self.model, self.calls, self.stop, self.count = model, list(known), stop, 0
        self.own_functions = own_functions     # post-CFG functions of the user's; later ones are the sampler's

    def __getattr__(self, name):
        return getattr(self.model, name)

    def __call__(self, x, sigma, **kwargs):
        if self.count == self.stop:
            raise _StepDone(x)
        self.count += 1
        functions = kwargs.get("model_options", {}).get(POST_CFG, [])
        if self.count <= len(self.calls):
            denoised, uncond = self.calls[self.count - 1]
            for function in functions[self.own_functions:]:      # CFG++ samplers read the uncond prediction this way
                function({"denoised": denoised, "uncond_denoised": uncond})
            return denoised
        seen = {}

        def note(args):
            seen["uncond"] = args.get("uncond_denoised")
            return args["denoised"]
        options = {**kwargs.get("model_options", {}), POST_CFG: [*functions, note]}
        denoised = self.model(x, sigma, **{**kwargs, "model_options": options})
        self.calls.append((denoised, seen.get("uncond")))
        return denoised


class _Counter:
    """A model that does nothing, to learn when a sampler calls."""

    def __init__(self, model):
        self.model, self.calls = model, 0

    def __getattr__(self, name):
        return getattr(self.model, name)

    def __call__(self, x, sigma, **kwargs):
        self.calls += 1
        for function in kwargs.get("model_options", {}).get(POST_CFG, []):
            function({"denoised": x * 0.5, "uncond_denoised": x * 0.5})
        return x * 0.5


def _first_calls(function, model, sigmas, extra_args, options) -> list[int]:
    """The number of model calls made before each step begins, and after the last: steps + 1 numbers.

    Found by running the sampler on a 2x2 latent with a model that costs nothing: samplers report each step right
    after its first call. A sampler that does not report every step is cut into equal numbers of calls.
    """
    counter, firsts = _Counter(model), []
    clean = {**extra_args, "model_options": {**extra_args["model_options"], POST_CFG: []}}
    x = torch.zeros(1, 4, 2, 2) + sigmas[0].cpu()
    function(counter, x, sigmas.clone(), extra_args=clean, callback=lambda info: firsts.append(counter.calls - 1),
             disable=True, **options)
    steps = len(sigmas) - 1
    if len(firsts) == steps:
        return [*firsts, counter.calls]
    return [counter.calls * step // steps for step in range(steps + 1)]


class _OneStep(comfy.samplers.KSAMPLER):
    """A KSAMPLER that replays `known` calls and returns the latent after step `step` of its schedule; `last`: after all."""

    def __init__(self, sampler: comfy.samplers.KSAMPLER, known: tuple, step: int, last: bool):
        super().__init__(sampler.sampler_function, sampler.extra_options, sampler.inpaint_options)
        self.known, self.step, self.last = known, step, last
        self.inner, self.sampler_function = sampler.sampler_function, self._run

    def _run(self, model, x, sigmas, extra_args, callback, disable, **options):
        firsts = _first_calls(self.inner, model, sigmas, extra_args, options)
        recorder = _Recorder(model, self.known[:firsts[self.step]], None if self.last else firsts[self.step + 1],
                             len(extra_args["model_options"].get(POST_CFG, [])))

        def report(info):
            if info["i"] >= self.step:
                callback(info)
        try:
            result = self.inner(recorder, x, sigmas.clone(), extra_args=extra_args, callback=report, disable=True,
                                **options)
        except _StepDone as done:
            result = done.x
        self.calls = tuple(recorder.calls)
        return result


def sample_step(model, positive, negative, latent: dict, step: int, steps: int, cfg: float, sampler_name: str,
                scheduler: str, seed: int, add_noise: bool) -> tuple[dict, dict]:
    """Run step `step` (0-based) of a run of `steps`: (LATENT after it, LATENT of the denoised estimate).

    A latent that comes from the step before, unchanged and with the same settings, continues that run; any other
    latent begins one at this step, as KSamplerAdvanced with start_at_step does. Raises EngineError.
    """
    if step >= steps:
        raise EngineError(f"Step {step} was asked for and a run of {steps} steps has steps 0 to {steps - 1}.")
    for kind, name, known in (("sampler", sampler_name, comfy.samplers.SAMPLER_NAMES),
                              ("scheduler", scheduler, comfy.samplers.SCHEDULER_NAMES)):
        if name not in known:        # ComfyUI does not check the combos of a workflow that comes in over the API
            raise EngineError(f"There is no {kind} '{name}' in this ComfyUI, which has: {', '.join(known)}.")
    if sampler_name == "dpm_adaptive":
        raise EngineError("dpm_adaptive chooses its own number of steps, so it has no step to take alone: use KSampler, "
                          "or another sampler here.")
    settings = (sampler_name, scheduler, steps, seed)
    trace = latent.get(TRACE)
    if not (isinstance(trace, Trace) and (trace.settings, trace.next) == (settings, step)
            and torch.equal(trace.result, latent["samples"])
            and trace.begin.get("noise_mask") is latent.get("noise_mask")):
        trace = _begin(model, latent, settings, step, seed, add_noise)
    sigmas = comfy.samplers.KSampler(model, steps=steps, device=model.load_device, sampler=sampler_name,
                                     scheduler=scheduler, denoise=1.0, model_options=model.model_options).sigmas
    # Some schedulers give a level more than asked for (ddim_uniform) or fewer (beta, with hundreds of steps). As in
    # KSampler all of them are run, so that the last step takes what is left, and none remain for a step beyond them.
    if step >= len(sigmas) - 1:
        return latent, latent
    last = step in (steps - 1, len(sigmas) - 2)
    sampler = _OneStep(comfy.samplers.sampler_object(sampler_name), trace.calls, step - trace.start, last)
    estimate = {}
    preview = latent_preview.prepare_callback(model, steps)

    def callback(index, denoised, x, total):
        estimate["denoised"] = denoised
        preview(index + trace.start, denoised, x, steps)

    samples = comfy.sample.sample_custom(
        model, trace.noise, cfg, sampler, sigmas[trace.start:].clone(), positive, negative, trace.begin["samples"],
        noise_mask=trace.begin.get("noise_mask"), callback=callback, disable_pbar=True, seed=seed)
    out = {key: value for key, value in latent.items() if key != TRACE}
    done = {**out, "samples": samples}
    done[TRACE] = Trace(settings, trace.start, step + 1, trace.begin, trace.noise, sampler.calls, samples)
    denoised = estimate.get("denoised")
    return done, {**out, "samples": samples if denoised is None else model.model.process_latent_out(denoised.cpu())}


def _begin(model, latent: dict, settings: tuple, step: int, seed: int, add_noise: bool) -> Trace:
    begin = {key: value for key, value in latent.items() if key != TRACE}
    begin["samples"] = comfy.sample.fix_empty_latent_channels(model, latent["samples"])
    noise = (comfy.sample.prepare_noise(begin["samples"], seed, latent.get("batch_index")) if add_noise
             else torch.zeros_like(begin["samples"], device="cpu"))
    return Trace(settings, step, step, begin, noise, (), begin["samples"])
