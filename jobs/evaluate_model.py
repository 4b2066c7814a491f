"""`iab-vision evaluate`: a bundle or a trained run on labelled images: every number, and a page to look at.

    iab-vision evaluate --bundle bundle --dataset photos/labels.csv --output evaluation
    iab-vision evaluate --checkpoint run --dataset photos/labels.csv --output evaluation

One process, no cluster: decoding threads around one model. 1,750 photos through a small ViT take less than
a minute on 2 cores. A bundle is measured as it is served (ONNX Runtime, its own precision); a run as it was
trained (PyTorch, float32, CPU), with its learning curves and attention maps.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from jobs.config import EvaluateConfig
from jobs.errors import checking_input
from pipelines.machine import cores
from pipelines.messages import InputError, JobFailed

log = logging.getLogger(__name__)

OF_A_BUNDLE = {"precision", "provider", "batch_size", "allow_uncertified"}
"""Settings without a meaning for a checkpoint."""


@dataclass(frozen=True)
class Subject:
    """The model that is judged, whatever it is stored as."""

    name: str
    class_ids: tuple[str, ...]
    taxonomy: Any
    taxonomy_reference: str
    """What `taxonomy.load` finds it by; `labels` for flat ones."""
    image_spec: Any
    thresholds: Any
    multi_label: bool
    run: Any
    """`examination.Run`."""
    proof: str = "none needed: the checkpoint itself"
    """What the report says of its certificate."""
    network: Any = None
    """The PyTorch model, where there is one."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """Lines of its metrics.jsonl."""


def run(config: EvaluateConfig) -> int:
    """Measure, write `report.html` and `evaluation.json`, and say the most important numbers."""
    from pipelines.training.model_card import HEADLINES

    if (config.bundle is None) == (config.checkpoint is None):
        raise InputError("give either --bundle or --checkpoint")
    if config.checkpoint is not None and (given := sorted(OF_A_BUNDLE & config.model_fields_set)):
        raise InputError(
            f"{', '.join(given)}: a checkpoint is judged in PyTorch, float32, on the CPU; these settings "
            "are a bundle's (--bundle)"
        )
    with subject(config) as judged:
        evaluation = examine(config, judged)
    numbers = [f"{name} {evaluation.overall[name]:.4f}" for name in HEADLINES if name in evaluation.overall]
    log.info("%d images: %s", evaluation.n_images, ", ".join(numbers))
    log.info("report: %s", config.output.rstrip("/") + "/report.html")
    return 0


def examine(config: EvaluateConfig, judged: Subject) -> Any:
    """Ask, measure, illustrate, write; returns the `Evaluation`."""
    from pipelines.evaluation import score
    from pipelines.evaluation.evaluation import evaluate
    from pipelines.evaluation.gallery import gallery
    from pipelines.evaluation.report import write_report

    with checking_input():
        known = splits_of_run(config)
        data = labelled(config, judged).divided_as(known or {})
        asked = score.questions(
            data, config.split, judged.class_ids, judged.taxonomy, multi_label=judged.multi_label
        )
    seen = score.seen_in_training(data, config.split, known)
    if seen.suspect:
        log.warning(
            "the model may be flattered; training images among those asked about: %s. Give --run RUN, which "
            "made the model, or ask --split all about images that it has never seen",
            seen.words,
        )
    for label, images in asked.uncovered.items():
        log.warning("no class of the model covers %s (%d images)", label, images)
    try:
        answers = score.answered(
            asked, judged.run, judged.class_ids, judged.image_spec, threads=config.threads or cores()
        )
    except score.NothingToExamine as error:
        raise JobFailed(str(error)) from error
    for image in answers.broken[:20]:
        log.warning("left out %s: %s %s", image["uri"], image["status"], image["error"])
    about = {
        "model": judged.name,
        "dataset": config.dataset,
        "split": config.split,
        "seen in training": seen.words,
        "taxonomy": judged.taxonomy.name,
        "unreadable images": str(len(answers.broken)),
        "certificate": judged.proof,
    }
    found = evaluate(answers.scored, judged.taxonomy, thresholds=judged.thresholds, about=about)
    shown = gallery(
        answers.scored, judged.taxonomy, answers.images, judged.image_spec, network=judged.network
    )
    counts = class_counts(data) if config.split != "all" else {}
    write_report(found, config.output, replace(shown, history=judged.history, class_counts=counts))
    return found


def labelled(config: EvaluateConfig, judged: Subject) -> Any:
    """The dataset, in the model's taxonomy; asked about as a whole, its split column means nothing."""
    from pipelines.datasets import dataset
    from pipelines.datasets.settings import DataSettings

    columns = config.columns
    return dataset.load(
        DataSettings(
            config.dataset,
            judged.taxonomy_reference,
            label_map=config.label_map,
            tier=config.tier,
            columns=replace(columns, split="") if config.split == "all" else columns,
            splits=config.splits,
        )
    )


def splits_of_run(config: EvaluateConfig) -> dict[str, str] | None:
    """Recorded URI -> split, where the run that made the model is known and recorded them."""
    from pipelines.training import runs

    if config.run is None:
        return None if config.checkpoint is None else runs.recorded_splits(run_folder(config.checkpoint))
    known = runs.recorded_splits(config.run)
    if known is None:
        raise InputError(f"--run {config.run} holds no {runs.SPLITS}; give the folder of a run of `train`")
    return known


def run_folder(checkpoint: str) -> str:
    """The run of a checkpoint given as the run itself or its `best/`."""
    return checkpoint.rstrip("/").removesuffix("/best")


def class_counts(data: Any) -> dict[str, dict[str, int]]:
    """Images of each label in each split that the dataset has."""
    return {
        split: dict(zip(data.classes, data.class_counts(data.indices(split)).tolist(), strict=True))
        for split in ("train", "validation", "test")
        if len(data.indices(split))
    }


@contextmanager
def subject(config: EvaluateConfig) -> Iterator[Subject]:
    """The bundle or the run that the settings name."""
    with ExitStack() as stack:
        with checking_input():
            if config.bundle is not None:
                judged = bundle_subject(config, config.bundle)
            else:
                from export import checkpoint as checkpoints

                found = stack.enter_context(checkpoints.opened(config.checkpoint or ""))
                judged = checkpoint_subject(found, config.checkpoint or "")
        yield judged


def bundle_subject(config: EvaluateConfig, uri: str) -> Subject:
    """The bundle's ONNX model, in the session that classify would use."""
    from jobs.certificate_gate import require_certificate
    from pipelines.bundle import bundle as bundles
    from pipelines.bundle import session
    from pipelines.messages import redact
    from pipelines.specs import RuntimeSpec
    from pipelines.storage import uris

    bundle = bundles.open_bundle(uri)
    spec = RuntimeSpec(
        provider=config.provider,
        precision=config.precision,
        batch_size=config.batch_size,
        threads=config.threads or cores(),
    )
    certified = require_certificate(bundle, spec, allow_uncertified=config.allow_uncertified)
    own_table = uris.join(uri, bundles.TAXONOMY_FILE)
    return Subject(
        name=f"{redact(uri)} ({bundle.model_id}, {config.precision} on {config.provider})",
        class_ids=tuple(bundle.class_ids),
        taxonomy=bundle.taxonomy(),
        taxonomy_reference=own_table
        if bundles.TAXONOMY_FILE in bundle.manifest.files
        else bundle.taxonomy_name,
        image_spec=bundle.image_spec,
        thresholds=bundle.thresholds,
        multi_label=bundle.multi_label,
        run=session.load(bundle, spec).run,
        proof="covers it" if certified else "NONE (--allow-uncertified)",
    )


def checkpoint_subject(found: Any, uri: str) -> Subject:
    """The checkpoint's PyTorch model, with the run that it came from where there is one."""
    import torch

    from pipelines.datasets.normalize import normalize
    from pipelines.evaluation import metrics

    network = found.network("sdpa")

    def run(pixels_nhwc: Any) -> tuple[Any, Any]:
        with torch.inference_mode():
            inputs_nchw = normalize(torch.from_numpy(pixels_nhwc), found.image_spec)
            logits_nc = network(pixel_values=inputs_nchw).logits.numpy()
        scores_nc = metrics.probabilities(
            logits_nc, temperature=found.temperature, multi_label=found.multi_label
        )
        return logits_nc, scores_nc

    return Subject(
        name=f"{found.source} ({found.architecture})",
        class_ids=found.class_ids,
        taxonomy=found.taxonomy,
        taxonomy_reference=taxonomy_reference(found),
        image_spec=found.image_spec,
        thresholds=found.thresholds,
        multi_label=found.multi_label,
        run=run,
        network=network,
        history=history(run_folder(uri)),
    )


def taxonomy_reference(found: Any) -> str:
    """A built-in name, `labels`, or where training found the user's own table."""
    if found.taxonomy_table is None:
        return str(found.taxonomy.name)
    return str(json.loads((found.folder / "iab_vision.json").read_text())["taxonomy"])


def history(uri: str) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; none where the folder is not a run's."""
    from pipelines.storage import storage

    folder = storage.open_storage(uri)
    if not folder.exists("metrics.jsonl"):
        return []
    return [json.loads(line) for line in folder.read("metrics.jsonl").splitlines() if line.strip()]
