"""Precision alignment in the graph: record a run, compare it, fail where it differs too much."""
from __future__ import annotations

import comfy.utils
from comfy_api.latest import io

from ..engines.alignment import LIMIT_BYTES, LOOK_FOR_CAUSES
from ..engines.errors import EngineError
from . import library
from .adapters.host import feeds, one_of, poll, tell
from .base import CATEGORY, PackNode

RECORDING, PARITY = io.Custom("SOPHGO_RECORDING"), io.Custom("SOPHGO_PARITY")


class SophgoRecord(PackNode):
    ALIASES = ("record", "dump tensors", "capture", "trace", "parity", "precision alignment", "npz", "录制", "精度对齐")

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SophgoRecord", display_name="Record Run (Sophgo)", category=f"{CATEGORY}/alignment",
            description="Gives back the MODEL, CLIP and VAE it gets, and keeps what their networks are given and what they "
                        "answer, call by call, in output/recordings. Stock and compiled ones alike.",
            inputs=[
                io.String.Input("name", default="reference", tooltip="The recording's name; a run replaces the last one of "
                                                                     "that name."),
                io.Int.Input("limit_mb", default=LIMIT_BYTES >> 20, min=1, max=1 << 20,
                             tooltip="Largest size of the file in MB; calls after it is full are left out."),
                io.Model.Input("model", optional=True, tooltip="Any MODEL: each call of its diffusion model is kept."),
                io.Clip.Input("clip", optional=True, tooltip="Any CLIP: token ids and hidden states are kept."),
                io.Vae.Input("vae", optional=True, tooltip="Any VAE: latents and pictures are kept."),
            ],
            outputs=[RECORDING.Output("recording", display_name="recording", tooltip="The recording, for Compare Runs."),
                     io.Model.Output("MODEL", tooltip="The MODEL, recorded: for the sampler."),
                     io.Clip.Output("CLIP", tooltip="The CLIP, recorded: for the prompts."),
                     io.Vae.Output("VAE", tooltip="The VAE, recorded: to decode or encode.")],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
        )

    @classmethod
    def fingerprint_inputs(cls, **_):
        return float("NaN")      # never cached: a recording is of one whole run

    @classmethod
    def execute(cls, name, limit_mb, model=None, clip=None, vae=None) -> io.NodeOutput:
        from ..engines.alignment.recording import Recorder, recording_path
        from .adapters.recording import record_clip, record_model, record_vae, said_of
        given = {"MODEL": model, "CLIP": clip, "VAE": vae}
        if all(part is None for part in given.values()):
            raise EngineError("There is nothing to record: connect a MODEL, CLIP or VAE.")
        for slot, (kind, part) in enumerate(given.items(), 1):
            if part is None and feeds(cls.hidden.prompt, cls.hidden.unique_id, slot):
                raise EngineError(f"The recorded {kind} is used, but no {kind} is connected to be recorded: connect one.")
        others = [id for id, node in (cls.hidden.prompt or {}).items()
                  if node["class_type"] == "SophgoRecord" and node["inputs"].get("name") == name]
        if len(others) > 1:
            raise EngineError(f"{len(others)} nodes of this workflow record as '{name}': give each a name of its own.")
        if any(node["class_type"] == "SophgoLoadRecording" and node["inputs"].get("recording_name") == name
               for node in (cls.hidden.prompt or {}).values()):
            raise EngineError(f"This workflow loads the recording '{name}' and would replace it: give the new one another "
                              "name.")
        recorder = Recorder(recording_path(name, library.recordings_folder()), name, limit_mb << 20)
        recorder.networks = said_of(model, clip, vae)
        recorded = [record(part, recorder) if part is not None else None
                    for record, part in zip((record_model, record_clip, record_vae), given.values())]
        return io.NodeOutput(recorder, *recorded)


class SophgoLoadRecording(PackNode):
    ALIASES = ("load recording", "npz", "parity", "precision alignment", "reference", "载入录制", "精度对齐")

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SophgoLoadRecording", display_name="Load Recording (Sophgo)", category=f"{CATEGORY}/alignment",
            description="Loads a recording that an earlier run, or another machine, has left in output/recordings.",
            inputs=[io.Combo.Input("recording_name", options=list(library.recordings()),
                                   tooltip="A recording under output/recordings.")],
            outputs=[RECORDING.Output("recording", display_name="recording", tooltip="The recording, for Compare Runs."),
                     io.String.Output("text", display_name="text", tooltip="What it holds.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, recording_name):
        return library.file_fingerprint(recording_name, library.recording)

    @classmethod
    def execute(cls, recording_name) -> io.NodeOutput:
        from ..engines.alignment.recording import Recording
        from ..engines.alignment.report import describe
        recording = Recording.open(library.recording(recording_name))
        text = describe(recording)
        tell(text, cls.hidden.unique_id)
        return io.NodeOutput(recording, text)


class SophgoParity(PackNode):
    ALIASES = ("compare", "parity", "precision alignment", "cosine", "L1", "PSNR", "diagnose", "精度对齐", "对比")

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SophgoParity", display_name="Compare Runs (Sophgo)", category=f"{CATEGORY}/alignment",
            description="Compares a recorded run with networks given the same inputs (teacher-forced), with another "
                        "recorded run (free-running), or both, stage by stage and step by step, and says why they differ.",
            inputs=[
                RECORDING.Input("reference", tooltip="The recording to compare with."),
                io.Combo.Input("causes", options=list(LOOK_FOR_CAUSES), default=LOOK_FOR_CAUSES[0],
                               tooltip="Look for the classic causes of a difference. It takes some ten more calls of a "
                                       "network that differs."),
                io.Image.Input("reference_images", optional=True,
                               tooltip="The pictures of the reference's run, so that it comes first; also for the PSNR."),
                io.Model.Input("model", optional=True, tooltip="A MODEL to give the recorded inputs to."),
                io.Clip.Input("clip", optional=True, tooltip="A CLIP to give the recorded token ids to."),
                io.Vae.Input("vae", optional=True, tooltip="A VAE to give the recorded latents and pictures to."),
                RECORDING.Input("candidate", optional=True, tooltip="The recording of another run of the same workflow."),
                io.Image.Input("candidate_images", optional=True,
                               tooltip="The pictures of the other run, so that it comes first; also for the PSNR."),
            ],
            outputs=[io.String.Output("text", display_name="text", tooltip="Tables and findings."),
                     io.Image.Output("plot", display_name="plot", tooltip="L1 and cosine of the U-Net, step by step."),
                     PARITY.Output("parity", display_name="parity", tooltip="The comparison, for Parity Gate.")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, reference, causes, reference_images=None, model=None, clip=None, vae=None, candidate=None,
                candidate_images=None) -> io.NodeOutput:
        from ..engines.alignment import report
        from ..engines.alignment.align import align
        from .adapters.pictures import arrays_of, plot_of
        from .adapters.recording import said_of, whole_run
        from .adapters.replay import networks_of
        one_of("causes", causes, LOOK_FOR_CAUSES)
        pictures = None
        if reference_images is not None and candidate_images is not None:
            pictures = arrays_of(candidate_images, reference_images)
        networks = networks_of(model, clip, vae)
        bar = comfy.utils.ProgressBar(1, node_id=cls.hidden.unique_id)

        def progress(done: int, total: int) -> None:
            poll()
            bar.update_absolute(done, total)
        parity = align(whole_run(reference, reference_images), networks, whole_run(candidate, candidate_images),
                       names=said_of(model, clip, vae), pictures=pictures, causes=causes, progress=progress)
        text = report.text(parity)
        tell("\n".join(report.summary(parity)), cls.hidden.unique_id)      # a node's own text has no columns for tables
        return io.NodeOutput(text, plot_of(parity), parity, ui={"text": (text,)})


class SophgoParityGate(PackNode):
    ALIASES = ("assert", "threshold", "fail", "test", "parity", "precision alignment", "CI", "精度对齐", "阈值")

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SophgoParityGate", display_name="Parity Gate (Sophgo)", category=f"{CATEGORY}/alignment",
            description="Lets a picture or latent pass if a comparison is good enough, and otherwise fails the run, naming "
                        "the first stage and step that are not. 0 switches a threshold off; NaN never passes.",
            inputs=[
                PARITY.Input("parity", tooltip="The comparison to judge."),
                io.Float.Input("min_cosine", default=0.999, min=0.0, max=1.0, step=0.0001, round=0.0000001,
                               tooltip="Least cosine of each answer, teacher-forced."),
                io.Float.Input("min_cosine_free", default=0.0, min=0.0, max=1.0, step=0.0001, round=0.0000001,
                               tooltip="Least cosine of each answer, free-running."),
                io.Float.Input("min_psnr", default=0.0, min=0.0, max=200.0, step=0.5, round=0.01,
                               tooltip="Least PSNR of the final picture, in dB."),
                io.Image.Input("image", optional=True, tooltip="A picture to let pass."),
                io.Latent.Input("latent", optional=True, tooltip="A latent to let pass."),
            ],
            outputs=[io.Image.Output("IMAGE", tooltip="The picture, if the gate is open."),
                     io.Latent.Output("LATENT", tooltip="The latent, if the gate is open.")],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, parity, min_cosine, min_cosine_free, min_psnr, image=None, latent=None) -> io.NodeOutput:
        from ..engines.alignment.compare import judge
        judge(parity, min_cosine, min_cosine_free, min_psnr)
        for slot, (kind, part) in enumerate((("image", image), ("latent", latent))):
            if part is None and feeds(cls.hidden.prompt, cls.hidden.unique_id, slot):
                raise EngineError(f"The gate's {kind} is used, but none is connected to it: connect one.")
        tell("The gate is open: every threshold is met.", cls.hidden.unique_id)
        return io.NodeOutput(image, latent)
