"""Compile: from stock torch models to a folder of bmodels that were compared with their reference."""
from __future__ import annotations

from pathlib import Path

import comfy.model_management
import comfy.utils
from comfy_api.latest import io

from ..compiler.request import AUTO, CHIPS, MAX_BATCH, MAX_TOKENS, MINUTE, MODEL_JSON, TOKENS, Request, parse_sizes
from ..engines.errors import EngineError
from . import library
from .adapters.host import poll, tell
from .base import CATEGORY, PackNode

PRECISIONS = [AUTO, *CHIPS["bm1684x"]]
PROGRESS = 1000        # parts of the progress bar


class SophgoCompile(PackNode):
    ALIASES = ("compile", "bmodel", "convert", "export", "quantize", "tpu-mlir", "onnx", "BM1684", "BM1684X", "编译", "转换")

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SophgoCompile", display_name="Compile (Sophgo)", category=f"{CATEGORY}/compile",
            description="Compiles stock SD 1.x models, LoRAs included, for a Sophgo TPU, and compares each result with its "
                        "reference in the simulator. The new folder under models/sophgo is in the loaders at once.",
            inputs=[
                io.String.Input("name", default="my-model", tooltip="The new folder's name; it must not exist yet."),
                io.Combo.Input("chip", options=[chip.upper() for chip in CHIPS], default="BM1684X",
                               tooltip="The chip to compile for."),
                _precision("model_precision", "What the U-Net computes in. auto: BF16 on BM1684X, F32 on BM1684, which has "
                                              "nothing else."),
                _precision("clip_precision", "What the text encoder computes in. auto: F16 on BM1684X, F32 on BM1684."),
                _precision("vae_precision", "What the VAE computes in. auto: BF16 on BM1684X, as F16 overflows in some, F32 "
                                            "on BM1684."),
                io.String.Input("sizes", default="512x512",
                                tooltip="Picture sizes to compile, width first, such as 512x512, 768x512. One file each; "
                                        "multiples of 64."),
                io.Int.Input("batch_size", default=2, min=1, max=MAX_BATCH,
                             tooltip="Rows the U-Net takes in a call. 2: condition and uncondition of one picture."),
                io.Boolean.Input("controlnet", default=False,
                                 tooltip="A U-Net with inputs for a ControlNet's residuals: a little slower, also without "
                                         "one."),
                io.Int.Input("context_length", default=TOKENS, min=TOKENS, max=MAX_TOKENS, step=TOKENS,
                             tooltip="Tokens the U-Net takes: 77 for each section of a prompt."),
                io.Float.Input("verify_minutes", default=10.0, min=0.0, max=10000.0, step=1.0,
                               tooltip="Time for comparing in the simulator, in all. What would take longer is compiled "
                                       "and not verified."),
                io.Boolean.Input("dry_run", default=False,
                                 tooltip="Only say what time, memory and disk it would take."),
                io.Model.Input("model", optional=True, tooltip="A stock SD 1.x MODEL, with any LoRAs."),
                io.Clip.Input("clip", optional=True, tooltip="A stock SD 1.x CLIP; CLIP skip is compiled in."),
                io.Vae.Input("vae", optional=True, tooltip="A stock SD 1.x VAE: encoder and decoder are compiled."),
            ],
            outputs=[io.String.Output("text", tooltip="What was compiled, and how it compares with the reference.")],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, name, **_):
        """Changes when the folder comes or goes: what was compiled and then removed is compiled again."""
        try:
            return Path(library.roots()[0], name, MODEL_JSON).stat().st_mtime_ns
        except (OSError, ValueError):
            return 0

    @classmethod
    def execute(cls, name, chip, model_precision, clip_precision, vae_precision, sizes, batch_size, controlnet,
                context_length, verify_minutes, dry_run, model=None, clip=None, vae=None) -> io.NodeOutput:
        from ..compiler.errors import CompilerError
        from ..compiler.summary import estimate_brief, estimate_text, report_brief, report_text
        from .adapters.export import parts_of
        try:
            parts, folder = parts_of(model, clip, vae), library.roots()[0]
            request = Request(
                checkpoint="", name=name, folder=str(folder), kinds=tuple(part.kind for part in parts), chip=chip.lower(),
                precisions={"unet": model_precision, "text_encoder": clip_precision, "vae": vae_precision},
                sizes=parse_sizes(sizes), batch=batch_size, control=controlnet, tokens=context_length,
                skip=sum(part.skip for part in parts), budget=verify_minutes * MINUTE, dry=dry_run)
            found = _same(request, parts)
            if found is None:
                found = cls._compile(request, parts, model)
        except CompilerError as error:
            raise EngineError(str(error)) from error
        except comfy.model_management.InterruptProcessingException:
            tell("Cancelled; nothing is left of it.", cls.hidden.unique_id)
            raise
        whole, brief = (estimate_text, estimate_brief) if dry_run else (report_text, report_brief)
        tell(brief(found), cls.hidden.unique_id)
        return io.NodeOutput(whole(found), ui={"text": (whole(found),)})

    @classmethod
    def _compile(cls, request: Request, parts: list, model) -> dict:
        from ..compiler.client import compile_checkpoint
        from ..compiler.toolchain import FOLDER, Toolchain
        from .adapters.export import outside, saved, size_multiple
        from .adapters.provenance import provenance
        toolchain = Toolchain(FOLDER)
        request.check(size_multiple(model) if model is not None else None)
        if any((root / request.name).exists() for root in library.roots()):
            raise request.taken()        # it would hide that one, of the pack's own models for example
        toolchain.check()
        source = provenance(cls.hidden.prompt, cls.hidden.unique_id, ("model", "clip", "vae"), library.checkpoints())
        source["patches"] = {part.kind: part.patches for part in parts if part.patches}
        source["notes"] = outside(model) if model is not None else []
        bar = comfy.utils.ProgressBar(PROGRESS, node_id=cls.hidden.unique_id)
        said = []

        def progress(share: float, step: str) -> None:
            bar.update_absolute(round(share * PROGRESS))
            if said[-1:] != [step]:
                said.append(step)
                tell(step, cls.hidden.unique_id)

        progress(0.0, "Saving the weights, with all patches")
        with saved(parts, Path(request.folder), poll, empty=request.dry) as path:
            found = compile_checkpoint(request.of(path, source), toolchain=toolchain, progress=progress, poll=poll)
        return {**found, "notes": source["notes"]} if request.dry else found


def _same(request: Request, parts: list) -> dict | None:
    """What model.json says, if this very compile was done before: then running a workflow again does no harm."""
    from ..compiler.summary import made
    from .adapters.export import digest
    report = None if request.dry else made(request)
    return report if report and digest(parts, poll) == report["weights_sha256"] else None


def _precision(id: str, tooltip: str) -> io.Combo.Input:
    return io.Combo.Input(id, options=PRECISIONS, default=AUTO, tooltip=tooltip)
