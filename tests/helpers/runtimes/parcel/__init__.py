"""A runtime that is a package and uses modules of the pack: what is sent for it must be imported as it is here."""
from __future__ import annotations

from ...errors import DeviceError
from .. import plain


class Runtime(plain.Runtime):
    def where(self, model, buffers, report):
        """The names under which things are imported, and what a traceback shows."""
        from . import late  # first imported in the middle of the work
        text = "\n".join([__name__, DeviceError.__module__, late.__name__, late.traceback_of(late.trip)]).encode()
        return [("uint8", (len(text),), text)]

    def refuse(self, model, buffers, report):
        raise DeviceError("This device does not do that.")
