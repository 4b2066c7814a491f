"""Commands as processes of their own: what is killed, stopped and raced."""

import os
import subprocess
import sys


def start(arguments: list[str], **environment: str) -> subprocess.Popen[str]:
    """Run `iab-vision ARGUMENTS` with these variables added to the environment."""
    return subprocess.Popen(
        [sys.executable, "-m", "jobs", *arguments],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
