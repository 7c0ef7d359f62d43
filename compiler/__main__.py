"""Installs Sophgo's compiler, and compiles checkpoints.

    python -m compiler                                    installs it, or says that it is there
    python -m compiler sd15.safetensors --chip BM1684X    compiles into models/sophgo/sd15 of this ComfyUI
    python -m compiler sd15.safetensors --dry-run         says what that takes, and does nothing

Any Python from 3.10 will do: the work is done in the compiler's own.
"""

import argparse
import shutil
import sys
from pathlib import Path

from .client import compile_checkpoint
from .errors import CompilerError
from .request import AUTO, CHIPS, KINDS, MINUTE, TOKENS, Request, parse_sizes
from .summary import estimate_text, report_text
from .toolchain import FOLDER, Toolchain

MODELS = Path(__file__).resolve().parents[3] / "models" / "sophgo"  # where the pack lies in custom_nodes


def main():
    args = _arguments()
    try:
        if args.checkpoint is None:
            print(f"The compiler is in {Toolchain.install().folder}.")
            return
        request = _request(args)
        request.check()
        print((estimate_text if args.dry_run else report_text)(_compile(request)))
    except CompilerError as error:
        raise SystemExit(str(error)) from None
    except KeyboardInterrupt:
        raise SystemExit("Cancelled; nothing is left of it.") from None


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m compiler", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    precisions = [AUTO, *CHIPS["bm1684x"]]
    parser.add_argument("checkpoint", nargs="?", type=Path, help="a .safetensors file with SD 1.x")
    parser.add_argument("--name", help="of the new folder; default: the checkpoint's")
    parser.add_argument("--out", type=Path, default=MODELS, help=f"where the new folder appears; default: {MODELS}")
    parser.add_argument("--only", choices=KINDS, nargs="+", default=list(KINDS), help="parts to compile; default: all")
    parser.add_argument("--chip", type=str.lower, choices=CHIPS, default="bm1684x")
    for kind, title in KINDS.items():
        option = f"--{kind.replace('_', '-')}"
        parser.add_argument(option, choices=precisions, default=AUTO, help=f"precision of the {title}")
    parser.add_argument("--sizes", nargs="+", default=["512x512"], help="of pictures, such as 512x512 768x512")
    parser.add_argument("--batch", type=int, default=2, help="of the U-Net: 2 takes condition and uncondition at once")
    parser.add_argument("--controlnet", action="store_true", help="a U-Net that takes a ControlNet's residuals")
    parser.add_argument("--context", type=int, default=TOKENS, help="tokens the U-Net takes, a multiple of 77")
    parser.add_argument("--clip-skip", type=int, default=1, help="2 leaves out the text encoder's last layer")
    parser.add_argument("--verify", type=float, default=10, metavar="MINUTES", help="for comparing in the simulator")
    parser.add_argument("--dry-run", action="store_true", help="say what time, memory and disk it takes")
    return parser.parse_args()


def _request(args: argparse.Namespace) -> Request:
    return Request(
        checkpoint=str(args.checkpoint.resolve()),
        name=args.name or args.checkpoint.stem,
        folder=str(args.out.resolve()),
        kinds=tuple(kind for kind in KINDS if kind in args.only),
        chip=args.chip,
        precisions={kind: getattr(args, kind) for kind in KINDS},
        sizes=parse_sizes(" ".join(args.sizes)),
        batch=args.batch,
        control=args.controlnet,
        tokens=args.context,
        skip=args.clip_skip - 1,
        budget=args.verify * MINUTE,
        dry=args.dry_run,
        source={"file": args.checkpoint.name},
    )


def _compile(request: Request) -> dict:
    bar = _Bar()
    try:
        return compile_checkpoint(request, toolchain=Toolchain(FOLDER), progress=bar)
    finally:
        bar.end()


class _Bar:
    """A line that shows the progress, drawn over itself; where nobody watches, a line for each step."""

    WIDTH = 30

    def __init__(self):
        self.watched, self.step, self.drawn = sys.stderr.isatty(), "", 0

    def __call__(self, share: float, step: str):
        if self.watched:
            filled = round(share * self.WIDTH)
            line = f"[{'#' * filled}{'.' * (self.WIDTH - filled)}] {share:4.0%}  {step}"
            line = line[: shutil.get_terminal_size().columns - 1]
            print("\r" + line.ljust(self.drawn), end="", file=sys.stderr, flush=True)
            self.drawn = len(line)
        elif step != self.step:
            print(f"{share:4.0%}  {step}", file=sys.stderr, flush=True)
        self.step = step

    def end(self):
        if self.watched:
            print("\r" + " " * self.drawn, end="\r", file=sys.stderr, flush=True)


main()
