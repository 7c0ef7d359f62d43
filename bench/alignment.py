"""The numbers and plots of docs/precision-alignment.md, on the demo's model in Sophgo's simulator.

    python -m bench.alignment [--work FOLDER] [--images FOLDER] [--steps 20]

A run of the checkpoint in torch, float32, is the reference. Then each variant: its networks over the reference's inputs
(teacher-forced), and a run of its own (free-running). It takes about half an hour on two quiet cores; what is there
from an earlier call is not made again, so that it can be stopped at any time. Needs what `make demo` installs, and
Python 3.10 for the compiler (`python -m compiler`).
"""
from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engines.alignment import report
from engines.alignment.__main__ import networks_of
from engines.alignment.align import NO_CAUSES, align
from engines.alignment.plot import Line, Panel, draw
from engines.alignment.recording import Recording
from engines.devices import find_devices
from engines.workers import Worker
from tools.comfyui import Server
from tools.install import LOCAL, PACK

WORK = LOCAL / "alignment"
IMAGES = PACK / "docs" / "images"
SHIPPED = PACK / "demo" / "models"
ONNX = "shapes-onnx"
PROMPT = "a red circle on a white background"
SMALL_ERROR = 0.003              # the article's: of a step, relative


@dataclass(frozen=True)
class Variant:
    """Files to compare: the U-Net's folder, and that of the other networks, of SHIPPED or made here."""

    title: str
    unet: str
    others: str
    make: Callable[[Path], None] | None = None     # fills the U-Net's folder, if it is not shipped


def _half(folder: Path) -> None:
    """The demo's four networks for the BM1684X in F16, which is not shipped."""
    from compiler import Toolchain, convert
    from demo import export
    toolchain = Toolchain.install()
    for onnx in export.export(folder.parent / "onnx"):
        convert(onnx, "bm1684x", "F16", folder / f"{onnx.stem}.bmodel", toolchain=toolchain)


def _float_timestep(precision: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        """A U-Net as a plain export gives it: a float timestep whose sines are computed inside."""
        import torch

        from compiler import Toolchain, convert
        from demo import export, nets

        class Plain(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.unet = export.plain_attention(nets.load_unet())

            def forward(self, latent, timestep, context):
                return self.unet(latent, timestep, context, return_dict=False)[0]
        inputs = {"latent": torch.zeros(2, 4, 8, 8), "timestep": torch.tensor([601.0, 601.0]),
                  "context": torch.zeros(2, nets.TOKENS, nets.WIDTH)}
        folder.mkdir(parents=True, exist_ok=True)
        torch.onnx.export(Plain(), tuple(inputs.values()), folder / "unet.onnx", input_names=list(inputs),
                          output_names=["prediction"], opset_version=17, dynamo=False)
        convert(folder / "unet.onnx", "bm1684x", precision, folder / "unet.bmodel", toolchain=Toolchain.install())
        (folder / "unet.onnx").unlink()
    return make


PRECISIONS = [
    Variant("BM1684X F32", "shapes-bm1684x-f32", "shapes-bm1684x-f32"),
    Variant("BM1684X F16", "shapes-bm1684x-f16", "shapes-bm1684x-f16", _half),
    Variant("BM1684X BF16", "shapes-bm1684x-bf16", "shapes-bm1684x-bf16"),
    Variant("BM1684 F32", "shapes-bm1684-f32", "shapes-bm1684-f32"),
]
# Only the U-Net differs from the reference, so that the timestep alone is seen.
TIMESTEPS = [Variant(f"{title} timestep, {precision}", folder.format(precision.lower()), ONNX, make)
             for precision in ("F32", "F16", "BF16")
             for title, folder, make in (("float", "float-timestep-{}", _float_timestep(precision)),
                                         ("integer", "shapes-bm1684x-{}", _half if precision == "F16" else None))]


# Runs ----------------------------------------------------------------------------------------------------------------


def workflow(name: str, steps: int, loaders: dict[str, dict], model: list, clip: list, vae: list) -> dict:
    """API format: the shipped text-to-image workflow with these loaders, recorded as `name`."""
    def node(kind: str, **inputs) -> dict:
        return {"class_type": kind, "inputs": inputs}
    return {
        **loaders,
        "record": node("SophgoRecord", name=name, limit_mb=64, model=model, clip=clip, vae=vae),
        "prompt": node("SophgoTextEncode", clip=["record", 2], prompt=PROMPT, negative_prompt=""),
        "empty": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "sample": node("KSampler", model=["record", 1], positive=["prompt", 0], negative=["prompt", 1],
                       latent_image=["empty", 0], seed=1, steps=steps, cfg=3.0, sampler_name="euler", scheduler="simple",
                       denoise=1.0),
        "decode": node("VAEDecode", samples=["sample", 0], vae=["record", 3]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix=name)}


def reference(steps: int) -> dict:
    loaders = {"load": {"class_type": "SophgoLoadReference", "inputs": {"ckpt_name": "shapes.safetensors"}}}
    return workflow("reference", steps, loaders, ["load", 0], ["load", 1], ["load", 2])


def compiled(name: str, variant: Variant, steps: int) -> dict:
    def loader(kind: str, **inputs) -> dict:
        return {"class_type": kind, "inputs": {**inputs, "device": "auto"}}
    loaders = {"unet": loader("SophgoLoadUNet", unet_name=variant.unet),
               "clip": loader("SophgoLoadCLIP", clip_name=variant.others, long_prompts="truncate"),
               "vae": loader("SophgoLoadVAE", decoder_name=variant.others, encoder_name="same", latent_scale="outside")}
    return workflow(name, steps, loaders, ["unet", 0], ["clip", 0], ["vae", 0])


def record(name: str, prompt: dict, work: Path) -> Recording:
    """Run a workflow in a ComfyUI of its own; its recording, which is kept in `work`."""
    kept = work / f"{name}.npz"
    if not kept.exists():
        say(f"{name}: running")
        with tempfile.TemporaryDirectory() as base:
            if (work / "models").exists():
                shutil.copytree(work / "models", Path(base) / "models" / "sophgo")
            with Server(Path(base)) as server:
                server.run(prompt, seconds=3600)
            shutil.copy(Path(base) / "output" / "recordings" / f"{name}.npz", kept.with_suffix(".part"))
        kept.with_suffix(".part").rename(kept)
    return Recording.open(kept)


def measure(variant: Variant, work: Path, steps: int) -> list[dict]:
    """Rows as engines.alignment.report.as_json has them, forced and free, and a last one with the PSNR."""
    name = variant.title.replace(" ", "-").replace(",", "").lower()
    kept = work / f"{name}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    folder = SHIPPED / variant.unet
    if variant.make is not None:
        folder = work / "models" / variant.unet
        if not folder.exists():
            say(f"{variant.title}: compiling")
            part = work / "making" / variant.unet
            shutil.rmtree(part, ignore_errors=True)
            variant.make(part)
            folder.parent.mkdir(parents=True, exist_ok=True)
            part.rename(folder)
    whole = record("reference", reference(steps), work)
    say(f"{variant.title}: teacher-forced")
    try:
        networks, names = networks_of(folder, find_devices(None, PACK), "auto", False)
        forced = align(whole, networks, names=names, causes=NO_CAUSES)
    finally:
        Worker.close_all()
    free = align(whole, candidate=record(name, compiled(name, variant, steps), work), causes=NO_CAUSES)
    rows = [*report.as_json(forced)["rows"], *report.as_json(free)["rows"], {"mode": "picture", "psnr": free.psnr}]
    kept.write_text(json.dumps(rows, indent=1) + "\n")
    return rows


# How a small error grows ---------------------------------------------------------------------------------------------


def growth(steps: int) -> dict[str, list[tuple[float, float]]]:
    """Kind of error -> (step, relative error of the latent after it), for errors of SMALL_ERROR a step.

    By Euler steps in numpy, the ONNX files as networks: the error is then known exactly.
    """
    from demo import nets, score
    networks = score.onnx_networks()
    tokenizer = nets.tokenizer(_tokenizer())
    contexts = np.concatenate([networks.text(score.ids_of(tokenizer, text)) for text in ("", PROMPT)]).astype(np.float32)
    rng = np.random.default_rng(5)
    fixed = rng.normal(size=(2, 4, 8, 8))

    def noise(prediction: np.ndarray, pattern: np.ndarray) -> np.ndarray:
        return prediction + SMALL_ERROR * np.sqrt(np.mean(prediction ** 2)) * pattern / np.sqrt(np.mean(pattern ** 2))
    kinds = {"another one each step": lambda prediction: noise(prediction, rng.normal(size=prediction.shape)),
             "the same each step": lambda prediction: noise(prediction, fixed),
             "too large by 0.3 %": lambda prediction: prediction * (1 + SMALL_ERROR)}
    exact = list(_trajectory(networks.unet, contexts, steps, lambda prediction: prediction))
    found = {}
    for kind, disturb in kinds.items():
        found[kind] = [(step, float(np.linalg.norm(x - wanted) / np.linalg.norm(wanted))) for step, (x, wanted) in enumerate(
            zip(_trajectory(networks.unet, contexts, steps, disturb), exact), 1)]
    return found


def _trajectory(unet, contexts: np.ndarray, steps: int, disturb: Callable[[np.ndarray], np.ndarray], cfg: float = 3.0
                ) -> Iterator[np.ndarray]:
    """The latent after each Euler step, in units of the noise-free latent."""
    from demo import score
    levels, times = score.sigmas(), [999 - int(i * 1000 / steps) for i in range(steps)]
    schedule = [*levels[times], 0.0]
    x = np.random.default_rng(1).standard_normal((1, 4, 8, 8)) * math.sqrt(1 + schedule[0] ** 2)
    for time, now, following in zip(times, schedule, schedule[1:]):
        latent = np.repeat(x / math.sqrt(1 + now ** 2), 2, 0).astype(np.float32)
        without, along = disturb(unet(latent, np.full(2, time, np.int64), contexts).astype(np.float64))
        x = x + (without + cfg * (along - without)) * (following - now)
        yield x


def _tokenizer() -> Path:
    from tools.install import comfyui
    return comfyui() / "comfy" / "sd1_tokenizer"


# Tables and plots ----------------------------------------------------------------------------------------------------


def series(rows: list[dict], mode: str, measure: str, stage: str = "unet", array: str = "prediction") -> list[tuple]:
    """(call, value) of what as_json wrote."""
    found = [(row["call"] + 1, row[measure]) for row in rows
             if (row["mode"], row.get("stage"), row.get("array")) == (mode, stage, array) and row[measure] is not None]
    return [(call, 1 - value if measure == "cosine" else value) for call, value in found]


def table(results: dict[str, list[dict]]) -> Iterator[str]:
    yield "| files | stage | mode | L1 | relative | cosine |"
    yield "|---|---|---|---|---|---|"
    for title, rows in results.items():
        for mode in ("teacher-forced", "free-running"):
            kinds = dict.fromkeys((row["stage"], row["array"]) for row in rows if row["mode"] == mode)
            for stage, array in kinds:
                some = [row for row in rows if (row["mode"], row.get("stage"), row.get("array")) == (mode, stage, array)]
                good = [row for row in some if row["cosine"] is not None]
                if not good:
                    yield f"| {title} | {stage} {array} | {mode} | not finite | | |"
                    continue
                mean = {key: sum(row[key] for row in good) / len(good) for key in ("l1", "relative", "cosine")}
                last = f" (last {good[-1]['relative']:.2%})" if len(good) > 2 else ""
                yield (f"| {title} | {stage} {array} | {mode} | {mean['l1']:.2e} | {mean['relative']:.3%}{last} | "
                       f"{mean['cosine']:.7f} |")
        yield f"| {title} | picture | | PSNR {rows[-1]['psnr']:.1f} dB | | |"


def plots(precisions: dict[str, list[dict]], timesteps: dict[str, list[dict]], grown: dict, images: Path) -> None:
    images.mkdir(parents=True, exist_ok=True)

    def lines(results: dict[str, list[dict]], mode: str, measure: str, pairs: bool = False) -> list[Line]:
        looks = [((number + 1) % 2, number // 2) if pairs else (0, number) for number in range(len(results))]
        return [Line(title, series(rows, mode, measure), *look) for (title, rows), look in zip(results.items(), looks)]
    draw([Panel("L1 a step, teacher-forced", lines(precisions, "teacher-forced", "l1")),
          Panel("L1 a step, free-running", lines(precisions, "free-running", "l1")),
          Panel("1 - cosine a step, teacher-forced", lines(precisions, "teacher-forced", "cosine")),
          Panel("1 - cosine a step, free-running", lines(precisions, "free-running", "cosine"))],
         ).save(images / "alignment-precisions.png")
    draw([Panel("relative error a step, teacher-forced", lines(timesteps, "teacher-forced", "relative", True)),
          Panel("relative error a step, free-running", lines(timesteps, "free-running", "relative", True))],
         ).save(images / "alignment-timestep.png")
    draw([Panel("relative error of the latent, from 0.3 % a step", [Line(*item) for item in grown.items()],
                logarithmic=False)]).save(images / "alignment-growth.png")


def say(text: str) -> None:
    print(f"[alignment] {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=WORK, help="where results are kept")
    parser.add_argument("--images", type=Path, default=IMAGES)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    grown = growth(args.steps)
    precisions = {variant.title: measure(variant, args.work, args.steps) for variant in PRECISIONS}
    timesteps = {variant.title: measure(variant, args.work, args.steps) for variant in TIMESTEPS}
    plots(precisions, timesteps, grown, args.images)
    print("\n".join(table({**precisions, **timesteps})))
    for kind, points in grown.items():
        print(f"0.3 % a step, {kind}: {points[0][1]:.2%} after the first step, {points[-1][1]:.2%} after the last")


if __name__ == "__main__":
    main()
