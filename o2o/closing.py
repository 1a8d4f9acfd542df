"""Close environments, files and processes so that one that fails stops none of the others."""

import logging
from contextlib import ExitStack
from types import TracebackType

from o2o.errors import RunError

_log = logging.getLogger(__name__)


class Closing(ExitStack):
    """An `ExitStack` whose own failures do not replace the result or the exception of the work inside it.

    An exception from closing is logged as a warning. One case is raised: a `RunError` after work that succeeded, since
    then something (such as the last episode) could not be saved.
    """

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        """Close everything, last entered first."""
        try:
            return super().__exit__(kind, error, trace)
        except Exception as second:
            if error is None and isinstance(second, RunError):
                raise
            _log.warning("%swhile closing: %s", "" if error is None else "besides, ", second)
            return False
