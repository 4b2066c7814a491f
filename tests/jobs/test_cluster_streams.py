"""What Ray's native code prints on the process's own streams while it starts."""

import os

from jobs.cluster import without_log_level_line


def test_only_the_line_about_the_log_level_is_dropped(capfd):
    with without_log_level_line():
        os.write(
            2,
            b"[I 1 1] logging.cc:303: Set ray log level from RAY_BACKEND_LOG_LEVEL to 3\n",
        )
        os.write(2, b"[E 1 1] out of disk\n")
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "[E 1 1] out of disk\nafter\n"
