"""Python's garbage collector, paused where it would find nothing."""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collection_paused() -> Iterator[None]:
    """For imports, large JSON files and look-ups in a cache: they make many objects that all stay.

    Looking through them again and again takes about a tenth of the time to the first score, and up to half of that of
    look-ups.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def left_at_exit() -> None:
    """For a program: when it ends, what is in memory is not looked through once more, which takes a second after
    torch and transformers have been imported."""
    atexit.unregister(gc.freeze)  # at most once
    atexit.register(gc.freeze)
