"""Why a test has no verdict, or fails whatever it makes of it. None is an Exception, so that no ``except``
hides it.
"""


class ProgramFailed(BaseException):
    """The program is gone, or what it answered is no data."""


class BadTests(BaseException):
    """The row's own fault."""


class Skipped(BaseException):
    """A test that says of itself that it does not count."""
