"""What the SDXL benches run in MindSpore's interpreter: `python bench/sdxl_inside.py <function> <keywords as JSON>`.

Prints one line of JSON.
"""
from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

STEPS, ROUNDS, GUIDANCE = 10, 3, 5.0


def loops(path: str, size: int) -> dict[str, float]:
    """Seconds of STEPS steps with guidance, one picture of size x size latent cells: ours, and mindone's pipeline.

    Both use the same U-Net object, so the same weights and kernels, and take turns; the best of ROUNDS counts. Also how
    many of our seconds the U-Net itself takes.
    """
    from engines.runtimes.mindspore import Runtime
    runtime = Runtime({"target": "cpu"})
    import mindspore as ms

    # the whole of mindone, before the runtime imports the part it needs
    from mindone.diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    from engines.sdxl import schedules
    model = runtime.models[runtime.load(path)]
    unet, vae = model["unet"], model["vae_decoder"].vae
    config = unet.config
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    random = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32)
    noise, context, text = normal(1, 4, size, size), normal(2, 77, config["cross_attention_dim"]), normal(2, pooled)
    vector = np.concatenate([text, normal(2, config["projection_class_embeddings_input_dim"] - pooled)], 1)

    inside = 0.0
    predict = unet.predict

    def timed(*arguments):
        nonlocal inside
        started = time.perf_counter()
        result = predict(*arguments)
        inside += time.perf_counter() - started
        return result

    def ours() -> None:
        arrays = {"noise": noise, "latent": np.zeros_like(noise), "context.0": context[1:], "y.0": vector[1:],
                  "context.1": context[:1], "y.1": vector[:1]}
        settings = {"sampler": "EulerEDM", "sigmas": schedules.DISCRETIZATIONS["LegacyDDPM"](STEPS), "cfg": GUIDANCE,
                    "max_denoise": True, "conditions": [{"positive": True}, {"positive": False}]}
        buffers = {}
        for name, array in arrays.items():
            buffers[name] = runtime.allocate("float32", array.shape)
            runtime.write(buffers[name], array.tobytes())
        runtime.perform(next(iter(runtime.models)), "sample", buffers, settings, lambda report: None)

    scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                       timestep_spacing="leading", steps_offset=1)
    pipeline = StableDiffusionXLPipeline(vae=vae, text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None,
                                         unet=either(unet.net), scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)

    def theirs() -> None:
        pipeline(prompt_embeds=ms.Tensor(context[1:]), negative_prompt_embeds=ms.Tensor(context[:1]),
                 pooled_prompt_embeds=ms.Tensor(text[1:]), negative_pooled_prompt_embeds=ms.Tensor(text[:1]),
                 latents=ms.Tensor(noise), num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="latent",
                 height=8 * size, width=8 * size)

    ours(), theirs()
    unet.predict = timed
    times, within = {"ours": [], "theirs": []}, []
    # one after the other, so that what else the machine does is shared
    for _ in range(ROUNDS):
        for name, run in (("ours", ours), ("theirs", theirs)):
            inside, started = 0.0, time.perf_counter()
            run()
            times[name].append(time.perf_counter() - started)
            within += [inside] if name == "ours" else []
    best = min(range(ROUNDS), key=times["ours"].__getitem__)
    return {"ours": times["ours"][best], "theirs": min(times["theirs"]), "unet": within[best]}


def calls(path: str, size: int) -> dict[str, float]:
    """Seconds of a U-Net call with two rows, and of decoding one picture; the best of ROUNDS after a first one."""
    from engines.runtimes.mindspore import Runtime
    runtime = Runtime({"target": "cpu"})
    from mindspore import Tensor
    model = runtime.models[runtime.load(path)]
    unet, latent = model["unet"], np.zeros((2, 4, size, size), np.float32)
    context = Tensor(np.zeros((2, 77, unet.config["cross_attention_dim"]), np.float32))
    y = Tensor(np.zeros((2, unet.config["projection_class_embeddings_input_dim"]), np.float32))
    return {"U-Net": best(lambda: unet.predict(latent, np.zeros(2, np.float32), context, y)),
            "VAE decoder": best(lambda: model["vae_decoder"].compute(Tensor(latent[:1])))}


def best(run) -> float:
    """Seconds of the fastest of ROUNDS runs, after one that is not counted."""
    times = []
    for _ in range(ROUNDS + 1):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times[1:])


def either(net):
    """The same network, which takes mindone's two inputs as well as our one vector made of them."""
    fused = type(net)

    class Either(fused):
        def get_aug_embed(self, emb, encoder_hidden_states, added_cond_kwargs):
            kind = fused if "y" in added_cond_kwargs else fused.__base__
            return kind.get_aug_embed(self, emb, encoder_hidden_states, added_cond_kwargs)
    net.__class__ = Either
    return net


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](**json.loads(sys.argv[2]))))
