"""The error of everything here."""


class CompilerError(Exception):
    """What went wrong and what to do about it, in one sentence."""
