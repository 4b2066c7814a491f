"""A request to stop reaches a driver wherever it is."""

import os
import signal
import threading
import time

import pytest

from jobs.signals import handlers_kept, stoppable


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_driver_that_waits_for_ray_stops_at_the_first_signal() -> None:
    import ray

    @ray.remote
    def wait() -> None:
        time.sleep(60)

    waited_for = wait.remote()
    with handlers_kept(), stoppable():
        threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        with pytest.raises(KeyboardInterrupt):
            ray.get(waited_for)
    ray.cancel(waited_for, force=True)
