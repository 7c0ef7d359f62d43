"""One compile from checkpoint to folder. Runs in the compiler's Python, as a process of its own (client.py starts it).

    python -m compiler.job        the request is the first line of stdin, as JSON (request.py)

It ends when stdin does, or on SIGTERM, cleaning up: so it outlives neither a cancel nor the server. What it says is one
JSON object a line on stdout, of these kinds:

    {"step": text, "share": 0.2, "seconds": 40}   what is done now, its part of the whole, and how long it may take
    {"done": report}                              the folder is there; the report is in its model.json too
    {"costs": [...], "disk": 1e9, "memory": 1e9}  instead, after a dry run, as is the next
    {"error": sentence}
"""

import contextlib
import errno
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

import onnx

from engines.files import content_hash

from . import plan, verify
from .checkpoint import Checkpoint
from .convert import Recipe, deploy, to_mlir
from .errors import CompilerError, DiskFull, ToolFailed
from .networks import Graph, Weights
from .plan import Cost, Network
from .recipes import Attempt, first_bad_block, recipes
from .request import MODEL_JSON, Request
from .summary import FORMAT
from .toolchain import COMPILER, NEARLY_FULL, Toolchain
from .workplace import workplace

NICE = 5  # the server stays responsive


class Job:
    def __init__(self, request: Request, toolchain: Toolchain, work: Path, log: Path):
        self.request, self.toolchain, self.work, self.log = request, toolchain, work, log
        self.result = work / "result"
        self.weights: dict[str, Weights] = {}
        self.known: dict = {}  # arrays of one network's reference that others are tried with
        self.budget = request.budget
        self.total = 1.0

    def run(self) -> dict:
        """The report, once the folder is in its place."""
        checkpoint = Checkpoint(Path(self.request.checkpoint))
        plan.check(self.request, checkpoint)
        costs = list(plan.costs(self.request, checkpoint))
        plan.refuse_if_too_large(self.request, costs)
        self.total = sum(cost.seconds for cost in costs)
        self.result.mkdir()
        files = []
        for network, cost in zip(plan.networks(self.request), costs):
            files.append(self.make(network, checkpoint, cost))
        for weights in self.weights.values():
            weights.close()
        report = self.report(checkpoint, files)
        (self.result / MODEL_JSON).write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        self.deliver()
        return report

    def deliver(self):
        try:
            self.result.rename(self.request.out)
        except OSError:
            if not self.request.out.exists():
                raise
            raise CompilerError(
                f"There is a '{self.request.name}' by now, which was not there when this compile began: remove it or choose "
                "another name, and compile again."
            ) from None

    def make(self, network: Network, checkpoint: Checkpoint, cost: Cost) -> dict:
        """One bmodel and its ONNX reference in the result folder: what model.json says of it."""
        self.say(f"{network.title}: writing the graph", cost.build)
        # one file of weights for all sizes: the second finds its own in it
        if network.stage not in self.weights:
            self.weights[network.stage] = Weights(self.result / f"{network.stage}.weights")
        graph = network.build(checkpoint.part(network.kind), self.weights[network.stage])
        reference = graph.save(self.result)

        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="mlir-", dir=self.work) as folder:
            self.say(f"{network.title}: reading it into the compiler", cost.transform)
            mlir = to_mlir(reference, Path(folder), toolchain=self.toolchain, log=self.log)
            attempts, bmodel = self.accept(network, graph, reference, mlir, cost)
            bmodel.replace(self.result / bmodel.name)
        taken = attempts[-1]
        return {
            "file": bmodel.name,
            "reference": reference.name,
            "stage": network.stage,
            "size": network.size,
            "precision": taken.recipe.precision,
            "recipe": str(taken.recipe),
            "verified": bool(taken.parity),
            "seconds": round(time.monotonic() - began, 1),
            "bytes": (self.result / bmodel.name).stat().st_size,
            "multiplications": graph.macs,
            "parameters": graph.parameters,
            "attempts": [attempt.to_dict() for attempt in attempts],
        }

    def accept(
        self, network: Network, graph: Graph, reference: Path, mlir: Path, cost: Cost
    ) -> tuple[list[Attempt], Path]:
        """Compiles by one recipe after the other until the result computes what the reference does.

        Without time to simulate the first that compiles is taken, and not verified. Raises CompilerError when none is good.
        """
        chip, attempts, feeds, wanted = self.request.chip, [], {}, {}
        for recipe in recipes(network.stage, chip, network.precision):
            self.say(f"{network.title}: compiling for {chip.upper()} in {recipe}", cost.deploy)
            try:
                bmodel = deploy(mlir, chip, recipe, toolchain=self.toolchain, log=self.log)
            except ToolFailed as failure:
                attempts.append(Attempt(recipe, failure=str(failure)))
                continue
            if not wanted and (cost.simulate > self.budget or not cost.verified):
                return [*attempts, Attempt(recipe)], bmodel
            if not wanted:
                feeds = verify.inputs(graph, self.known)
                wanted = verify.reference(reference, feeds)
                self.remember(network, wanted)
            self.say(f"{network.title}: comparing in the simulator", cost.simulate)
            try:
                attempts.append(self.compare(recipe, bmodel, feeds, wanted))
            except TimeoutError:
                self.budget = 0.0
                if not any(attempt.parity for attempt in attempts):
                    return [*attempts, Attempt(recipe)], bmodel
            if attempts[-1].good:
                return attempts, bmodel
            if cost.simulate > self.budget:
                break
        raise CompilerError(self.failure(network, graph, reference, attempts, feeds))

    def compare(self, recipe: Recipe, bmodel: Path, feeds: dict, wanted: dict) -> Attempt:
        got, seconds = verify.simulate(bmodel, self.request.chip, feeds, self.toolchain, self.log, self.budget)
        self.budget -= seconds
        return Attempt(recipe, verify.compare(got, wanted), seconds)

    def remember(self, network: Network, wanted: dict):
        if network.stage == "text_encoder":
            self.known["context"] = wanted["last_hidden_state"]
        if network.stage == "vae_encoder":
            self.known["latent"] = wanted["moments"][:, :4]

    def failure(self, network: Network, graph: Graph, reference: Path, attempts: list[Attempt], feeds: dict) -> str:
        """Why none was good, in one sentence, with the block where the best one goes wrong."""
        if not feeds:
            ways = ", ".join(str(attempt.recipe) for attempt in attempts)
            return (
                f"The {network.title} cannot be compiled for {self.request.chip.upper()} ({ways}): try a smaller size or "
                f"another precision; the compiler said first: {attempts[0].failure}"
            )
        tried = "; ".join(
            f"{a.recipe} " + ("does not compile" if a.failure else f"cosine {a.cosine:.5f}") for a in attempts
        )
        best = max(attempts, key=lambda attempt: (bool(attempt.parity), attempt.cosine))
        blocks = dict(graph.blocks)

        def good(name: str) -> bool:
            self.say(f"{network.title}: looking for the block that differs, {name}", 0)
            with tempfile.TemporaryDirectory(prefix="part-", dir=self.work) as folder:
                part = verify.up_to(reference, blocks[name])
                mlir = to_mlir(part, Path(folder), toolchain=self.toolchain, log=self.log)
                bmodel = deploy(mlir, self.request.chip, best.recipe, toolchain=self.toolchain, log=self.log)
                return self.compare(best.recipe, bmodel, feeds, verify.reference(part, feeds)).good

        found = ""
        if best.seconds * len(blocks).bit_length() < self.budget:
            with contextlib.suppress(TimeoutError, ToolFailed):  # a part may take longer, or not compile
                found = f"; it goes wrong in '{first_bad_block(list(blocks), good)}'"
        return (
            f"The {network.title} compiled for {self.request.chip.upper()} does not compute what its reference does "
            f"({tried}){found}; use another precision, or leave this part out and keep its stock model."
        )

    def report(self, checkpoint: Checkpoint, files: list[dict]) -> dict:
        """model.json."""
        return {
            "format": FORMAT,
            "name": self.request.name,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "source": self.request.source,
            "weights_sha256": content_hash(checkpoint.path),
            "chip": self.request.chip.upper(),
            "versions": {"compiler": COMPILER.replace("==", " "), "onnx": onnx.__version__},
            "options": self.request.options,
            "files": files,
        }

    def say(self, step: str, seconds: float):
        tell({"step": step, "share": seconds / self.total, "seconds": seconds})


def tell(message: dict):
    print(json.dumps(message), file=sys.__stdout__, flush=True)


def estimates(request: Request) -> dict:
    """What a dry run says (summary.estimate_text)."""
    checkpoint = Checkpoint(Path(request.checkpoint))
    plan.check(request, checkpoint)
    costs = list(plan.costs(request, checkpoint))
    # from the graph a dry run gets a file that has its size and no numbers yet
    place = checkpoint.path.stat()
    saved = place.st_size if 512 * place.st_blocks < place.st_size / 2 else 0
    return {"costs": [asdict(cost) for cost in costs], "disk": plan.disk(costs) + saved, "memory": plan.free_memory()}


def sentence(error: Exception, request: Request) -> str:
    """What to say of an error: a full disk shows in many ways."""
    full = isinstance(error, DiskFull) or isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, CompilerError) and not full:
        return str(error)
    with contextlib.suppress(OSError):
        full = full or shutil.disk_usage(request.folder).free < NEARLY_FULL
    if full:
        place = f"The disk of {request.folder} became full while '{request.name}' was compiled"
        return f"{place}: make room there and try again."
    return f"Compiling '{request.name}' failed unexpectedly: {type(error).__name__}: {' '.join(str(error).split())[:300]}."


class Ending:
    """Ends everything that was started, and leaves nothing: when the server closes the pipe or is gone, or on SIGTERM."""

    def __init__(self):
        self.begun = threading.Lock()
        self.leftovers: list[Path] = []
        # what is started does not inherit this, as it would "ignore"
        signal.signal(signal.SIGTERM, lambda *_: self.end())

    def with_stdin(self):
        # not through sys.stdin, whose lock a thread that waits there would keep beyond the interpreter's end
        while os.read(0, 4096):
            pass
        self.end()

    def end(self):
        if not self.begun.acquire(blocking=False):
            return
        os.killpg(os.getpgrp(), signal.SIGTERM)  # the compiler's tools, and this process, which leads the group
        for _ in range(50):
            for path in self.leftovers:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
            if not any(path.exists() for path in self.leftovers):
                break
            time.sleep(0.1)
        os.killpg(os.getpgrp(), signal.SIGKILL)  # what did not listen or was started since, and this process


def main():
    os.nice(NICE)
    ending = Ending()
    request = Request.from_json(sys.stdin.buffer.readline().decode())
    threading.Thread(target=ending.with_stdin, daemon=True).start()
    # what libraries print must not get among the messages
    sys.__stdout__ = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        message = estimates(request) if request.dry else whole(request, ending)
    except Exception as error:
        message = {"error": sentence(error, request)}
    ending.begun.acquire()  # what is left now is to stay
    tell(message)


def whole(request: Request, ending: Ending) -> dict:
    """Compiles in a folder beside the one to be, and gives the message to end with. The log stays if that names it."""
    work = workplace(Path(request.folder), request.name)
    handle, path = tempfile.mkstemp(prefix="sophgo-compile-", suffix=".log")
    os.close(handle)
    log = Path(path)
    ending.leftovers += [work, log]
    try:
        message = {"done": Job(request, Toolchain(Path(sys.prefix).parent), work, log).run()}
    except Exception as error:
        message = {"error": sentence(error, request)}
    shutil.rmtree(work, ignore_errors=True)
    if path not in message.get("error", ""):
        log.unlink(missing_ok=True)
    return message


if __name__ == "__main__":
    main()
