"""`--precision auto`: the fastest precision that a certificate shows to be good enough."""

import dataclasses
from pathlib import Path

import pytest

from pipelines.bundle.bundle import open_bundle
from pipelines.bundle.limits import LIMITS
from pipelines.bundle.precision import choose_precision
from pipelines.bundle.settings import RuntimeSpec
from tests.builders.models import PASSED, small_bundle

INT8 = {**PASSED, "limits": dataclasses.asdict(LIMITS["int8"])}


def measured(reference: float, candidate: float) -> dict[str, object]:
    """A certificate of labelled images with these accuracies."""
    accuracy = {"reference": reference, "candidate": candidate}
    return {**INT8, "metrics": {"labelled": {"accuracy": accuracy}}}


@pytest.mark.parametrize(
    ("int8", "chosen", "reason"),
    [
        (measured(0.610, 0.606), "int8", "loses 0.40% of accuracy, within 0.50%"),
        (measured(0.610, 0.614), "int8", "loses 0.00% of accuracy"),
        (measured(0.610, 0.600), "fp32", "int8 loses 1.00% of accuracy, the limit is 0.50%"),
        (INT8, "fp32", "the certificate of int8 compares no labelled images"),
        ({**INT8, "metrics": {"labelled": None}}, "fp32", "compares no labelled images"),
        (None, "fp32", "int8 has no certificate for this machine"),
        ({**measured(0.6, 0.6), "passed": False, "failures": ["x"]}, "fp32", "no certificate"),
    ],
)
def test_the_fastest_precision_within_the_limit_is_chosen(
    tmp_path: Path, int8: dict[str, object] | None, chosen: str, reason: str
) -> None:
    certificates = {("cpu", "fp32"): PASSED} | ({("cpu", "int8"): int8} if int8 else {})
    small_bundle(tmp_path / "b", certificates=certificates)
    bundle = open_bundle(str(tmp_path / "b"))
    choice = choose_precision(bundle, RuntimeSpec(), max_accuracy_loss=0.005)
    assert choice.precision == chosen
    assert reason in choice.reason


def test_batches_that_int8_was_not_measured_with_run_in_fp32(tmp_path: Path) -> None:
    certificates = {("cpu", "fp32"): PASSED, ("cpu", "int8"): measured(0.6, 0.6)}
    small_bundle(tmp_path / "b", certificates=certificates)
    bundle = open_bundle(str(tmp_path / "b"))
    choice = choose_precision(bundle, RuntimeSpec(batch_size=64), max_accuracy_loss=0.005)
    assert choice.precision == "fp32"
