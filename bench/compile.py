"""Compiling SD 1.5 at full size, random weights: the time, processor, memory and disk of each step.

    python -m bench.compile FOLDER [options of `python -m compiler`]

FOLDER gets the checkpoint (2.1 GB, which stays) and, while it runs, what is compiled. Memory is what the job and its tools
hold of their own; files mapped into memory are not counted, as they stay there only while there is room.
"""
from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.helpers.sd15 import write_random

ROOT = Path(__file__).resolve().parents[1]
PERIOD = 0.2                    # seconds between looks
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Row:
    """What a step took: seconds and bytes. `commands` has each tool's largest memory."""

    step: str
    began: float
    spent: float                # processor time before it
    wall: float = 0.0
    cpu: float = 0.0
    memory: int = 0
    disk: int = 0
    commands: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in self.commands.items())
        return (f"{self.wall:.0f} s, {self.cpu:.0f} s of processor, {self.memory / 1e9:.2f} GB of memory, "
                f"{self.disk / 1e9:.2f} GB of disk ({parts})")


class Watch:
    """Looks at the job that `python -m compiler` (process `pid`) started, again and again."""

    def __init__(self, pid: int, folder: Path):
        self.pid, self.folder, self.rows, self.step = pid, folder, [], ""
        self.ended = threading.Event()
        threading.Thread(target=self.look, daemon=True).start()

    def look(self) -> None:
        while not self.ended.wait(PERIOD):
            group = self.group()
            if not group:
                continue
            now, spent = time.monotonic(), sum(ticks for _, ticks in group) / TICKS
            if not self.rows or self.rows[-1].step != self.step:
                self.rows.append(Row(self.step, now, spent))
            row, sizes = self.rows[-1], {}
            for pid, _ in group:
                if name := command(pid):
                    sizes[name] = sizes.get(name, 0) + memory(pid)
            row.wall, row.cpu = now - row.began, max(row.cpu, spent - row.spent)
            row.memory, row.disk = max(row.memory, sum(sizes.values())), max(row.disk, disk(self.folder))
            for name, size in sizes.items():
                row.commands[name] = max(row.commands.get(name, 0), size)

    def group(self) -> list[tuple[int, int]]:
        """(process, ticks it has run, with its children that have ended) of the job's group."""
        found = {}
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                found[int(path.parent.name)] = [int(n) for n in path.read_text().rpartition(") ")[2].split()[1:15]]
            except (OSError, ValueError):
                continue
        jobs = {pid for pid, fields in found.items() if fields[0] == self.pid and fields[1] == pid}
        return [(pid, sum(fields[10:14])) for pid, fields in found.items() if fields[1] in jobs]


def memory(pid: int) -> int:
    """Bytes of a process that are of no file; what it shares counts in part."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:             # it has just ended
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))


def command(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return ""
    passes = {"--struct-optimize": "top", "--convert-top-to-tpu": "lowering", "--address-assign": "final",
              "--codegen": "codegen"}
    name = next((Path(word).stem for word in words if word.endswith(".py")), Path(words[0]).name)
    return name + "".join(f" {title}" for flag, title in passes.items() if any(flag in word for word in words))


def disk(folder: Path) -> int:
    size = 0
    for base, _, names in os.walk(folder):
        for name in names:
            try:
                size += os.stat(os.path.join(base, name)).st_blocks * 512
            except OSError:
                continue
    return size


def run(folder: Path, options: list[str]) -> Iterator[tuple[str, object]]:
    checkpoint = folder / "random-sd15.safetensors"
    if not checkpoint.exists():
        write_random(checkpoint)
    with tempfile.TemporaryDirectory(dir=folder) as out:
        arguments = [sys.executable, "-m", "compiler", checkpoint, "--out", out, *options]
        process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        watch = Watch(process.pid, Path(out))
        for line in process.stderr:                 # "  4%  Starting the compiler", or why it failed
            watch.step = line.strip().partition("%  ")[2] or line.strip()
        watch.ended.set()
        for row in watch.rows:
            yield row.step, row
        yield "result", process.stdout.read().strip() or watch.step


if __name__ == "__main__":
    for what, value in run(Path(sys.argv[1]), sys.argv[2:]):
        print(f"{what}: {value}", flush=True)
