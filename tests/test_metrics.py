"""Metrics cost nothing where Ray does not run."""

import subprocess
import sys


def test_without_ray_nothing_is_recorded_and_ray_is_not_imported() -> None:
    code = (
        "import sys; from pipelines import metrics; metrics.count('rows', 3, status='ok');"
        "metrics.put('run_images', 3)\n"
        "with metrics.timed('load'): pass\n"
        "sys.exit('ray' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
