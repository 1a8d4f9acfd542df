"""Closing environments, files and processes: each is closed whatever the others do, and a fault stays the one told."""

import sys
from contextlib import ExitStack
from types import TracebackType


class Closing(ExitStack):
    """An `ExitStack` for what must be closed behind work that may fail: what the work raised comes out of it.

    What closing raises besides is a line on standard error; where nothing else was raised, it comes out itself.
    """

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        """Close all, the last first."""
        try:
            return super().__exit__(kind, error, trace)
        except Exception as second:
            if error is None:
                raise
            print(f"o2o: besides, while closing: {second}", file=sys.stderr)
            return False
