"""Boot a real ComfyUI with this pack in it, headless, and talk to it as any client does: HTTP and websocket."""
from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path

import websocket

from tools.install import PACK, PYTHON, comfyui

BOOT_SECONDS = 180
PACK_NAME = "sophgo-ascend-nodes"


class ServerError(RuntimeError):
    """The server did not start, refused a workflow, or a node failed; the message is what it said."""

    def __init__(self, message: str, details: dict | None = None):
        super().__init__(message)
        self.details = details or {}


class Server:
    """A ComfyUI of its own in `base` (models, input, output, user), with the pack linked into its custom_nodes."""

    def __init__(self, base: Path, environment: dict[str, str] | None = None, arguments: tuple[str, ...] = ()):
        self.base, self.arguments = base, arguments
        self.environment = {**os.environ, **(environment or {})}
        self.process: subprocess.Popen | None = None
        self.log = base / "comfyui.log"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"

    def __enter__(self) -> Server:
        for folder in ("models/sophgo", "input", "output", "user", "custom_nodes", "temp"):
            (self.base / folder).mkdir(parents=True, exist_ok=True)
        link = self.base / "custom_nodes" / PACK_NAME
        if not link.exists():
            link.symlink_to(PACK, target_is_directory=True)
        command = [str(PYTHON), str(comfyui() / "main.py"), "--cpu", "--listen", "127.0.0.1", "--port",
                   self.address.split(":")[1], "--disable-auto-launch", "--disable-api-nodes", "--base-directory",
                   str(self.base), "--database-url", "sqlite:///:memory:", *self.arguments]
        self.process = subprocess.Popen(command, stdout=self.log.open("wb"), stderr=subprocess.STDOUT,
                                        env=self.environment, cwd=comfyui())
        deadline = time.monotonic() + BOOT_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise ServerError(f"ComfyUI ended while starting:\n{self.tail()}")
            try:
                self.get("/system_stats")
                return self
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.3)
        self.__exit__()
        raise ServerError(f"ComfyUI did not answer within {BOOT_SECONDS} s:\n{self.tail()}")

    def __exit__(self, *exception) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def tail(self, lines: int = 30) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    # -- HTTP --------------------------------------------------------------------------------------------------
    def get(self, path: str, **query) -> object:
        answer = self.read(path, **query)
        return json.loads(answer) if answer else None

    def read(self, path: str, **query) -> bytes:
        url = f"http://{self.address}{path}" + (f"?{urllib.parse.urlencode(query)}" if query else "")
        with urllib.request.urlopen(url, timeout=30) as answer:
            return answer.read()

    def post(self, path: str, body: object | None = None) -> object:
        """Raises ServerError with the server's own words for a refused workflow."""
        request = urllib.request.Request(f"http://{self.address}{path}", json.dumps(body or {}).encode(),
                                         {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                data = answer.read()
        except urllib.error.HTTPError as error:
            details = json.loads(error.read() or b"{}")
            raise ServerError(_refusal(details), details) from None
        return json.loads(data) if data else None

    # -- workflows ---------------------------------------------------------------------------------------------
    def queue(self, workflow: dict, client: str = "") -> str:
        """Queue an API-format workflow; its prompt id."""
        return self.post("/prompt", {"prompt": workflow, "client_id": client})["prompt_id"]

    def run(self, workflow: dict, on_event: Callable[[str, dict], None] = lambda kind, data: None,
            seconds: float = 600) -> dict:
        """Queue a workflow and wait for its end: node id -> outputs. on_event sees every websocket message.

        Raises ServerError with the failed node's message, or "interrupted".
        """
        client = uuid.uuid4().hex
        events = websocket.create_connection(f"ws://{self.address}/ws?clientId={client}", timeout=seconds)
        try:
            prompt = self.queue(workflow, client)
            while True:
                message = events.recv()
                if isinstance(message, bytes):
                    on_event("binary", {"data": message})
                    continue
                event = json.loads(message)
                data = event["data"]
                on_event(event["type"], data)
                if data.get("prompt_id") != prompt:
                    continue
                if event["type"] == "execution_error":
                    raise ServerError(data["exception_message"].strip(), data)
                if event["type"] == "execution_interrupted":
                    raise ServerError("interrupted", data)
                if event["type"] == "execution_success":
                    return self.outputs(prompt)
        finally:
            events.close()

    def outputs(self, prompt: str) -> dict:
        """History appears a moment after the last event."""
        for _ in range(100):
            history = self.get(f"/history/{prompt}")
            if history:
                return history[prompt]["outputs"]
            time.sleep(0.05)
        raise ServerError(f"prompt {prompt} left no history")

    def picture(self, image: dict) -> bytes:
        """The PNG that a SaveImage output names."""
        return self.read("/view", **image)


def _refusal(details: dict) -> str:
    errors = [f"{node['class_type']}: {error['message']} {error['details']}".strip()
              for node in (details.get("node_errors") or {}).values() for error in node["errors"]]
    error = details.get("error")
    return "; ".join(errors) or (error.get("message") if isinstance(error, dict) else str(error))
