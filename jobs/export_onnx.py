"""`iab-vision export`: turns a trained checkpoint into a certified ONNX bundle.

    iab-vision export --checkpoint RUN --images photos --output BUNDLE --precisions fp32,int8

Two cores: ViT-tiny at 64 pixels with int8 in under a minute, ViT-base at 224 in float32 under three.
Prints one line per precision and the bundle's model id. Exit code 3, and no bundle, when a precision
differs too much from the checkpoint; the report is then at OUTPUT-refused.
"""

from pydantic import Field

from export.settings import ParitySettings
from jobs.errors import checking_input
from jobs.settings import Folder, JobConfig, flags_of
from pipelines.datasets.settings import DataSettings
from pipelines.messages import redact
from pipelines.specs import Precision


class ExportConfig(
    flags_of(DataSettings, "label_map", "columns"),  # type: ignore[misc]
    JobConfig,
):
    """Turn a checkpoint into an ONNX bundle; exit code 3 and no bundle when it differs from it."""

    checkpoint: str
    """Run folder of `train`, its `best/`, or any Hugging Face image classifier in safetensors."""
    images: str
    """Images to measure on: a labelled dataset (its held-out rows are used), a table of URIs, or a folder."""
    output: Folder
    """Folder for the bundle; must not exist."""
    precisions: list[Precision] = Field(default=["fp32"])
    """`fp32`, `fp16` (for GPU) and `int8` (for CPU); fp32 is always made."""
    parity: ParitySettings = ParitySettings()
    """How parity is measured."""


def run(config: ExportConfig) -> int:
    from export import release, report
    from export.images import OwnImages
    from pipelines.bundle import categories

    columns = config.columns if "columns" in config.model_fields_set else None
    source = OwnImages(config.images, columns, config.label_map)
    with checking_input():
        bundle = release.export(
            config.checkpoint,
            source,
            config.output,
            precisions=config.precisions,
            settings=config.parity,
        )
    for certificate in bundle.certificates:
        print(report.one_line(certificate.provider, certificate.precision, certificate.content))
    spec = bundle.spec
    listed = categories.list_categories(bundle.taxonomy(), spec.class_ids, spec.thresholds)
    print(f"published at the thresholds: {categories.count_published(listed)}")
    output = redact(config.output.rstrip("/"))
    print(f"bundle {output}, model {bundle.model_id}; report: {output}/certificates/cpu.html")
    print(f"next: iab-vision classify --inventory IMAGES --bundle {output} --output PREDICTIONS")
    return 0
