"""The statuses are documented where users read about them."""

from pathlib import Path

from pipelines.status import TRANSIENT, Status

DOCUMENT = Path(__file__).parents[1] / "docs" / "statuses.md"


def test_the_document_lists_every_status_with_its_meaning() -> None:
    written = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("| `")]
    assert written == [
        f"| `{status}` | {status.meaning} | {'yes' if status in TRANSIENT else ''} |" for status in Status
    ]
