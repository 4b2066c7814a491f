"""Whether a bundle may run as asked: the one answer of every command that runs a model."""

import logging

from pipelines.bundle.bundle import Bundle
from pipelines.bundle.manifest import NotCertified
from pipelines.bundle.settings import RuntimeSpec
from pipelines.messages import Refused

log = logging.getLogger(__name__)


def require_certificate(bundle: Bundle, spec: RuntimeSpec, *, allow_uncertified: bool) -> bool:
    """Whether a passing certificate covers the session; False (and a warning) where that is allowed.

    Raises:
        Refused: the bundle lacks the file, or nothing covers it; the message has the command that helps.
    """
    try:
        bundle.model_record(spec.precision)
    except NotCertified as error:
        raise Refused(str(error)) from error
    try:
        bundle.certificate_covering(spec)
    except NotCertified as error:
        if not allow_uncertified:
            raise Refused(str(error)) from error
        log.warning("running uncertified (--allow-uncertified): %s", error)
        return False
    return True
