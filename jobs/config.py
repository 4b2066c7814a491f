"""What the command lines of the long jobs may say; a short job's settings are next to it.

A config is unpacked at the border: nothing below `jobs` ever sees one. How they are read is `settings.py`'s.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field
from pydantic_settings import CliPositionalArg

from jobs.settings import Date, Folder, JobConfig, Location, field_of, flags_of, locate, refuse_file
from pipelines.classify.settings import ErrorBudget, Passes, Workers
from pipelines.datasets.settings import DataSettings, ImageCache
from pipelines.fetch.settings import FetchLimits
from pipelines.inventory.settings import InventoryOptions
from pipelines.ledger.driver import LEASE_S
from pipelines.nights.settings import ReportSettings
from pipelines.specs import DecodeLimits, Precision, Provider
from pipelines.training.recipe import Recipe, Search
from pipelines.training.resources import Resources


def locate_model(name: str) -> str:
    """`locate` for a folder that is there; anything else is a name on the hub or a preset."""
    return locate(name) if Path(name).is_dir() else name


DriftLevel = Literal["notice", "warning", "alarm"]


class RayConfig(JobConfig):
    """Settings of commands that run on a Ray cluster."""

    ray_address: str | None = None
    """Cluster to join (`auto`, `ray://…`); unset: the submitting cluster's, or one on this machine."""
    num_cpus: int | None = Field(default=None, ge=1)
    """Logical CPUs of a cluster started on this machine; unset: enough for every pool."""


class DatasetConfig(
    flags_of(DataSettings, "taxonomy", "label_map", "tier", "columns", "splits"),  # type: ignore[misc]
    RayConfig,
):
    """Settings of commands that read labelled images."""

    dataset: Location
    """Labelled images: folder `<label>/image.jpg`, table of files and labels, or Hugging Face Parquet."""
    label_map: Location | None = field_of(DataSettings, "label_map")
    cache: ImageCache = ImageCache()
    """How images are decoded and kept."""


class RecipeConfig(
    flags_of(Resources, "num_workers", "cpus_per_worker"),  # type: ignore[misc]
    flags_of(Recipe),  # type: ignore[misc]
    DatasetConfig,
):
    """Settings that make a training recipe; their defaults are the recipe's own."""

    model: Annotated[str, AfterValidator(locate_model)] = field_of(Recipe, "model")
    use_gpu: bool | None = None
    """Give each worker a GPU; unset: when the cluster has one for each."""


class TrainConfig(
    flags_of(Resources, "checkpoint_every_steps", "log_every_steps", "num_to_keep"),  # type: ignore[misc]
    RecipeConfig,
):
    """Fine-tune a Vision Transformer on labelled images; the same command continues an unfinished run."""

    output: Annotated[Location, AfterValidator(refuse_file)]
    """Folder of the run."""
    max_failures: int = field_of(Resources, "max_failures")
    trackers: list[Literal["mlflow", "wandb"]] = field_of(Resources, "trackers")
    push_to_hub: str | None = None
    """Private Hugging Face repository for the finished model; the hub's own environment holds the token."""


class TuneConfig(
    flags_of(Search, "trials", "grace_epochs", "reduction", "max_concurrent"),  # type: ignore[misc]
    RecipeConfig,
):
    """Search for a better recipe with short trainings; the same command continues an unfinished search."""

    output: Annotated[Location, AfterValidator(refuse_file)]
    """Folder for the trials, their table and plot, and `best.yaml`."""
    space: Location = str(Path(__file__).parent / "configs" / "tune_space.yaml")
    """YAML file that maps settings of the recipe to how they are drawn."""


class ClassificationConfig(
    flags_of(ErrorBudget),  # type: ignore[misc]
    flags_of(Passes),  # type: ignore[misc]
    flags_of(InventoryOptions),  # type: ignore[misc]
    RayConfig,
):
    """Settings of commands that classify an inventory."""

    engine: Literal["auto", "local", "ray"] = "auto"
    """`local` runs in this process; `ray` on a cluster. `auto` is `ray` where an address names a cluster."""
    inventory: str
    """Table of URIs (Parquet, CSV, JSON lines), folder or prefix of images, Parquet with bytes, or tars."""
    bundle: str
    """Bundle made by `iab-vision export`."""
    rename: dict[str, str] = field_of(InventoryOptions, "rename")
    top_k: int = Field(default=5, ge=1)
    """Labels kept per image."""
    precision: Literal["auto", "fp32", "fp16", "int8"] = "fp32"
    """Which file of the bundle runs; `auto`: the fastest whose certificate of labelled images covers this
    machine and shows a loss of accuracy within `max_accuracy_loss`."""
    max_accuracy_loss: float = Field(default=0.005, ge=0, le=1)
    """Largest loss of top-1 accuracy that `--precision auto` accepts, as a fraction of images."""
    provider: Provider = "cpu"
    """Execution provider; `cuda` puts one session on each GPU."""
    batch_size: int = Field(default=0, ge=0)
    """Most images per session run; 0 is 16 on CPU and 256 on GPU. The certificate must cover it."""
    threads_per_session: int = Field(default=1, ge=1)
    """CPU threads of each ONNX session."""
    allow_uncertified: bool = False
    """Run a precision and provider that no certificate covers; recorded in run.json and the report."""
    retry_failed: bool = False
    """Run the recorded rows that failed for passing reasons again, of a published table or a refused run."""
    commit_interval_s: float = Field(default=5.0, gt=0)
    """Time between ledger entries, seconds: what a dead driver may cost, and the unfinished parts."""
    lease_s: float = Field(default=LEASE_S, gt=0)
    """A driver on another machine that was silent for so long counts as dead, seconds."""
    take_over: bool = False
    """Replace a driver that is still at work on the output; it stops at its next ledger entry."""
    fetch: FetchLimits = FetchLimits()
    """Limits of each request."""
    decode: DecodeLimits = DecodeLimits()
    """Limits of each image."""
    workers: Workers = Workers()
    """Pools and grain of the work."""
    report_images: int = field_of(ReportSettings, "report_images")
    price_per_node_hour: float | None = field_of(ReportSettings, "price_per_node_hour")
    nodes: int = field_of(ReportSettings, "nodes")


class ClassifyConfig(ClassificationConfig):
    """Label every image of an inventory with a bundle, exactly once, into a Parquet table."""

    output: Folder
    """Folder for `table/` and `state/`; the same command on it again continues or does nothing."""


class NightlyConfig(ClassificationConfig):
    """Publish a date of a table: the whole inventory, of which only what changed is classified."""

    table: Folder
    """Folder for `images/run_date=DATE/` and `state/run_date=DATE/`."""
    date: Date
    """The night, `YYYY-MM-DD`, tomorrow (UTC) at the latest; a published one is not made again."""
    replace: bool = False
    """Publish the date again, as another generation: with another inventory or bundle, or after a refusal."""
    keep_failures: int = Field(default=7, ge=0)
    """Nights for which a failure that does not pass by itself (such as not_found) is carried over."""
    drift_by: tuple[str, ...] = field_of(ReportSettings, "drift_by")
    fail_on_drift: DriftLevel | None = None
    """Least drift of labels at which the command ends with exit code 3, after publishing."""
    hold_on_drift: DriftLevel | None = None
    """Least drift at which nothing is published and the exit code is 3; without the flag, it publishes."""


class CompareConfig(JobConfig):
    """Show which labels differ between two nights, two predictions or two bundles."""

    a: CliPositionalArg[str]
    """Night (`TABLE/images/run_date=DATE`), folder of `classify`, or bundle: the one in use."""
    b: CliPositionalArg[str]
    """Another of the same kind: the candidate."""
    output: Folder = "comparison"
    """Folder for `report.html` and `comparison.json`."""
    images: str | None = None
    """Images that bundles are compared on: table, folder or labelled dataset (its labels are the truth)."""
    sample: int = Field(default=500, ge=1)
    """Most of these images that bundles are run over."""
    max_flips: float | None = Field(default=None, ge=0, le=1)
    """Largest share of labels that may differ; beyond it the exit code is 3."""
    report_images: int = field_of(ReportSettings, "report_images")
    precision: Precision = "fp32"
    """Which file of the bundles runs."""
    top_k: int = Field(default=5, ge=1)
    """Labels per image of a bundle."""
    allow_uncertified: bool = False
    """Compare bundles that no certificate covers."""
    fetch: FetchLimits = FetchLimits()
    """Limits of each request."""


class PruneConfig(JobConfig):
    """Remove the oldest dates of a table of nights."""

    table: CliPositionalArg[str]
    """Folder written by `nightly`."""
    keep_days: int = Field(ge=1)
    """Days before the newest published date that are kept."""
    dry_run: bool = False
    """Say what would be removed, and remove nothing."""
