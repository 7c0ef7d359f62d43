"""Compare recordings from a shell, as the node Compare Runs does in a graph.

    python -m engines.alignment show RECORDING
    python -m engines.alignment compare REFERENCE CANDIDATE            two runs, call by call (free-running)
    python -m engines.alignment replay REFERENCE MODEL [--device NAME] the recorded inputs through MODEL (teacher-forced)

RECORDING, REFERENCE and CANDIDATE are .npz files; MODEL is a .bmodel or .onnx file, or a folder of them. Run it in the
pack's folder. --plot writes the picture, --json the numbers. The exit status is 1 where a threshold (--min-cosine,
--min-psnr) is not met, and where anything is not finite.
"""
from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from ..assembly import Source
from ..devices import Devices, find_devices
from ..errors import EngineError
from ..network import ModelFileError
from ..workers import Worker
from . import LOOK_FOR_CAUSES, report
from .align import align
from .compare import Networks, judge
from .recording import Call, Recording, known_ids

PACK = Path(__file__).resolve().parents[2]


def networks_of(path: Path, devices: Devices, device: str, scale_inside: bool) -> tuple[Networks, dict[str, str]]:
    """({stage: network}, {stage: what it is}) of what a model file or folder holds. Raises EngineError, ModelFileError."""
    source = Source.open(path.name, path, [path.parent])
    held = {role for *_, role in source.networks}
    stages, poll = {}, lambda: None
    if "text_encoder" in held:
        stages["text_encoder"] = source.text_encoder(devices, device, poll)
    if "unet" in held:
        stages["unet"] = source.unet(devices, device, poll)
    if "vae_decoder" in held:
        stages["vae_decoder"] = source.vae_decoder(devices, device, poll, scale_inside)
    if "vae_encoder" in held:
        stages["vae_encoder"] = source.vae_encoder(devices, device, poll, scale_inside)
    answer: Mapping[str, Callable] = {"text_encoder": _text, "unet": _unet, "vae_decoder": _decoded, "vae_encoder": _encoded}
    return ({role: (lambda call, role=role, stage=stage: answer[role](stage, call)) for role, stage in stages.items()},
            {role: stage.describe().partition(": ")[2] for role, stage in stages.items()})


def _text(stage, call: Call) -> dict[str, np.ndarray]:
    hidden, pooled = stage(known_ids(call))
    return {"hidden": hidden} | ({} if pooled is None else {"pooled": pooled})


def _unet(stage, call: Call) -> dict[str, np.ndarray]:
    residuals = {name: array for name, array in call.inputs.items() if name.startswith("residual.")}
    takes = sum(role.startswith("residual.") for role in stage.engines[0].binding.inputs)
    if residuals.keys() - stage.engines[0].binding.inputs.keys():
        raise EngineError(f"The recording has {len(residuals)} residuals of a ControlNet{call.where} and the U-Net in "
                          f"{stage.names} takes {takes}: compile it with ControlNet inputs, or record without one.")
    if "context" not in call.inputs:
        raise EngineError(f"The recording has no conditioning of the U-Net{call.where}: it is of another family of models.")
    return {"prediction": stage(call.inputs["latent"], call.inputs["timestep"], call.inputs["context"], residuals or None,
                                call.where)}


def _decoded(stage, call: Call) -> dict[str, np.ndarray]:
    return {"image": stage(call.inputs["latent"])}


def _encoded(stage, call: Call) -> dict[str, np.ndarray]:
    return {"latent": stage(call.inputs["image"])}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m engines.alignment", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", help="what a recording holds")
    show.add_argument("recording", type=Path)
    compare = commands.add_parser("compare", help="two recordings of the same workflow, call by call")
    replay = commands.add_parser("replay", help="a recording's inputs through compiled networks")
    for command, second in ((compare, "candidate"), (replay, "model")):
        command.add_argument("reference", type=Path)
        command.add_argument(second, type=Path)
        command.add_argument("--causes", choices=LOOK_FOR_CAUSES, default=LOOK_FOR_CAUSES[0],
                             help="look for the classic causes")
        command.add_argument("--plot", type=Path, metavar="PNG")
        command.add_argument("--json", type=Path, metavar="FILE")
        command.add_argument("--min-cosine", type=float, default=0.0, metavar="C", help="least cosine of every answer")
    compare.add_argument("--min-psnr", type=float, default=0.0, metavar="DB", help="least PSNR of the last picture")
    replay.add_argument("--device", default="auto", help="as in the loaders (default: auto)")
    replay.add_argument("--settings", type=Path, help="sophgo_ascend.toml, if devices are named there")
    replay.add_argument("--latent-scale", choices=("outside", "inside"), default="outside", help="as in Load VAE")
    args = parser.parse_args(arguments)
    try:
        if args.command == "show":
            print(report.describe(Recording.open(args.recording)))
        else:
            run(args)
    except (EngineError, ModelFileError) as error:
        sys.exit(str(error))
    finally:
        Worker.close_all()


def run(args: argparse.Namespace) -> None:
    reference = Recording.open(args.reference)
    if args.command == "compare":
        parity = align(reference, candidate=Recording.open(args.candidate), causes=args.causes)
        thresholds = {"min_cosine_free": args.min_cosine, "min_psnr": args.min_psnr}
    else:
        if not args.model.exists():
            raise EngineError(f"There is no model file or folder {args.model}.")
        devices = find_devices(args.settings, PACK)
        networks, names = networks_of(args.model, devices, args.device, args.latent_scale == "inside")
        parity = align(reference, networks, names=names, causes=args.causes, progress=_progress)
        thresholds = {"min_cosine": args.min_cosine}
    print(report.text(parity))
    if args.plot:
        from .plot import of_parity
        of_parity(parity).save(args.plot)
    if args.json:
        args.json.write_text(json.dumps(report.as_json(parity), indent=1) + "\n", encoding="utf-8")
    judge(parity, **thresholds)


def _progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{done} of {total} calls ", end="\n" if done == total else "", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
