"""What pytest-benchmark records about the machine: the project's own environment record, which names no host."""

from __future__ import annotations

from typing import Any

from environment import environment


def pytest_benchmark_generate_machine_info() -> dict[str, Any]:
    return environment()
