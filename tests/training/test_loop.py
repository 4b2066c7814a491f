"""The training loop: how a batch is cut does not matter, resumes are exact, runs survive kills."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray.train
import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForImageClassification, ResNetConfig, ResNetForImageClassification

from pipelines.datasets import dataset
from pipelines.datasets import pixels as ingest
from pipelines.datasets.settings import DataSettings, ImageCache, Splits
from pipelines.evaluation import metrics
from pipelines.messages import InputError, JobFailed
from pipelines.specs import ImageSpec
from pipelines.storage import uris
from pipelines.training import checkpoints, decoded, fit, loop, runs, validation
from pipelines.training.batches import prefetch
from pipelines.training.decoded import epoch_order
from pipelines.training.loop import Diverged, Trainer
from pipelines.training.optimizer import build_ema, fits_in_memory, learning_rate_factor
from pipelines.training.recipe import Augment, ClassBalance, EarlyStopping, Finetune, Loss, Optimizer, Recipe
from pipelines.training.resources import Resources, threads_of
from pipelines.training.task import Worker
from pipelines.training.tracking import Tracker
from pipelines.training.validation import compute_logits
from tests.builders import training as small_training
from tests.builders.training import RECIPE, STILL, drawn, image_folder, streaming, trained, trainer

ROOT = Path(__file__).parents[2]
LABELS = [[i % 3] for i in range(64)]
SEVERAL = [[j for j in range(4) if (i * 7 + 3) >> j & 1] for i in range(64)]
MIXED = Augment(repeats=1, mixup=0.5, cutmix=1.0, brightness=0.3, erasing=0.3)


def logits_of(made, batches):
    return compute_logits(made.model, batches, made.task, precision=made.precision)


def first_step_gradients(recipe, labels, *, workers=1, **keywords):
    """Gradients of the first step, averaged over the workers as DistributedDataParallel does."""
    sums = None
    for rank in range(workers):
        made = trainer(recipe, labels, worker=Worker(rank, workers, torch.device("cpu")), **keywords)
        _, micro_batches = next(made.batches.iter_steps(0, 0))
        made.accumulate(micro_batches, seed=1)
        gradients = [p.grad / workers for p in made.model.parameters()]
        sums = gradients if sums is None else [a + b for a, b in zip(sums, gradients, strict=True)]
    return torch.cat([g.flatten() for g in sums])


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize(("workers", "accumulation"), [(2, 1), (2, 2), (1, 4)])
def test_gradients_do_not_depend_on_how_the_global_batch_is_cut(workers, accumulation, multi_label):
    balance = ClassBalance(class_weights="sqrt")
    whole = replace(RECIPE, batch_size=64, augment=MIXED, class_balance=balance)
    cut = replace(whole, optimizer=replace(whole.optimizer, gradient_accumulation_steps=accumulation))
    labels = SEVERAL if multi_label else LABELS
    keywords = {"n_classes": 4 if multi_label else 3, "multi_label": multi_label}
    expected = first_step_gradients(whole, labels, **keywords)
    found = first_step_gradients(cut, labels, workers=workers, **keywords)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("multi_label", [False, True])
def test_a_batch_that_does_not_fit_into_memory_goes_in_pieces_with_the_same_gradients(
    monkeypatch, multi_label
):
    recipe, labels = replace(RECIPE, augment=MIXED), SEVERAL[:16] if multi_label else LABELS[:16]
    whole, cut = (trainer(recipe, labels, n_classes=4, multi_label=multi_label) for _ in range(2))
    forward = cut.model.forward

    def short_of_memory(pixel_values):
        if len(pixel_values) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(pixel_values=pixel_values)

    monkeypatch.setattr(cut.model, "forward", short_of_memory)
    cut.pieces = cut.find_pieces()
    assert cut.pieces == 4
    losses = []
    for made in (whole, cut):
        _, micro_batches = next(made.batches.iter_steps(0, 0))
        losses.append(made.accumulate(micro_batches, seed=1))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for one, other in zip(whole.model.parameters(), cut.model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-6)


def test_a_model_too_large_for_a_single_image_is_said_to_be(monkeypatch):
    made = trainer(RECIPE, [[i % 3] for i in range(16)])
    monkeypatch.setattr(loop, "fits_in_memory", lambda *_, **__: False)
    with pytest.raises(JobFailed, match="one image does not fit"):
        made.find_pieces()


def test_trying_what_fits_leaves_running_statistics_and_gradients_alone():
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=3
    )
    model = ResNetForImageClassification(config).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert fits_in_memory(model, 4, ImageSpec(height=32, width=32), precision="fp32")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_next_step_is_read_while_one_is_trained_on():
    read, asked = [], threading.Event()

    def steps():
        for number in range(3):
            read.append(number)
            if number == 1:
                asked.set()
            yield number, []

    seen = prefetch(steps(), pin=False)
    assert next(seen) == (0, [])
    assert asked.wait(60), "the second step is read before it is asked for"
    assert [number for number, _ in seen] == [1, 2] and read == [0, 1, 2]


def test_images_lost_since_the_first_pass_are_counted_and_not_trained_on():
    made = streaming(RECIPE, drawn(LABELS, lost=[0, 17, 18]))
    batches = [pixels for _, micro_batches in made.batches.iter_steps(0, 0) for pixels, _ in micro_batches]
    assert len(batches) == 4 and all(len(pixels) == 16 for pixels in batches)
    assert all(pixels.any(axis=(1, 2, 3)).all() for pixels in batches), "a black picture in their place"
    assert (made.batches.tally.images, made.batches.tally.unreadable) == (64, 3)
    assert made.count_unreadable() == {"unreadable_images": 3}
    made.task = replace(made.task, max_unreadable_fraction=0.04)
    with pytest.raises(JobFailed, match=r"3 of 64.*max-unreadable-fraction"):
        made.count_unreadable()


def test_a_batch_of_lost_images_keeps_workers_in_step():
    for lost in (range(16), range(16, 32), range(48, 64)):
        made = streaming(RECIPE, drawn(LABELS, lost=lost))
        batches = [pixels for _, [(pixels, _)] in made.batches.iter_steps(0, 0)]
        assert len(batches) == 4 and all(pixels.any(axis=(1, 2, 3)).all() for pixels in batches)
    made = streaming(RECIPE, drawn(LABELS, lost=range(64)))
    with pytest.raises(JobFailed, match="none of the 64 images"):
        next(made.batches.iter_steps(0, 0))


def test_a_shard_smaller_than_a_micro_batch_fills_it():
    made = streaming(RECIPE, drawn(LABELS[:5]))
    [(_, [(pixels, targets)])] = made.batches.iter_steps(0, 0)
    assert pixels.shape == (16, 16, 16, 3) and targets.sum(0).tolist() == [7, 6, 3]


def test_streamed_validation_measures_the_same_images_as_kept_ones():
    kept, stream = trainer(RECIPE, LABELS), streaming(RECIPE, drawn(LABELS, seed=99, lost=[9]))
    stream.batches.task = replace(stream.task, validation_rows=np.array([3, 4, 9, 40]))
    stream.model.load_state_dict(kept.model.state_dict())
    logits, targets = logits_of(stream, stream.batches.iter_validation())
    expected, truth = logits_of(kept, [kept.batches.validation.take(np.array([3, 4, 40]))])
    np.testing.assert_allclose(logits, expected, atol=1e-6)
    assert (targets == truth).all() and stream.batches.tally.unreadable == 1


def test_only_the_leading_worker_computes_the_metrics_of_all(monkeypatch):
    made = trainer(RECIPE, LABELS, worker=Worker(1, 2, torch.device("cpu")))
    monkeypatch.setattr(validation, "gather", lambda mine, worker: mine)
    monkeypatch.setattr(metrics, "classification", lambda *_: pytest.fail("computed on another worker"))

    def receive(values, **_) -> None:
        values[0] = {"accuracy": 0.5}

    monkeypatch.setattr(torch.distributed, "broadcast_object_list", receive)
    assert made.evaluate(made.model) == {"accuracy": 0.5}


def test_averaged_weights_follow_the_weights_at_their_decay():
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    averaged = build_ema(model, 0.9)
    torch.nn.init.ones_(model.weight)
    expected = 0.0
    for step in range(1, 200):
        averaged.update_parameters(model)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay)
        assert averaged.module.weight.item() == pytest.approx(expected, abs=1e-6)
    assert model.weight.item() == 1


def test_averaged_weights_differ_from_the_models_own():
    made = trained(trainer(replace(RECIPE, optimizer=replace(RECIPE.optimizer, ema_decay=0.9)), LABELS), 1)
    own = made.model.classifier.weight
    assert not torch.equal(made.learner.ema.module.classifier.weight, own)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_schedules_warm_up_and_end_where_they_should(schedule):
    optimizer = Optimizer(lr_scheduler_type=schedule, warmup_steps=10, min_lr_ratio=0.1)
    shares = [learning_rate_factor(optimizer, step, 100) for step in range(101)]
    assert np.allclose(np.diff(shares[:10]), 1 / 11)
    assert shares[10] == pytest.approx(1)
    assert shares[100] == pytest.approx(1 if schedule == "constant" else 0.1)
    middle = {"cosine": 0.55, "linear": 0.55, "constant": 1}[schedule]
    assert shares[55] == pytest.approx(middle)
    assert learning_rate_factor(replace(optimizer, warmup_steps=0.1), 4, 100) == shares[4]


def test_a_continued_run_is_bit_equal_to_an_unbroken_one():
    recipe = replace(
        RECIPE,
        augment=MIXED,
        optimizer=replace(RECIPE.optimizer, ema_decay=0.9),
        finetune=replace(RECIPE.finetune, drop_path=0.2),
    )
    unbroken = trained(trainer(recipe, LABELS), 2)
    first = trained(trainer(recipe, LABELS), 1)
    steps = first.batches.iter_steps(1, 0)
    for step, batches in [next(steps), next(steps)]:
        first.advance(first.train_step(batches, epoch=1, step=step))
    second = trainer(recipe, LABELS)
    second.restore(first.state())
    second.train_epoch()
    for name, value in unbroken.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], value), name
    assert torch.equal(second.learner.ema.module.classifier.bias, unbroken.learner.ema.module.classifier.bias)


def test_order_is_repeatable_and_covers_every_image_in_every_view():
    strata = np.array([0, 0, 0, 1])
    order = epoch_order(strata, ClassBalance(), views=3, seed=1, epoch=0)
    assert sorted(order[:4]) == sorted(order[4:8]) == [0, 1, 2, 3]
    assert (order == epoch_order(strata, ClassBalance(), views=3, seed=1, epoch=0)).all()
    assert (order != epoch_order(strata, ClassBalance(), views=3, seed=1, epoch=1)).any()


@pytest.mark.parametrize(
    ("balance", "expected"),
    [
        (ClassBalance(sampling="oversample"), [6, 6]),
        (ClassBalance(sampling="undersample"), [2, 2]),
        (ClassBalance(sampling="target", target_per_class=4), [4, 4]),
    ],
)
def test_class_aware_sampling_draws_classes_evenly(balance, expected):
    strata = np.array([0] * 6 + [1] * 2)
    order = epoch_order(strata, balance, views=1, seed=0, epoch=0)
    assert np.bincount(strata[order]).tolist() == expected
    assert np.bincount(order)[6:].min() >= 1


def test_balancing_at_least_doubles_the_recall_of_a_rare_class():
    labels = [[0]] * 200 + [[1]] * 4

    def minority_recall(balance: ClassBalance) -> float:
        recipe = replace(RECIPE, epochs=2, batch_size=12, class_balance=balance)
        made = trained(trainer(recipe, labels, n_classes=2, noise=125), 2)
        logits, _ = logits_of(made, [made.batches.validation.take(np.arange(200, 204))])
        return float((logits.argmax(1) == 1).mean())

    balanced = minority_recall(ClassBalance(sampling="oversample"))
    assert balanced >= max(2 * minority_recall(ClassBalance()), 0.75)


@pytest.mark.parametrize("loss", ["bce", "asymmetric"])
def test_multi_label_training_reaches_a_high_mean_average_precision(loss):
    labels = SEVERAL * 2
    recipe = replace(RECIPE, epochs=10, loss=Loss(multi_label=loss))
    made = trained(trainer(recipe, labels, n_classes=4, multi_label=True), 10)
    logits, targets = logits_of(made, made.batches.iter_validation())
    assert metrics.classification(logits, targets.astype(np.uint8))["map"] > 0.9


def test_a_loss_that_is_no_number_stops_the_run_with_advice():
    made = trainer(RECIPE, LABELS)
    torch.nn.init.constant_(made.model.classifier.weight, float("nan"))
    with pytest.raises(Diverged, match="learning-rate"):
        made.train_epoch()


def scripted(made, *measured: dict[str, float]) -> list[dict]:
    """Finish epochs whose evaluations give these numbers, in turn; returns what was reported."""
    answers, reported = iter(measured), []
    made.evaluate = lambda model: next(answers)
    made.report = lambda line, model: reported.append(line)
    made.batches.iter_steps = lambda epoch, first: iter(())
    while not (made.should_stop() or made.progress.epoch == made.recipe.epochs):
        made.train_epoch()
        made.progress.step = made.task.steps_per_epoch
        made.measure()
    return reported


def test_early_stopping_asks_for_the_smallest_gain_since_the_last_that_counted():
    stopping = EarlyStopping(patience_epochs=3, min_delta=0.1)
    made = trainer(replace(RECIPE, epochs=9, early_stopping=stopping), LABELS)
    scores = (0.5, 0.55, 0.58, 0.61, 0.62, 0.63, 0.64, 0.9)
    reported = scripted(made, *({"accuracy": score} for score in scores))
    assert [line["score"] for line in reported] == list(scores[:7])
    assert made.progress.best_score == 0.61 and made.should_stop()


def ran(recipe: Recipe, monkeypatch) -> tuple[Trainer, list[dict]]:
    """A whole run in this process, and what it reported: 4 steps an epoch."""
    reported: list[dict] = []
    monkeypatch.setattr(Trainer, "report", lambda self, line, model=None: reported.append(line))
    made = trainer(recipe, LABELS)
    made.run()
    return made, reported


def test_evaluations_come_every_so_many_steps_and_at_the_end_of_each_epoch(monkeypatch):
    made, reported = ran(replace(RECIPE, evaluate_every_steps=3), monkeypatch)
    assert [(line["epoch"], line["step"]) for line in reported] == [(0.75, 3), (1, 4), (1.5, 6), (2, 8)]
    assert [line["step"] for line in made.progress.history] == [3, 4, 6, 8]
    assert all("accuracy" in line and line["images_per_s"] > 0 for line in reported)
    plain, _ = ran(RECIPE, monkeypatch)
    assert torch.equal(made.model.classifier.weight, plain.model.classifier.weight), "measuring changed it"


def test_max_steps_ends_the_run_and_the_schedule_with_an_evaluation(monkeypatch):
    optimizer = replace(RECIPE.optimizer, lr_scheduler_type="linear", min_lr_ratio=0.0)
    made, reported = ran(replace(RECIPE, max_steps=6, optimizer=optimizer), monkeypatch)
    assert [(line["epoch"], line["step"]) for line in reported] == [(1, 4), (1.5, 6)]
    assert reported[-1]["learning_rate"] == 0
    again = trainer(made.recipe, LABELS)
    again.restore(made.state())
    assert again.is_over(), "a continued run would go on"


def test_max_time_ends_the_run_after_the_step_that_reaches_it_restarts_included(monkeypatch):
    made, reported = ran(replace(RECIPE, max_time_s=1e-6), monkeypatch)
    assert [line["step"] for line in reported] == [1] and made.progress.seconds > 0
    recipe = replace(RECIPE, max_time_s=3600)
    first = trainer(recipe, LABELS)
    first.progress.seconds = 3600
    second = trainer(recipe, LABELS)
    second.restore(first.state())
    assert second.is_over() and not trainer(recipe, LABELS).is_over()


def test_steps_are_logged_to_tensorboard(monkeypatch, tmp_path):
    monkeypatch.setattr(Trainer, "report", lambda *_, **__: None)
    made = trainer(RECIPE, LABELS)
    made.task = replace(made.task, log_every_steps=3)
    made.tracker = Tracker(str(tmp_path), (), {})
    made.run()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for name in ("loss", "learning_rate", "gradient_norm", "images_per_s", "data_wait"):
        assert [event.step for event in events.Scalars(f"train/{name}")] == [3, 6]
    assert events.Scalars("train/gradient_norm")[0].value > 0
    assert [event.step for event in events.Scalars("accuracy")] == [4, 8]


def test_averaged_weights_are_reported_and_saved_where_they_are_better():
    recipe = replace(RECIPE, epochs=2, optimizer=replace(RECIPE.optimizer, ema_decay=0.9))
    made = trainer(recipe, LABELS)
    own_then_averaged = [{"accuracy": score} for score in (0.6, 0.7, 0.8, 0.7)]
    first, second = scripted(made, *own_then_averaged)
    assert (first["score"], first["averaged_weights"]) == (0.7, True)
    assert (second["score"], second["averaged_weights"]) == (0.8, False)


@pytest.mark.parametrize("averaged", [True, False])
def test_the_saved_model_has_the_weights_that_were_measured(averaged, monkeypatch):
    made = trained(trainer(replace(RECIPE, optimizer=replace(RECIPE.optimizer, ema_decay=0.9)), LABELS), 1)
    saved = {}

    def keep(line, checkpoint) -> None:
        with checkpoint.as_directory() as folder:
            saved.update(load_file(Path(folder, "model", "model.safetensors")))

    monkeypatch.setattr(ray.train, "report", keep)
    averaged_model = made.learner.ema.module
    made.report({"score": 1.0}, model=averaged_model if averaged else made.model)
    own, average = made.model.state_dict(), averaged_model.state_dict()
    expected, other = (average, own) if averaged else (own, average)
    assert torch.equal(saved["classifier.weight"], expected["classifier.weight"])
    assert not torch.equal(saved["classifier.weight"], other["classifier.weight"])


@pytest.mark.parametrize(
    "network",
    [Finetune(gradient_checkpointing=True), pytest.param(Finetune(compile=True), marks=pytest.mark.slow)],
)
def test_saving_memory_or_compiling_does_not_change_what_is_learned(network):
    if network.compile and shutil.which("g++") is None:
        pytest.skip("torch.compile wants a C++ compiler")
    found = []
    for one in (Finetune(), network):
        made = trainer(replace(RECIPE, finetune=one), LABELS)
        made.wrap()
        _, micro_batches = next(made.batches.iter_steps(0, 0))
        made.accumulate(micro_batches, seed=1)
        found.append(torch.cat([parameter.grad.flatten() for parameter in made.model.parameters()]))
    torch.testing.assert_close(found[1], found[0], atol=1e-6, rtol=1e-4)


def test_a_selection_metric_that_validation_does_not_give_is_refused_with_those_it_does():
    classes = np.arange(20) % 5
    with pytest.raises(InputError, match=r"acuracy.*accuracy@3"):
        fit.refuse_unknown_metric("acuracy", classes, 5)
    fit.refuse_unknown_metric("accuracy@3", classes, 5)
    fit.refuse_unknown_metric("roc_auc_macro", classes, 5)
    with pytest.raises(InputError, match=r"metric_for_best_model is roc_auc_macro.*more classes"):
        fit.refuse_unknown_metric("roc_auc_macro", np.zeros(20, np.int64), 5)
    labels = np.array([[1, 0, 1], [1, 0, 0]], np.uint8)
    fit.refuse_unknown_metric("map", labels, 3)
    with pytest.raises(InputError, match="metric_for_best_model is map"):
        fit.refuse_unknown_metric("map", np.ones((4, 3), np.uint8), 3)


@pytest.mark.parametrize("multi_label", [False, True])
def test_every_metric_selects_the_model_that_is_right_over_one_that_is_wrong(multi_label):
    truth = np.arange(24) % 6
    truth_nc = metrics.indicator(truth, 6)
    wanted = truth_nc if multi_label else truth
    logits_nc = (truth_nc * 16.0 - 8).astype(np.float32)  # sure and right; negated, each true class is last
    right, wrong = (
        {"validation_loss": loss, **metrics.classification(sign * logits_nc, wanted)}
        for sign, loss in ((1, 0.1), (-1, 5.0))
    )
    made = trainer(RECIPE, LABELS)
    for name in right:
        made.recipe = replace(RECIPE, metric_for_best_model=name)
        assert made.score(right) > made.score(wrong), name
    assert {"ece", "ece_classwise", "log_loss"} <= right.keys()


def test_cores_are_shared_by_all_workers_of_a_machine(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert [threads_of(workers) for workers in (1, 2 * 2, 16)] == [8, 2, 1]


@pytest.mark.slow
def test_two_workers_learn_what_one_learns_for_the_first_50_steps(tmp_path):
    """The two take a step in two micro-batches each, whose gradients they average with the second only."""
    small_training.curve(0, 1, 1, str(tmp_path))
    torch.multiprocessing.spawn(small_training.curve, (2, 2, str(tmp_path)), nprocs=2)
    alone = np.load(tmp_path / "losses-1-0.npy")
    together = np.mean([np.load(tmp_path / f"losses-2-{rank}.npy") for rank in (0, 1)], axis=0)
    assert len(alone) == 50 and alone[-5:].mean() < alone[:5].mean()
    np.testing.assert_allclose(together, alone, atol=1e-4)


# Whole runs on a real Ray cluster

WHOLE = replace(
    RECIPE,
    epochs=3,
    batch_size=6,
    augment=Augment(repeats=8, min_crop_scale=0.8),
    optimizer=Optimizer(learning_rate=1e-3, ema_decay=0.5),
)
CACHE = ImageCache(max_unreadable_fraction=0.1)


def plan_run(root: Path, output: Path, recipe=RECIPE, **resources) -> fit.TrainingJob:
    data = dataset.load(DataSettings(str(root), splits=Splits(validation=0.25, test=0.25)))
    return fit.plan_job(data, recipe, str(output), Resources(**{"num_workers": 2, **resources}))


@dataclass(frozen=True)
class WholeRun:
    """A run that nothing interrupted, next to its `images`."""

    folder: Path
    job: fit.TrainingJob
    messages: list[dict]
    content: dict


@pytest.fixture(scope="module")
def whole_run(ray_cluster, tmp_path_factory) -> WholeRun:
    """`WHOLE` with two workers, one image being broken, in the folder `run`."""
    folder = tmp_path_factory.mktemp("whole")
    images = image_folder(folder / "images")
    (images / "1" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnot really")
    job, messages = plan_run(images, folder / "run", WHOLE), []
    return WholeRun(folder, job, messages, fit.fit(job, CACHE, messages.append).content)


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_leaves_everything_that_the_next_stages_need(whole_run):
    output, job, content = whole_run.folder / "run", whole_run.job, whole_run.content
    best = output / "best"
    model = AutoModelForImageClassification.from_pretrained(best)
    assert model.config.id2label == dict(enumerate(job.data.classes))
    assert {file.name for file in best.iterdir()} >= {
        "README.md",
        "iab_vision.json",
        "preprocessor_config.json",
    }
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert content["test"]["accuracy"] > 0.6
    assert [one["status"] for one in content["data"]["unreadable"]]
    assert sum(content["data"]["images"].values()) == 36
    assert content["dataset"]["splits"]["validation"] == 0.25
    assert content["cache"] == {**vars(CACHE), "mode": "memory"}
    assert content["resources"]["num_workers"] == 2
    assert list((output / "tensorboard").iterdir())
    assert "<html" in (output / "report" / "report.html").read_text()
    assert whole_run.messages[-1]["done"] == whole_run.messages[-1]["total"]
    assert runs.finished(job.output, job.recipe, job.data).content["test"] == content["test"]
    with pytest.raises(InputError, match="learning_rate"):
        runs.finished(job.output, replace(job.recipe, optimizer=Optimizer(learning_rate=1e-4)), job.data)


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_driver_continues_with_the_same_command_and_ends_where_an_unbroken_one_does(whole_run):
    """With one worker where the unbroken run had two, and as a command with settings from a file."""
    folder, output = whole_run.folder, whole_run.folder / "killed"
    (folder / "recipe.yaml").write_text(yaml.safe_dump(asdict(WHOLE)))

    def start() -> subprocess.Popen[bytes]:
        """From another working directory than the workers', with paths relative to it."""
        command = [
            sys.executable, "-m", "jobs", "train", "--config", "recipe.yaml", "--dataset", "images",
            "--output", "killed", "--splits.validation", "0.25", "--splits.test", "0.25",
            "--cache.max-unreadable-fraction", "0.1",
        ]  # fmt: skip
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True)

    first = start()
    while len(runs.history(str(output))) < 2:
        assert first.poll() is None
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    before = runs.history(str(output))
    assert not (output / "run.json").exists()
    # as a kill in the middle of Ray's writing leaves it
    (output / "checkpoints" / checkpoints.INDEX).write_text("")
    assert start().wait(300) == 0
    after, unbroken = runs.history(str(output)), runs.history(whole_run.job.output)
    assert [line["epoch"] for line in after] == [1, 2, 3]
    assert after[0] == before[0], "the first epoch was trained again"
    for name in ("loss", "log_loss", "accuracy"):
        assert [line[name] for line in after] == pytest.approx([line[name] for line in unbroken], abs=1e-3)
    continued = json.loads((output / "run.json").read_text())
    assert continued["test"]["log_loss"] == pytest.approx(whole_run.content["test"]["log_loss"], abs=1e-3)
    assert continued["best"]["epoch"] == whole_run.content["best"]["epoch"]


@pytest.fixture(scope="module", params=["disk", "stream"])
def streams(request, ray_cluster, tmp_path_factory) -> tuple[fit.TrainingJob, decoded.DecodedData]:
    """Images that are not all kept in memory."""
    folder = tmp_path_factory.mktemp("streams")
    job = plan_run(image_folder(folder / "images"), folder / "run")
    return job, decoded.prepare(job.data, job.spec, ImageCache(mode=request.param, images_per_task=2), seed=0)


@pytest.mark.ray
@pytest.mark.slow
def test_workers_measure_every_validation_image_once_without_keeping_them_all(streams):
    job, prepared = streams
    rows, tally = prepared.rows["validation"], ingest.Tally()
    assert len(rows) % 2, "an even division hides what is cut off"
    counts = np.zeros(3)
    for shard in decoded.validation_shards(prepared, 2):
        batches = ingest.evaluation_batches(
            shard.iterator(), job.spec, 3, batch_size=2, rows=rows, tally=tally
        )
        counts += sum(targets_nc.sum(axis=0) for _, targets_nc in batches)
    assert counts.tolist() == np.bincount(job.data.targets()[rows], minlength=3).tolist()
    assert (tally.images, tally.unreadable) == (len(rows), 0)


@pytest.mark.ray
@pytest.mark.slow
def test_each_pass_over_a_stream_has_its_blocks_in_another_order(streams):
    job, prepared = streams
    [shard] = decoded.training_shards(prepared, job.recipe.class_balance, seed=0).streaming_split(1)
    passes = [
        [batch["item_id"].to_pylist() for batch in shard.iter_batches(batch_size=2, batch_format="pyarrow")]
        for _ in range(2)
    ]
    assert passes[0] != passes[1]
    assert sorted(passes[0]) == sorted(passes[1]), "not the same blocks"


@pytest.mark.ray
@pytest.mark.slow
def test_streamed_images_train_too_and_a_killed_worker_goes_on_from_its_checkpoint(ray_cluster, tmp_path):
    folder = image_folder(tmp_path / "images")
    recipe = replace(RECIPE, epochs=3, batch_size=6, augment=replace(STILL, repeats=2))
    job = plan_run(folder, tmp_path / "run", recipe, checkpoint_every_steps=4)
    prepared = decoded.prepare(
        job.data, job.spec, ImageCache(mode="stream", max_unreadable_fraction=0.2), seed=0
    )
    uris.local_path(job.data.rows["uri"][int(prepared.rows["train"][0])].as_py()).unlink()
    runs.begin(job.output, job.recipe, job.data)
    killed = threading.Event()
    starts: list[int] = []

    def listen(message: dict) -> None:
        starts.append(message["done"])
        if message["epoch"] >= 1 and not killed.is_set():
            killed.set()
            os.kill(training_processes()[0], signal.SIGKILL)

    result = fit.train(job, prepared, listen)
    assert killed.is_set()
    history = runs.history(job.output)
    assert [line["epoch"] for line in history] == [1, 2, 3]
    assert all(line["unreadable_images"] for line in history), "the image that went away was not noticed"
    per_epoch = starts[-1] // 3
    after_kill = starts[[done >= per_epoch for done in starts].index(True) + 1 :]
    assert min(after_kill) >= per_epoch
    files, line = fit.best_model(result)
    assert "model.safetensors" in files and line["score"] > 0


@pytest.mark.ray
@pytest.mark.slow
def test_a_diverged_run_is_not_tried_again(ray_cluster, tmp_path):
    optimizer = Optimizer(learning_rate=1e30, ema_decay=0, warmup_steps=0, max_grad_norm=0)
    recipe = replace(RECIPE, epochs=1, batch_size=6, optimizer=optimizer)
    job = plan_run(image_folder(tmp_path / "images"), tmp_path / "run", recipe, num_workers=1)
    prepared = decoded.prepare(job.data, job.spec, ImageCache(), seed=0)
    attempts = tmp_path / "attempts"

    class Counter(ray.train.UserCallback):
        def after_exception(self, run_context, worker_exceptions) -> None:
            with attempts.open("a") as file:
                file.write("x")

    with pytest.raises(JobFailed, match="learning-rate"):
        fit.train(job, prepared, callbacks=(Counter(),))
    assert attempts.read_text() == "x"


def training_processes() -> list[int]:
    """Process ids of the Ray Train workers of this process's cluster."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process.pid)
    return found
