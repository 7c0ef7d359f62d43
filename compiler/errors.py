"""The errors of everything here."""


class CompilerError(Exception):
    """What went wrong and what to do about it, in one sentence."""


class DiskFull(CompilerError):
    pass


class ToolFailed(CompilerError):
    """A tool of the compiler failed, and neither memory nor disk was the cause: another recipe may do."""
