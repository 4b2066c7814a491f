"""What a report shows, and what the machines cost."""

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt

from pipelines.specs import validated


@validated
class ReportSettings:
    """What the page of a run or a night shows."""

    report_images: NonNegativeInt = 36
    """Pictures on the page `report.html`; 0 fetches none."""
    price_per_node_hour: NonNegativeFloat | None = None
    """What one machine costs an hour, in any currency; the page says what a million rows cost."""
    nodes: PositiveInt = 1
    """Machines that the run has."""
    drift_by: tuple[str, ...] = ()
    """Carried columns by whose values drift is looked for too, such as the publisher."""
