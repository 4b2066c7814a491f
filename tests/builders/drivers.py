"""Commands as processes of their own: what is killed, stopped and raced."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence


def start(arguments: list[str], **environment: str) -> subprocess.Popen[str]:
    """Run `iab-vision ARGUMENTS` with these variables added to the environment."""
    return subprocess.Popen(
        [sys.executable, "-m", "jobs", *arguments],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def race(commands: Sequence[list[str]], pause_s: float = 0.0) -> str:
    """How two commands end, of which the second is started so much later: in a word, or what went wrong."""
    first = start(commands[0])
    time.sleep(pause_s)
    drivers = [first, start(commands[1])]
    said = [driver.communicate(timeout=240)[1] for driver in drivers]
    codes = [driver.returncode for driver in drivers]
    if codes == [0, 0]:
        return "both finish"
    if sorted(codes) == [0, 1] and "another driver" in said[codes.index(1)]:
        return "one finishes, the other names it"
    return f"wrong: {codes} {said}"
