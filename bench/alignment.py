"""The numbers and plots of docs/precision-alignment.md, on the demo's model in Sophgo's simulator.

    python -m bench.alignment [--work FOLDER] [--images FOLDER]

A run of the checkpoint in torch, float32, is the reference. Then each variant: its networks over the reference's inputs
(teacher-forced), and a run of its own (free-running). It takes about half an hour on two quiet cores; what is there
from an earlier call is not made again, so that it can be stopped at any time. Needs what `make demo` installs, and
Python 3.10 for the compiler (`python -m compiler`).
"""
from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from demo.record import node, record, workflow
from engines.alignment import report
from engines.alignment.__main__ import networks_of
from engines.alignment.align import NO_CAUSES, align
from engines.alignment.plot import Line, Panel, draw
from engines.alignment.recording import Recording
from engines.devices import find_devices
from engines.workers import Worker
from tools.install import LOCAL, PACK

WORK = LOCAL / "alignment"
IMAGES = PACK / "docs" / "images"
SHIPPED = PACK / "demo" / "models"
STEPS = 20


@dataclass(frozen=True)
class Variant:
    """Files to compare: folders of the U-Net and of the other networks, among SHIPPED or made here."""

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
# Their counterparts with an integer timestep are those above: nothing else differs.
FLOAT_TIMESTEPS = [Variant(f"BM1684X {precision}, float timestep", f"float-timestep-{precision.lower()}",
                           f"shapes-bm1684x-{precision.lower()}", _float_timestep(precision))
                   for precision in ("F32", "F16", "BF16")]


# Runs ----------------------------------------------------------------------------------------------------------------


def compiled(name: str, variant: Variant) -> dict:
    """The reference's workflow with compiled networks, in the API format."""
    loaders = {"unet": node("SophgoLoadUNet", unet_name=variant.unet, device="auto"),
               "clip": node("SophgoLoadCLIP", clip_name=variant.others, device="auto", long_prompts="truncate"),
               "vae": node("SophgoLoadVAE", decoder_name=variant.others, encoder_name="same", device="auto",
                           latent_scale="outside")}
    return workflow(name, STEPS, loaders, [["unet", 0], ["clip", 0], ["vae", 0]])


def recorded(name: str, prompt: dict, work: Path) -> Recording:
    """A workflow's recording, of an earlier call or made now."""
    kept = work / f"{name}.npz"
    if not kept.exists():
        say(f"{name}: running")
        record(prompt, name, kept, work / "models")
    return Recording.open(kept)


def measure(variant: Variant, work: Path) -> list[dict]:
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
    reference = recorded("reference", workflow("reference", STEPS), work)
    say(f"{variant.title}: teacher-forced")
    try:
        networks, names = networks_of(folder, find_devices(None, PACK), "auto", False)
        forced = align(reference, networks, names=names, causes=NO_CAUSES)
    finally:
        Worker.close_all()
    free = align(reference, candidate=recorded(name, compiled(name, variant), work), causes=NO_CAUSES)
    rows = [*report.as_json(forced)["rows"], *report.as_json(free)["rows"], {"mode": "picture", "psnr": free.psnr}]
    kept.write_text(json.dumps(rows, indent=1) + "\n")
    return rows


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
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    precisions = {variant.title: measure(variant, args.work) for variant in PRECISIONS}
    timesteps = {variant.title: measure(variant, args.work) for variant in FLOAT_TIMESTEPS}
    print("\n".join(table({**precisions, **timesteps})))


if __name__ == "__main__":
    main()
