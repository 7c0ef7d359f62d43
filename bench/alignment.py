"""The numbers and plots of docs/precision-alignment.md, on the demo's model in Sophgo's simulator.

    python -m bench.alignment [--work FOLDER] [--images FOLDER]

A run of the checkpoint in torch, float32, is the reference. Then each variant: its networks over the reference's inputs
(teacher-forced), and a run of its own (free-running). It took 80 minutes on two busy cores; what is there from an
earlier call is not made again, so that it can be stopped at any time. Needs what `make demo` installs, and
Python 3.10 for the compiler (`python -m compiler`).
"""
from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from bench import growth
from demo.record import node, record, workflow
from engines.alignment import report
from engines.alignment.__main__ import networks_of
from engines.alignment.align import align
from engines.alignment.plot import Line, Panel, draw
from engines.alignment.recording import Recording
from engines.devices import find_devices
from engines.workers import Worker
from tools.install import LOCAL, PACK

WORK = LOCAL / "alignment"
IMAGES = PACK / "docs" / "images"
SHIPPED = PACK / "demo" / "models"
STEPS = growth.STEPS
SHOWN = (1, 5, 10, 15, 20)       # steps in the table of how errors grow


@dataclass(frozen=True)
class Variant:
    """Files to compare: folders of the U-Net and of the other networks, among SHIPPED or made here."""

    title: str
    unet: str
    others: str
    make: Callable[[Path], None] | None = None     # fills the U-Net's folder, if it is not shipped


def _half(folder: Path) -> None:
    """The demo's four networks for the BM1684X in F16, which is not shipped."""
    from compiler.convert import convert
    from compiler.toolchain import Toolchain
    from demo import export
    toolchain = Toolchain.install()
    for onnx in export.export(folder.parent / "onnx"):
        convert(onnx, "bm1684x", "F16", folder / f"{onnx.stem}.bmodel", toolchain=toolchain)


def _float_timestep(precision: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        """A U-Net as a plain export gives it: a float timestep whose sines are computed inside."""
        import torch

        from compiler.convert import convert
        from compiler.toolchain import Toolchain
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
    """Rows as engines.alignment.report.as_json has them, forced and free; then the causes found and the PSNR."""
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
        forced = report.as_json(align(reference, networks, names=names))
    finally:
        Worker.close_all()
    free = report.as_json(align(reference, candidate=recorded(name, compiled(name, variant), work)))
    rows = [*forced["rows"], *free["rows"], {"mode": "causes", "found": forced["findings"] + free["findings"]},
            {"mode": "picture", "psnr": free["psnr"]}]
    kept.write_text(json.dumps(rows, indent=1) + "\n")
    return rows


def grow(work: Path) -> tuple[dict[tuple[str, str], growth.Grown], growth.Grown, float]:
    """growth.small_errors and growth.fractions, and the share of pictures that obey without any error."""
    kept = work / "growth.json"
    if not kept.exists():
        say("how errors grow, in torch")
        demo = growth.Demo()
        errors = [[*kind, asdict(found)] for kind, found in growth.small_errors(demo).items()]
        kept.write_text(json.dumps([errors, asdict(growth.fractions(demo)), demo.unharmed], indent=1) + "\n")
    errors, fractions, unharmed = json.loads(kept.read_text())
    return {(size, kind): growth.Grown(**found) for size, kind, found in errors}, growth.Grown(**fractions), unharmed


# Tables and plots ----------------------------------------------------------------------------------------------------


def series(rows: list[dict], mode: str, measure: str, stage: str = "unet", array: str = "prediction") -> list[tuple]:
    """(call, value) of what as_json wrote."""
    found = [(row["call"] + 1, row[measure]) for row in rows
             if (row["mode"], row.get("stage"), row.get("array")) == (mode, stage, array) and row[measure] is not None]
    return [(call, 1 - value if measure == "cosine" else value) for call, value in found]


def table(results: dict[str, list[dict]]) -> Iterator[str]:
    """Of a stage's calls the mean, and of the U-Net's also the last one's relative error, in Markdown."""
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
                relative = report.percent(mean["relative"])
                relative += f", last {report.percent(good[-1]['relative'])}" if len(good) > 2 else ""
                yield f"| {title} | {stage} {array} | {mode} | {mean['l1']:.1e} | {relative} | {mean['cosine']:.7f} |"
        found = [finding["sentence"] for row in rows if row["mode"] == "causes" for finding in row["found"]]
        yield f"| {title} | causes | | {' '.join(found) or 'none'} | | |"
        yield f"| {title} | picture | | PSNR {rows[-1]['psnr']:.1f} dB | | |"


def plots(precisions: dict[str, list[dict]], timesteps: dict[str, list[dict]], images: Path) -> None:
    def lines(results: dict[str, list[dict]], mode: str, measure: str) -> list[Line]:
        return [Line(title, series(rows, mode, measure)) for title, rows in results.items()]
    save(images / "alignment-precisions.png", [
        Panel("relative error of a prediction, teacher-forced", lines(precisions, "teacher-forced", "relative")),
        Panel("relative error of a prediction, free-running", lines(precisions, "free-running", "relative")),
        Panel("1 - cosine of a prediction, teacher-forced", lines(precisions, "teacher-forced", "cosine")),
        Panel("1 - cosine of a prediction, free-running", lines(precisions, "free-running", "cosine"))])
    pairs = []
    for mode in ("teacher-forced", "free-running"):
        pairs.append([])
        for colour, (title, rows) in enumerate(timesteps.items()):
            twin = title.partition(",")[0]
            for told, some, dash in (("float", rows, 1), ("integer", precisions[twin], 0)):
                pairs[-1].append(Line(f"{twin.split()[1]}, {told}", series(some, mode, "relative"), dash, colour))
    save(images / "alignment-timestep.png", [
        Panel("float and integer timestep, teacher-forced", pairs[0]),
        Panel("float and integer timestep, free-running", pairs[1])])


def plot_growth(grown: dict[tuple[str, str], growth.Grown], images: Path) -> None:
    save(images / "alignment-growth.png", [
        Panel(f"relative error of the latent, from {size} a step",
              [Line(kind, list(enumerate(found.latents, 1))) for (said, kind), found in grown.items() if said == size])
        for size in growth.ERRORS])


def save(file: Path, panels: list[Panel]) -> None:
    """With few colours: a line needs no more, and the file is a third."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draw(panels).quantize(64).save(file, optimize=True)
    say(f"{file.name}: {file.stat().st_size / 1e3:.0f} KB")


def growth_table(grown: dict[tuple[str, str], growth.Grown], fractions: growth.Grown, unharmed: float) -> Iterator[str]:
    yield f"| error of each prediction | {' | '.join(f'after step {step}' for step in SHOWN)} | pictures | obey |"
    yield "|---|" + "---|" * (len(SHOWN) + 2)
    for (size, kind), found in grown.items():
        cells = " | ".join(f"{found.latents[step - 1]:.2%}".replace("%", " %") for step in SHOWN)
        yield f"| {size}, {kind} | {cells} | {found.psnr:.1f} dB | {found.obey:.1%} |"
    yield f"| none | | | | | | {unharmed:.1%} |"
    yield (f"Fractions of timesteps against whole ones, {growth.ARTICLE_STEPS} steps: a call's relative error "
           f"{max(fractions.calls):.2%} at most, its cosine {min(fractions.cosines):.7f} at least; the last latent's "
           f"{fractions.latents[-1]:.2%}, pictures {fractions.psnr:.1f} dB.")


def say(text: str) -> None:
    print(f"[alignment] {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=WORK, help="where results are kept")
    parser.add_argument("--images", type=Path, default=IMAGES)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    grown, fractions, unharmed = grow(args.work)
    plot_growth(grown, args.images)
    print("\n".join(growth_table(grown, fractions, unharmed)), flush=True)
    precisions = {variant.title: measure(variant, args.work) for variant in PRECISIONS}
    timesteps = {variant.title: measure(variant, args.work) for variant in FLOAT_TIMESTEPS}
    plots(precisions, timesteps, args.images)
    print("\n".join(table({**precisions, **timesteps})))


if __name__ == "__main__":
    main()
