"""Whether a bundle may run as asked: the one answer of every command that runs a model."""

import logging

from jobs.errors import Refused
from pipelines.bundle import Bundle, NotCertified
from pipelines.specs import RuntimeSpec

log = logging.getLogger(__name__)


def is_certified(bundle: Bundle, spec: RuntimeSpec, *, allow_uncertified: bool) -> bool:
    """Whether a passing certificate covers the session; `--allow-uncertified` lets it be False.

    Raises:
        Refused: none covers it, and nobody said to run it all the same.
    """
    try:
        bundle.certificate_covering(spec)
    except NotCertified as error:
        if not allow_uncertified:
            raise Refused(str(error)) from error
        log.warning("RUNNING WITHOUT PROOF (--allow-uncertified): %s", error)
        return False
    return True
