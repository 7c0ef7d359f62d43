"""Look into a model file: no device and no vendor library needed."""
from __future__ import annotations

from comfy_api.latest import io

from ..engines.files import read_model
from . import library
from .adapters.host import tell
from .base import CATEGORY, PackNode


class SophgoInspect(PackNode):
    ALIASES = ("bmodel info", "model info", "model_tool", "sophgo", "networks", "shapes", "查看模型")

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SophgoInspect", display_name="Inspect Model File (Sophgo)", category=f"{CATEGORY}/info",
            description="Tells what a bmodel or ONNX file holds: chip, networks, roles, inputs, outputs, sizes, memory.",
            inputs=[io.Combo.Input("file_name", options=library.models(),
                                   tooltip="A file, or a folder of files, under models/sophgo.")],
            outputs=[io.String.Output("text", tooltip="The report, for Preview as Text or to save.")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, file_name):
        return library.fingerprint(file_name)

    @classmethod
    def execute(cls, file_name) -> io.NodeOutput:
        from ..compiler.summary import folder_text
        from ..engines.report import brief, describe
        files = library.files(file_name)
        summaries = filter(None, map(folder_text, dict.fromkeys(file.parent for file in files)))
        models = list(map(read_model, files))
        text = "\n\n".join([*summaries, *map(describe, models)])
        tell("\n".join(map(brief, models)), cls.hidden.unique_id)
        return io.NodeOutput(text, ui={"text": (text,)})
