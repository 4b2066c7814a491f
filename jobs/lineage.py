"""What a finished job read and wrote, as an OpenLineage event: JSON next to its report, and to a server.

The form is https://openlineage.io/spec/2-0-2/OpenLineage.json. The same result keeps its run id, so a server
that is told twice has one run.
"""

import json
import logging
import os
import urllib.request
import uuid
from collections.abc import Sequence
from datetime import UTC, date, datetime
from importlib import metadata
from typing import Any
from urllib.parse import urlsplit

from pipelines.classify.run import Run
from pipelines.ledger.verify import REPORT_JSON
from pipelines.messages import redact
from pipelines.storage.uris import is_local

EVENT_JSON = "openlineage.json"
SPEC = "https://openlineage.io/spec"
PRODUCER = "https://pypi.org/project/iab-vision"
SERVER = "OPENLINEAGE_URL"
"""OpenLineage's own variable: the server that is told as well."""
TIMEOUT_S = 10

log = logging.getLogger(__name__)


def write_event(run: Run, job: str, *, inputs: Sequence[str], run_date: date | None = None) -> None:
    """Write the event of a published table; a server that does not take it is only warned about."""
    event = build_event(run, job, inputs, run_date)
    text = json.dumps(event, indent=1).encode()
    run.state.put(EVENT_JSON, text)
    if server := os.environ.get(SERVER):
        request = urllib.request.Request(  # noqa: S310 - the user's own server
            f"{server.rstrip('/')}/api/v1/lineage", text, {"Content-Type": "application/json"}
        )
        try:
            urllib.request.urlopen(request, timeout=TIMEOUT_S).close()  # noqa: S310
        except OSError as error:
            log.warning("%s was not told of this run: %s", redact(server), error)


def build_event(run: Run, job: str, inputs: Sequence[str], run_date: date | None) -> dict[str, Any]:
    """The event: which job, what it read, what it wrote and how much of it."""
    report = json.loads(run.state.read(REPORT_JSON))
    statistics = {"rowCount": report["rows"], "fileCount": len(run.ledger.state.files)}
    output = describe_dataset(run.table.uri) | {
        "outputFacets": {"outputStatistics": facet("1-0-2/OutputStatisticsOutputDatasetFacet", statistics)}
    }
    result = f"{run.table.uri} {run.plan.hash} {report['generation']}"
    nominal = {"nominalStartTime": f"{run_date}T00:00:00Z"} if run_date else None
    return {
        "eventType": "COMPLETE",
        "eventTime": datetime.now(UTC).isoformat(),
        "producer": PRODUCER,
        "schemaURL": f"{SPEC}/2-0-2/OpenLineage.json#/$defs/RunEvent",
        "run": {
            "runId": str(uuid.uuid5(uuid.NAMESPACE_URL, result)),
            "facets": {"nominalTime": facet("1-0-1/NominalTimeRunFacet", nominal)} if nominal else {},
        },
        "job": {"namespace": "iab-vision", "name": job, "facets": {}},
        "inputs": [describe_dataset(uri) for uri in inputs],
        "outputs": [output],
    }


def describe_dataset(uri: str) -> dict[str, Any]:
    """A location by OpenLineage's names: the store, and the path in it."""
    clean = redact(uri)
    if is_local(clean):
        return {"namespace": "file", "name": clean.removeprefix("file://")}
    parts = urlsplit(clean)
    return {"namespace": f"{parts.scheme}://{parts.netloc}", "name": parts.path.lstrip("/") or "/"}


def facet(schema: str, content: dict[str, Any]) -> dict[str, Any]:
    """A facet with the fields that each must have."""
    name = schema.partition("/")[2]
    url = f"{SPEC}/facets/{schema}.json#/$defs/{name}"
    return {"_producer": f"{PRODUCER}/{metadata.version('iab-vision')}", "_schemaURL": url, **content}
