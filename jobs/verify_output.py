"""`iab-vision verify`: proves that a predictions folder or a bundle is whole and unaltered.

Exit code 0 when every check passes, 1 when one fails, 2 when the path is neither.
"""

from jobs.config import VerifyConfig
from jobs.errors import checking_input


def run(config: VerifyConfig) -> int:
    from pipelines import bundle, storage

    with checking_input():
        folder = storage.open_storage(config.path)
        if folder.exists(bundle.MANIFEST_FILE):
            checks = bundle_checks(config.path)
        else:
            checks = predictions_checks(config.path)
    print_checks(checks)
    return 0 if all(passed for _, passed, _ in checks) else 1


def bundle_checks(uri: str) -> list[tuple[str, bool, str]]:
    """Opening a bundle verifies every hash; each certificate must speak of these very files."""
    from pipelines import bundle as bundles

    try:
        bundle = bundles.open_bundle(uri)
    except bundles.BundleDamaged as error:
        return [("hashes", False, str(error))]
    checks = [("hashes", True, f"{len(bundle.manifest.files)} files as the manifest says")]
    for certificate in bundle.certificates:
        try:
            bundle.certificate_for(certificate.provider, certificate.precision)
        except bundles.NotCertified as error:
            checks.append((certificate.name, False, str(error)))
        else:
            checks.append((certificate.name, True, "passed, and speaks of these files"))
    return checks


def predictions_checks(uri: str) -> list[tuple[str, bool, str]]:
    from pipelines.verification import verify

    return [(check.name, check.ok, check.detail) for check in verify(uri).checks]


def print_checks(checks: list[tuple[str, bool, str]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("check", "", "what was found")
    for name, passed, detail in checks:
        table.add_row(name, "[green]ok[/green]" if passed else "[red]FAILED[/red]", escape(detail))
    Console().print(table)
