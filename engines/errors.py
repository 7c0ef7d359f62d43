"""Errors whose message is one sentence for the person at the graph."""


class EngineError(RuntimeError):
    """A compiled engine cannot do what was asked; the message says what was asked, what there is, what to do."""


class DeviceError(EngineError):
    """The device that was asked for is not there, or cannot run this file."""


class WorkerDied(EngineError):
    """The worker process ended in the middle of its work. The next call starts a new one."""


class NotFinite(EngineError):
    """A network answered with NaN or infinite values."""
