"""`iab-vision certify`: adds the certificate of this machine's provider to an existing bundle.

    iab-vision certify BUNDLE --images photos --provider cuda --precisions fp16

On a GPU node this makes what a CPU node exported runnable there. Exit code 3 when a precision differs too
much; its certificate then says so, and classify does not run it. What is compared with is the bundle's own
float32 model on CPU; that one itself can only be certified against its run: `--checkpoint RUN`.
"""

from pydantic import Field
from pydantic_settings import CliPositionalArg

from export.settings import ParitySettings
from jobs.errors import checking_input
from jobs.settings import JobConfig, flags_of
from pipelines.datasets.settings import DataSettings
from pipelines.messages import redact
from pipelines.specs import Precision, Provider


class CertifyConfig(
    flags_of(DataSettings, "label_map", "columns"),  # type: ignore[misc]
    JobConfig,
):
    """Measure an existing bundle on a provider of this machine and add the certificate to it."""

    bundle: CliPositionalArg[str]
    """Bundle made by `iab-vision export`."""
    images: str
    """Images to measure on: a labelled dataset, a table of URIs, or a folder."""
    provider: Provider = "cpu"
    """Execution provider to certify."""
    precisions: list[Precision] = Field(default=["fp32"])
    """Precisions to certify."""
    checkpoint: str | None = None
    """What the bundle was exported from, to compare with; without it the bundle's own fp32 model on cpu."""
    parity: ParitySettings = ParitySettings()
    """How parity is measured; nothing is calibrated, so calibration_images is for `export` alone."""


def run(config: CertifyConfig) -> int:
    from export import release, report
    from export.images import OwnImages

    columns = config.columns if "columns" in config.model_fields_set else None
    source = OwnImages(config.images, columns, config.label_map)
    with checking_input():
        certificates = release.certify(
            config.bundle,
            source,
            provider=config.provider,
            precisions=config.precisions,
            settings=config.parity,
            checkpoint_uri=config.checkpoint,
        )
    for (provider, precision), document in certificates.items():
        print(report.one_line(provider, precision, document))
    print(f"report: {redact(config.bundle.rstrip('/'))}/certificates/{config.provider}.html")
    return 0
