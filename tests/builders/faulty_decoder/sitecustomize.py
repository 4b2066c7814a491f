"""Breaks the decoder's process, and no other, over chosen payloads: Python imports this as it starts.

It takes effect where this folder is on the module path and `TEST_DECODER_FAULTS` says what to do:
`DIGEST=segv,DIGEST=hang` names payloads by their SHA-256; `=segv` breaks over every one.
"""

import ctypes
import hashlib
import os
import sys

if "pipelines.images.decoder_worker" in sys.orig_argv:
    from pipelines.images import prepare

    FAULTS = [pair.split("=", 1) for pair in os.environ.get("TEST_DECODER_FAULTS", "").split(",") if pair]
    whole = prepare.prepare

    def broken(payload, spec, limits):
        digest = hashlib.sha256(payload).hexdigest()
        for prefix, fault in FAULTS:
            if not digest.startswith(prefix):
                continue
            if fault == "segv":
                ctypes.string_at(0)
            elif fault == "abort":
                os.abort()
            while fault == "hang":
                pass
        return whole(payload, spec, limits)

    prepare.prepare = broken
