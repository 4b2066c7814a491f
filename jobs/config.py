"""One typed config per job: what its command line, environment and YAML file may say.

A config is unpacked at the border: nothing below `jobs` ever sees one. How they are read is `settings.py`'s.
"""

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, field_validator
from pydantic_settings import CliPositionalArg, SettingsConfigDict

from export.settings import ParitySettings
from jobs.settings import JobConfig, field_of, suggestion
from jobs.submit_settings import Entrypoint, leading_flags
from pipelines.classify.settings import Workers
from pipelines.datasets.settings import Columns, DataSettings, ImageCache, Splits
from pipelines.fetch.settings import FetchLimits
from pipelines.inventory.settings import InventoryOptions
from pipelines.ledger.driver import LEASE_S
from pipelines.nights.settings import ReportSettings
from pipelines.specs import DecodeLimits, Precision, Provider
from pipelines.status import Status
from pipelines.storage import uris
from pipelines.training import recipe
from pipelines.training.recipe import (
    Augment,
    ClassBalance,
    EarlyStopping,
    Finetune,
    Loss,
    Optimizer,
    Recipe,
    Search,
)
from pipelines.training.resources import Resources


def located(uri: str) -> str:
    """A local path made absolute, for Ray's workers have a working directory of their own; else the URI."""
    return str(uris.local_path(uri)) if uris.is_local(uri) else uri


def located_model(name: str) -> str:
    """`located` for a folder that is there; anything else is a name on the hub or a preset."""
    return located(name) if Path(name).is_dir() else name


DriftLevel = Literal["notice", "warning", "alarm"]
Location = Annotated[str, AfterValidator(located)]


class RayConfig(JobConfig):
    """Settings of commands that run on a Ray cluster."""

    ray_address: str | None = None
    """Cluster to join (`auto`, `ray://…`); unset: the submitting cluster's, or one on this machine."""
    num_cpus: int | None = Field(default=None, ge=1)
    """Logical CPUs of a cluster started on this machine; unset: enough for every pool."""


class DatasetConfig(RayConfig):
    """Settings of commands that read labelled images."""

    dataset: Location
    """Labelled images: folder `<label>/image.jpg`, table of files and labels, or Hugging Face Parquet."""
    taxonomy: str = field_of(DataSettings, "taxonomy")
    label_map: Location | None = field_of(DataSettings, "label_map")
    tier: int | None = field_of(DataSettings, "tier")
    columns: Columns = field_of(DataSettings, "columns")
    splits: Splits = field_of(DataSettings, "splits")
    cache: ImageCache = ImageCache()
    """How images are decoded and kept."""


class RecipeConfig(DatasetConfig):
    """Settings that make a training recipe; their defaults are the recipe's own."""

    model: Annotated[str, AfterValidator(located_model)] = field_of(Recipe, "model")
    image_size: int | None = field_of(Recipe, "image_size")
    patch_size: int | None = field_of(Recipe, "patch_size")
    layers: int | None = field_of(Recipe, "layers")
    epochs: int = field_of(Recipe, "epochs")
    max_steps: int = field_of(Recipe, "max_steps")
    max_time_s: float = field_of(Recipe, "max_time_s")
    evaluate_every_steps: int = field_of(Recipe, "evaluate_every_steps")
    batch_size: int = field_of(Recipe, "batch_size")
    seed: int = field_of(Recipe, "seed")
    precision: recipe.Precision = field_of(Recipe, "precision")
    metric_for_best_model: str = field_of(Recipe, "metric_for_best_model")
    target_precision: float = field_of(Recipe, "target_precision")
    threshold_goal: Literal["precision", "recall", "f1"] = field_of(Recipe, "threshold_goal")
    target_recall: float = field_of(Recipe, "target_recall")
    threshold_confidence: float = field_of(Recipe, "threshold_confidence")
    finetune: Finetune = field_of(Recipe, "finetune")
    optimizer: Optimizer = field_of(Recipe, "optimizer")
    loss: Loss = field_of(Recipe, "loss")
    class_balance: ClassBalance = field_of(Recipe, "class_balance")
    augment: Augment = field_of(Recipe, "augment")
    early_stopping: EarlyStopping = field_of(Recipe, "early_stopping")
    num_workers: int = field_of(Resources, "num_workers")
    use_gpu: bool | None = None
    """Give each worker a GPU; unset: when the cluster has one for each."""
    cpus_per_worker: float = field_of(Resources, "cpus_per_worker")


class TrainConfig(RecipeConfig):
    """Fine-tune a Vision Transformer on labelled images; the same command continues an unfinished run."""

    output: Location
    """Folder of the run."""
    checkpoint_every_steps: int = field_of(Resources, "checkpoint_every_steps")
    log_every_steps: int = field_of(Resources, "log_every_steps")
    num_to_keep: int = field_of(Resources, "num_to_keep")
    max_failures: int = field_of(Resources, "max_failures")
    trackers: list[Literal["mlflow", "wandb"]] = field_of(Resources, "trackers")
    push_to_hub: str | None = None
    """Private Hugging Face repository for the finished model; the hub's own environment holds the token."""


class CalibrateConfig(JobConfig):
    """Fit temperature and thresholds of a finished run again, without training."""

    run: CliPositionalArg[Location]
    """Folder of a finished run of `train`."""
    target_precision: float = field_of(Recipe, "target_precision")
    threshold_goal: Literal["precision", "recall", "f1"] = field_of(Recipe, "threshold_goal")
    target_recall: float = field_of(Recipe, "target_recall")
    threshold_confidence: float = field_of(Recipe, "threshold_confidence")


class TuneConfig(RecipeConfig):
    """Search for a better recipe with short trainings; the same command continues an unfinished search."""

    output: Location
    """Folder for the trials, their table and plot, and `best.yaml`."""
    space: Location = str(Path(__file__).parent / "configs" / "tune_space.yaml")
    """YAML file that maps settings of the recipe to how they are drawn."""
    trials: int = field_of(Search, "trials")
    grace_epochs: int = field_of(Search, "grace_epochs")
    reduction: int = field_of(Search, "reduction")
    max_concurrent: int = field_of(Search, "max_concurrent")


class ExportConfig(JobConfig):
    """Turn a checkpoint into an ONNX bundle; exit code 3 and no bundle when it differs from it."""

    checkpoint: str
    """Run folder of `train`, its `best/`, or any Hugging Face image classifier in safetensors."""
    images: str
    """Images to measure on: a labelled dataset (its held-out rows are used), a table of URIs, or a folder."""
    output: str
    """Folder for the bundle; must not exist."""
    precisions: list[Precision] = ["fp32"]
    """`fp32`, `fp16` (for GPU) and `int8` (for CPU); fp32 is always made."""
    parity: ParitySettings = ParitySettings()
    """How parity is measured."""


class CertifyConfig(JobConfig):
    """Measure an existing bundle on a provider of this machine and add the certificate to it."""

    bundle: CliPositionalArg[str]
    """Bundle made by `iab-vision export`."""
    images: str
    """Images to measure on: a labelled dataset, a table of URIs, or a folder."""
    provider: Provider = "cpu"
    """Execution provider to certify."""
    precisions: list[Precision] = ["fp32"]
    """Precisions to certify."""
    checkpoint: str | None = None
    """What the bundle was exported from, to compare with; without it the bundle's own fp32 model on cpu."""
    parity: ParitySettings = ParitySettings()
    """How parity is measured; nothing is calibrated, so calibration_images is for `export` alone."""


class ClassificationConfig(RayConfig):
    """Settings of commands that classify an inventory."""

    engine: Literal["auto", "local", "ray"] = "auto"
    """`local` runs in this process; `ray` on a cluster. `auto` is `ray` where an address names a cluster."""

    inventory: str
    """Table of URIs (Parquet, CSV, JSON lines), folder or prefix of images, Parquet with bytes, or tars."""
    bundle: str
    """Bundle made by `iab-vision export`."""
    inventory_type: Literal["auto", "table", "images", "tars"] = field_of(InventoryOptions, "inventory_type")
    all_files: bool = field_of(InventoryOptions, "all_files")
    rename: dict[str, str] = field_of(InventoryOptions, "rename")
    drop_columns: list[str] = field_of(InventoryOptions, "drop_columns")
    image_column: str = field_of(InventoryOptions, "image_column")
    keep_plan: bool = field_of(InventoryOptions, "keep_plan")
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
    max_error_rate: float = Field(default=0.5, ge=0, le=1)
    """Largest share of rows without a label that is still published."""
    max_error_rate_of: dict[str, float] = Field(default_factory=dict)
    """Largest share of rows with one status, `status=share`."""

    @field_validator("max_error_rate_of")
    @classmethod
    def _known_statuses(cls, shares: dict[str, float]) -> dict[str, float]:
        for status, share in shares.items():
            if status not in set(Status):
                raise ValueError(f"{status!r} is not a status{suggestion(status, list(Status))}")
            if not 0 <= share <= 1:
                raise ValueError(f"{status} is {share}; a share is between 0 and 1")
        return shares

    retry_passes: int = Field(default=2, ge=0)
    """Later passes over rows that failed for a passing reason, before they are recorded."""
    retry_pause_s: float = Field(default=10.0, ge=0)
    """Pause before each later pass, seconds."""
    outage_wait_s: float = Field(default=300.0, ge=0)
    """Longest wait before the last pass, while nearly everything fails or servers ask for it, seconds."""
    retry_failed: bool = False
    """Run the recorded rows that failed for passing reasons again, of a published table or a refused run."""
    commit_interval_s: float = Field(default=5.0, gt=0)
    """Time between ledger entries, seconds: what a dead driver may cost beside unfinished parts."""
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

    output: str
    """Folder for `table/` and `state/`; the same command on it again continues or does nothing."""


class NightlyConfig(ClassificationConfig):
    """Publish a date of a table: the whole inventory, of which only what changed is classified."""

    table: str
    """Folder for `images/run_date=DATE/` and `state/run_date=DATE/`."""
    date: datetime.date
    """The night, `YYYY-MM-DD`; a published one is not made again."""
    replace: bool = False
    """Publish the date again, as another generation: with another inventory or bundle."""
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
    output: str = "comparison"
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


class PredictConfig(JobConfig):
    """Label a few images in this process, without a cluster."""

    model_config = SettingsConfigDict(cli_shortcuts={"as-json": "json"})

    images: CliPositionalArg[list[str]]
    """Image files or URLs."""
    bundle: str
    """Bundle made by `iab-vision export`."""
    top_k: int = Field(default=5, ge=1)
    """Labels per image."""
    precision: Precision = "fp32"
    """Which file of the bundle runs."""
    as_json: bool = False
    """Print one JSON object per image instead of a table."""
    allow_uncertified: bool = False
    """Run a precision that no certificate covers; every row of `--json` says so."""
    fetch: FetchLimits = FetchLimits()
    """Limits of each request."""


class EvaluateConfig(JobConfig):
    """Measure a bundle or a trained run on labelled images, in this process."""

    bundle: str | None = None
    """Bundle made by `iab-vision export`; or give `checkpoint`."""
    checkpoint: str | None = None
    """Run made by `iab-vision train`, or any Hugging Face image classifier's folder; or give `bundle`."""
    dataset: str | None = None
    """Labelled images: folder `<label>/image.jpg`, table of files and labels, or Hugging Face Parquet; unset:
    those that the model's run had."""
    output: str
    """Folder for `report.html`, `evaluation.json` and `evaluation.parquet`."""
    run: str | None = None
    """Run that made the bundle: its recorded splits hold for the images it knows; unset: `checkpoint`."""
    split: Literal["test", "validation", "train", "all"] = "test"
    """Which images are asked about; `all` for a dataset that no model was trained on."""
    label_map: str | None = None
    """Table whose first two columns rename labels; an empty target drops the image."""
    tier: int | None = Field(default=None, ge=1)
    """Lift every label to its ancestor of this tier."""
    columns: Columns = Columns()
    """Which columns of a table mean what."""
    splits: Splits = Splits()
    """How images are divided when neither the run nor the dataset says."""
    precision: Precision = "fp32"
    """Which file of the bundle runs."""
    provider: Provider = "cpu"
    """Execution provider of the bundle."""
    batch_size: int = Field(default=0, ge=0)
    """Most images per session run of the bundle; 0 is 16 on CPU and 256 on GPU."""
    threads: int = Field(default=0, ge=0)
    """Decoding threads and CPU threads of the model; 0 is one per core."""
    allow_uncertified: bool = False
    """Judge a precision and provider that no certificate covers; the report says so."""


class InspectConfig(JobConfig):
    """Look at a labelled dataset before training: counts, pictures, unreadable images, duplicates."""

    dataset: CliPositionalArg[str]
    """Labelled images: folder `<label>/image.jpg`, table of files and labels, or Hugging Face Parquet."""
    output: str = "inspection"
    """Folder for `inspection.html` and `inspection.json`."""
    taxonomy: str = field_of(DataSettings, "taxonomy")
    label_map: str | None = field_of(DataSettings, "label_map")
    tier: int | None = field_of(DataSettings, "tier")
    columns: Columns = field_of(DataSettings, "columns")
    splits: Splits = field_of(DataSettings, "splits")
    max_distance: int = Field(default=4, ge=0, le=16)
    """Bits of 64 in which the perceptual hashes of two copies of a picture may differ."""
    threads: int = Field(default=0, ge=0)
    """Threads that fetch and decode; 0 is one per core."""


class TaxonomyConfig(JobConfig):
    """List a taxonomy, or search it."""

    words: CliPositionalArg[list[str]] = Field(default_factory=list)
    """Words that a category's id or path must hold; none lists all."""
    taxonomy: str = field_of(DataSettings, "taxonomy")


class SubmitConfig(JobConfig):
    """Run a command as a job of a Ray cluster: `submit [settings] COMMAND …`; or status, logs, stop."""

    job: CliPositionalArg[list[str]]
    """The command and its settings; or `status`, `logs`, `stop` and a submission id."""
    address: str | None = None
    """Job server, as http://HOST:8265; unset: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, this machine's."""
    working_dir: str | None = None
    """Folder sent along with the job (or a zip's URI); unset: what is installed on the cluster runs."""
    env: dict[str, str] = Field(default_factory=dict)
    """Environment of the job and its workers."""
    entrypoint: Entrypoint = Entrypoint()
    """What the job's driver needs."""
    detach: bool = False
    """Return once the job is submitted."""
    again: bool = False
    """Start the job also when it succeeded before."""
    headers: dict[str, str] = Field(default_factory=dict)
    """Headers of every request, for a proxy in front of the cluster."""
    ca_file: str | None = None
    """Certificates to check the server's TLS certificate with; unset: the system's."""
    insecure: bool = False
    """Do not check the server's TLS certificate."""
    reconnect_s: float = Field(default=300, ge=0)
    """How long a job server that does not answer is asked again, seconds."""

    @classmethod
    def parse(cls, argv: Sequence[str], *, command: str) -> Self:
        """Settings before the submitted command are submit's own, all after it the command's."""
        own = leading_flags(argv)
        return super().parse([*argv[:own], *(["--", *argv[own:]] if argv[own:] else [])], command=command)


class VerifyConfig(JobConfig):
    """Prove that a predictions folder, a table of nights or a bundle is whole and unaltered."""

    path: CliPositionalArg[str]
    """Folder written by `classify`, `nightly` or `export`."""
    sample: int = Field(default=0, ge=0)
    """Rows of the predictions, drawn at random, whose images are fetched again and compared by sha256."""
    fetch: FetchLimits = FetchLimits()
    """Limits of each request for them."""


class DemoConfig(JobConfig):
    """Draw pictures, train, export, classify and verify, all on this machine."""

    output: str = "demo-output"
    """Folder for the demo's dataset, run, bundle and predictions; a second run starts afresh."""
