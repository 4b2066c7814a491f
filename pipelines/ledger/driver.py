"""The driver of a run: the process that extends its ledger. Who it is, and whether it still runs.

A process id means something only on the machine, since its boot, and in the process namespace where it was
given: `namespace` names those, so that two containers of one host name are not taken for one machine.
"""

import os
import socket
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

LEASE_S = 60.0
"""Default lease: what a crash costs the driver that is started on another machine, at most."""
_ENDED = "ended"


@dataclass(frozen=True)
class Driver:
    """What every entry says of the process that wrote it."""

    id: str
    host: str
    pid: int
    namespace: str = ""
    """Boot and process namespace; empty where the system does not tell."""
    started: str = ""
    """When the process started, in clock ticks since boot: a process id is given again; empty if unknown."""
    lease_s: float = LEASE_S
    """It signs the run again before so many seconds have passed."""

    def __str__(self) -> str:
        return f"{self.host}, pid {self.pid}"


def identify_driver(lease_s: float = LEASE_S) -> Driver:
    """This process, as a driver of its own id."""
    pid = os.getpid()
    return Driver(uuid.uuid4().hex, socket.gethostname(), pid, _namespace(), _read_start(pid), lease_s)


def is_running(driver: Driver) -> bool | None:
    """Whether the driver's process runs; None if it cannot be told from here.

    An earlier driver of this very process has ended.
    """
    if (driver.host, driver.namespace) != (socket.gethostname(), _namespace()):
        return None
    if driver.pid == os.getpid():
        return False
    try:
        os.kill(driver.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        pass
    return _read_start(driver.pid) in ("", driver.started)


def _namespace() -> str:
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    return ""


def _read_start(pid: int) -> str:
    """When a process started, in clock ticks since boot; `_ENDED` for a zombie, empty if unknown."""
    with suppress(OSError):
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return _ENDED if state in "ZX" else fields[18]  # fields 3 and 22 of proc_pid_stat(5)
    return ""
