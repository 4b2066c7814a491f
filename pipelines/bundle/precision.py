"""Which precision of a bundle is fastest here among those whose measured loss of accuracy is acceptable."""

from dataclasses import dataclass, replace

from pipelines.bundle.bundle import Bundle
from pipelines.bundle.manifest import Certificate, NotCertified
from pipelines.bundle.settings import RuntimeSpec
from pipelines.specs import Precision, Provider

FASTEST_FIRST: dict[Provider, tuple[Precision, ...]] = {"cpu": ("int8", "fp32"), "cuda": ("fp16", "fp32")}
"""int8 ran 1.6 to 2.7 times as fast as fp32 on CPUs with VNNI (BENCHMARKS.md); fp16 is no gain on a CPU."""


@dataclass(frozen=True)
class Choice:
    """A precision, and why it and no faster one."""

    precision: Precision
    reason: str


def choose_precision(bundle: Bundle, runtime: RuntimeSpec, *, max_accuracy_loss: float) -> Choice:
    """The fastest precision that a certificate covers here and that loses at most so much accuracy.

    Only a certificate of labelled images says what a precision loses. fp32 is the answer where no other
    qualifies; whether it is certified is for the caller to check.

    Args:
        runtime: the session but for its precision.
        max_accuracy_loss: largest loss of top-1 accuracy against the trained model, as a fraction of images.
    """
    rejected = []
    *faster, last = FASTEST_FIRST[runtime.provider]
    for precision in faster:
        try:
            bundle.model_record(precision)
            loss = _accuracy_loss(bundle.certificate_covering(replace(runtime, precision=precision)))
        except NotCertified:
            rejected.append(f"{precision} has no certificate for this machine")
            continue
        if loss is None:
            rejected.append(f"the certificate of {precision} compares no labelled images")
        elif loss > max_accuracy_loss:
            rejected.append(f"{precision} loses {loss:.2%} of accuracy, the limit is {max_accuracy_loss:.2%}")
        else:
            return Choice(
                precision, f"it loses {max(loss, 0):.2%} of accuracy, within {max_accuracy_loss:.2%}"
            )
    return Choice(last, "; ".join(rejected))


def _accuracy_loss(certificate: Certificate) -> float | None:
    labelled = certificate.content.get("metrics", {}).get("labelled")
    if not labelled:
        return None
    accuracy = labelled["accuracy"]
    return float(accuracy["reference"] - accuracy["candidate"])
