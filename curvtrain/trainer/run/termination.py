"""SIGTERM asks a run to be saved at the next step boundary and to end there."""

import contextlib
import signal
import threading
from collections.abc import Generator

import jax

from curvtrain.trainer.mesh import distributed


class Termination:
    """Notices whether SIGTERM comes while a run is watched.

    Attributes:
      seen: the answer of the latest poll, or what this process has received since.
    """

    def __init__(self):
        self.seen = False

    def poll(self) -> bool:
        """Says whether SIGTERM came, with several processes to any of them: all learn of it in the same call."""
        self.seen = distributed.preempted() or self.seen
        return self.seen

    @contextlib.contextmanager
    def watched(self) -> Generator[None]:
        """Takes note of SIGTERM while the context lasts, in place of the handler that was there before."""
        if threading.current_thread() is not threading.main_thread() or jax.process_count() > 1:
            yield  # Only the main thread may install handlers; with several processes, that of JAX's service stays.
            return

        def handler(*_):
            self.seen = True

        before = signal.signal(signal.SIGTERM, handler)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)  # None: not Python's
