"""What this process runs on: CPU cores, threads, revision of the code, versions of the libraries."""

import os
import subprocess
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

LIBRARIES = (
    "iab-vision", "ray", "torch", "transformers", "onnx", "onnxscript", "onnxruntime-gpu", "onnxruntime",
    "numpy", "pillow", "pyarrow", "obstore",
)  # fmt: skip
"""What the results depend on; ONNX Runtime has two names, of which one is installed."""


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_ahead(call: Callable[[T], R], inputs: Iterable[T], *, threads: int, ahead: int) -> Iterator[R]:
    """Like `map`, in threads, but at most `ahead` results ahead of the caller."""
    with ThreadPoolExecutor(threads) as pool:
        rest = iter(inputs)
        started = deque(pool.submit(call, one) for one in islice(rest, ahead))
        while started:
            yield started.popleft().result()
            started.extend(pool.submit(call, one) for one in islice(rest, 1))


def package_versions() -> dict[str, str]:
    """Version by name of those of `LIBRARIES` that are installed."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def git_revision() -> str | None:
    """Revision of the code that runs, when it runs from a checkout."""
    command = ["git", "rev-parse", "HEAD"]
    here = Path(__file__).parent
    try:
        answer = subprocess.run(  # noqa: S603 (nothing in the command comes from outside)
            command, cwd=here, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
