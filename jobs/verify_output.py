"""`iab-vision verify`: proves that a predictions folder, a table of nights or a bundle is whole.

Exit code 0 when every check passes, 1 when one fails, 2 when the path is neither.
"""

from typing import TYPE_CHECKING

from pydantic import Field
from pydantic_settings import CliPositionalArg

from jobs.errors import checking_input
from jobs.settings import JobConfig
from pipelines.fetch.settings import FetchLimits

if TYPE_CHECKING:
    from pipelines.ledger.verify import Check


class VerifyConfig(JobConfig):
    """Prove that a predictions folder, a table of nights or a bundle is whole and unaltered."""

    path: CliPositionalArg[str]
    """Folder written by `classify`, `nightly` or `export`."""
    sample: int = Field(default=0, ge=0)
    """Rows of the predictions, drawn at random, whose images are fetched again and compared by sha256."""
    fetch: FetchLimits = FetchLimits()
    """Limits of each request for them."""


def run(config: VerifyConfig) -> int:
    from pipelines.bundle.manifest import MANIFEST_FILE
    from pipelines.storage import storage

    with checking_input():
        folder = storage.open_storage(config.path)
        is_bundle = folder.exists(MANIFEST_FILE)
    checks = bundle_checks(config.path) if is_bundle else predictions_checks(folder.uri, config)
    print_checks(checks)
    return 0 if all(check.ok for check in checks) else 1


def bundle_checks(uri: str) -> "list[Check]":
    """Opening a bundle verifies every hash; each certificate must name the hashes of these files.

    The one of fp32 on cpu is written last and must be there: without it the bundle is only half exported.
    """
    from pipelines.bundle import bundle as bundles
    from pipelines.bundle import manifest
    from pipelines.ledger.verify import Check

    try:
        bundle = bundles.open_bundle(uri)
    except manifest.BundleDamaged as error:  # that is what was asked
        return [Check("hashes", False, str(error))]
    checks = [Check("hashes", True, f"{len(bundle.manifest.files)} files as the manifest says")]
    for provider, precision in {("cpu", "fp32"), *((c.provider, c.precision) for c in bundle.certificates)}:
        name = f"{manifest.CERTIFICATES}/{provider}-{precision}.json"
        try:
            bundle.certificate_for(provider, precision)
        except manifest.NotCertified as error:
            checks.append(Check(name, False, str(error)))
        else:
            checks.append(Check(name, True, "passed, for these files"))
    return sorted(checks, key=lambda check: check.name)


def predictions_checks(uri: str, config: VerifyConfig) -> "list[Check]":
    from pipelines.ledger.verify import verify
    from pipelines.nights.verify import is_table, verify_nights

    if is_table(uri):
        return verify_nights(uri)
    checks = verify(uri)
    if config.sample and all(check.ok for check in checks):
        from pipelines.classify.sources import check_sources

        checks.append(check_sources(uri, config.sample, config.fetch))
    return checks


def print_checks(checks: "list[Check]") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from pipelines.ledger.verify import UNCHECKED

    table = Table("check", "", "what was found")
    for check in checks:
        verdict = "[green]ok[/green]" if check.ok else "[red]FAILED[/red]"
        verdict = "not checked" if check.detail == UNCHECKED else verdict
        table.add_row(check.name, verdict, Text(check.detail))
    Console().print(table)
