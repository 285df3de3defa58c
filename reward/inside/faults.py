"""Reasons why a test has no verdict, or fails regardless of its own result. They do not derive from
Exception, so that a test's ``except Exception`` does not hide them.
"""


class ProgramFailed(BaseException):
    """The program has ended, or its answer is not data."""


class BadTests(BaseException):
    """The row's tests are at fault."""


class Skipped(BaseException):
    """A test skips itself: it does not count."""
