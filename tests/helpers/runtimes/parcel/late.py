"""A module that is needed late."""
from __future__ import annotations

import traceback


def trip():
    return 1 / 0  # mind the step


def traceback_of(function) -> str:
    try:
        function()
    except ZeroDivisionError:
        return traceback.format_exc()
