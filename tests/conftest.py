"""For all tests: kernels run in Triton's interpreter where there is no GPU, which must be said before it is
imported; programs can be interrupted; long tests come first."""

from __future__ import annotations

import os
import signal

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A shell that starts pytest in the background has it ignore SIGINT, and so would every program that a test interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Few but long tests: begun last, as files of few tests are, they would leave the other process without work.
LONG_FILES = (
    "test_docs_run",
    "test_ray_data",
    "test_run_faults",
    "test_tensor_parallel",
    "test_torchrun",
    "test_bench_records",
    "test_examples",
)


@pytest.fixture(autouse=True)
def _models_are_loaded_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not as it was noted when they were loaded before, which depends on how old a test's files are."""
    monkeypatch.setattr("fastscore.known_models.is_settled", lambda *_: False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of long tests first; the others stay in their order."""
    order = {name: place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
