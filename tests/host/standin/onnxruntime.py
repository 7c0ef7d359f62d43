"""Stands before the real onnxruntime in a worker: notes each run, and takes its time if told to (tests/host/watched.py)."""
import importlib
import os
import sys
import time

FOLDER = os.environ["WATCHED"]

sys.path.remove(os.path.dirname(os.path.abspath(__file__)))
del sys.modules["onnxruntime"]
real = importlib.import_module("onnxruntime")


class WatchedSession(real.InferenceSession):
    def __init__(self, path, *arguments, **options):
        super().__init__(path, *arguments, **options)
        self.file = os.path.basename(path)

    def run(self, *arguments):
        with open(os.path.join(FOLDER, "runs"), "a") as notes:
            notes.write(self.file + "\n")
        with open(os.path.join(FOLDER, "seconds")) as setting:
            time.sleep(float(setting.read()) if self.file.startswith("unet") else 0)
        return super().run(*arguments)


real.InferenceSession = WatchedSession      # onnxruntime itself is in sys.modules now: that is what the importer gets
