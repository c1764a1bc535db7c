"""What the storage library's threads say of an error that comes back to whoever waits for them: left out, since it is
said once, in a line.
"""

import logging
import pathlib
import sys
import threading
import traceback

from orbax.checkpoint.utils import TMP_DIR_SUFFIX

_LOGGERS = ("absl", "asyncio")


class Quiet(logging.Filter):
    """Leaves out that and nothing else, from `start` on.

    When one of many writes fails, the library closes its event loop over the others: asyncio then logs those that
    failed as well whenever their memory is freed, and TensorStore's threads print that the loop is closed.
    """

    def start(self) -> None:
        for name in _LOGGERS:
            logging.getLogger(name).addFilter(self)
        self._before, sys.unraisablehook = sys.unraisablehook, self._uncaught

    def end(self) -> None:
        """Not after a write that failed: its threads go on, for as long as the process."""
        for name in _LOGGERS:
            logging.getLogger(name).removeFilter(self)
        if sys.unraisablehook == self._uncaught:  # else somebody's hook stands before it
            sys.unraisablehook = self._before

    def filter(self, record: logging.LogRecord) -> bool:
        if not record.exc_info:
            return True
        if TMP_DIR_SUFFIX in record.getMessage():  # a future of TensorStore's: no frame of anybody's is on it
            return False
        frames = traceback.extract_tb(record.exc_info[2])
        return not any(_is_orbax(path) for path in (record.pathname, *(frame.filename for frame in frames)))

    def _uncaught(self, found: "sys.UnraisableHookArgs") -> None:
        closed = found.exc_type is RuntimeError and str(found.exc_value) == "Event loop is closed"
        # What is nobody's, off the main thread, is of a thread of a library in C++.
        foreign = found.object is None and threading.current_thread() is not threading.main_thread()
        if not (closed and foreign):
            self._before(found)


def _is_orbax(path: str) -> bool:
    return "orbax" in pathlib.Path(path).parts
