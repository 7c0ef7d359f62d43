"""A device that tests can watch: onnxruntime in an interpreter of its own, which notes every run and can be slow."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tools.install import PYTHON

NAME = "watched"
STANDIN = Path(__file__).parent / "standin"


@contextmanager
def settings(base: Path, text: str) -> Iterator[Path]:
    """The server's sophgo_ascend.toml for a while; it is read afresh for each prompt."""
    file = base / "user" / "sophgo_ascend.toml"
    file.write_text(text)
    try:
        yield file
    finally:
        file.unlink(missing_ok=True)


class Watched:
    """Device "watched" of the server, for as long as its settings are in place."""

    def __init__(self, folder: Path):
        self.runs, self.seconds, self.python = folder / "runs", folder / "seconds", folder / "python"
        self.runs.touch()
        self.slow(0)
        self.python.write_text(f"#!/bin/sh\nWATCHED='{folder}' PYTHONPATH='{STANDIN}' exec '{PYTHON}' \"$@\"\n")
        self.python.chmod(0o755)
        self.settings = f'[[device]]\nname = "{NAME}"\nruntime = "onnx"\npython = "{self.python}"\n'

    def slow(self, seconds: float) -> None:
        """How long each U-Net run takes from now on."""
        self.seconds.write_text(str(seconds))

    def forget(self) -> None:
        self.runs.write_text("")

    def unet_runs(self) -> int:
        """U-Net runs since `forget`."""
        return sum(line.startswith("unet") for line in self.runs.read_text().splitlines())
