"""What a command of a manifest becomes: its shells run here, with stubs for the programs at their end."""

import json
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

NIGHT = "2026-11-21"
ENVIRONMENT = {"BUCKET": "s3://bucket", "GPUS": "4"}
"""What `values/` gives to the pods of the cluster, and KubeRay not to its submitter."""

RAY = f"""#!{sys.executable} -S
import os, shlex, sys
command = shlex.join(sys.argv[sys.argv.index("--") + 1 :])
os.execvpe("sh", ["sh", "-c", command], os.environ | {ENVIRONMENT!r})
"""
"""`ray job submit`: quotes the entrypoint's words, and the head gives them to a shell of its own."""

DATE = f"""#!/bin/sh
echo {NIGHT}
"""

PROGRAM = f"""#!{sys.executable} -S
import json, sys
print(json.dumps(sys.argv[1:]))
"""


@cache
def arguments_of_driver(entrypoint: str) -> list[str]:
    """The arguments that python gets from the entrypoint of a RayJob in K8sJobMode.

    KubeRay writes the entrypoint as it is behind `--` (ray-operator/controllers/ray/common/job.go, v1.7.0).
    """
    return _run(["bash", "-ce", f"ray job submit --no-wait -- {entrypoint} ;"], {})


@cache
def arguments_of_submitter(script: str) -> list[str]:
    """The arguments that `iab-vision` gets from a pod's `sh -c`."""
    return _run(["sh", "-c", script], {**ENVIRONMENT, "JOB_NAME": "iab-vision-nightly-29000000"})


def _run(command: list[str], environment: dict[str, str]) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        for name, text in {"ray": RAY, "date": DATE, "python": PROGRAM, "iab-vision": PROGRAM}.items():
            program = Path(folder) / name
            program.write_text(text)
            program.chmod(0o755)
        only = {"PATH": f"{folder}:/usr/bin:/bin", **environment}
        done = subprocess.run(command, env=only, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command} ended with {done.returncode}: {done.stderr}")
    arguments: list[str] = json.loads(done.stdout)
    return arguments
