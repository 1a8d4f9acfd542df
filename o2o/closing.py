"""Closing environments, files and processes: each is closed whatever the others do, and takes no result along."""

import sys
from contextlib import ExitStack
from types import TracebackType

from o2o.errors import RunError


class Closing(ExitStack):
    """An `ExitStack` for what must be closed behind work that may fail: what that returns or raises comes out of it.

    An exception that closing raises is a line on standard error, but for a `RunError` behind work that raised nothing:
    something, the last episode say, could not be kept.
    """

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        """Close all, the last first."""
        try:
            return super().__exit__(kind, error, trace)
        except Exception as second:
            if error is None and isinstance(second, RunError):
                raise
            print(f"o2o: {'' if error is None else 'besides, '}while closing: {second}", file=sys.stderr)
            return False
