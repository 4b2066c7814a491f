"""Images that crash, abort or hang the decoder's process, for tests and benchmarks."""

import os
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

FOLDER = str(Path(__file__).parent / "faulty_decoder")
"""To be on the module path of the process that starts the decoder."""


def variable(faults: Mapping[bytes, str]) -> dict[str, str]:
    """The variable that says which payloads to break over, and how: `segv`, `abort` or `hang`."""
    pairs = (f"{sha256(payload).hexdigest()}={fault}" for payload, fault in faults.items())
    return {"TEST_DECODER_FAULTS": ",".join(pairs)}


def environment(faults: Mapping[bytes, str]) -> dict[str, str]:
    """The same, and the module path, for a command."""
    return variable(faults) | {"PYTHONPATH": os.pathsep.join([FOLDER, os.environ.get("PYTHONPATH", "")])}
