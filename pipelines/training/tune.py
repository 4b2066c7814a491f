"""Search for a better recipe: Ray Tune runs short trainings, Optuna proposes them, ASHA stops the poor ones.

Every trial trains on the same decoded images, which are prepared once. The space names settings of the
recipe (`optimizer.learning_rate`); what would change the pixels cannot be searched. The same call on an
unfinished folder continues it, trials from their own checkpoints.
"""

import dataclasses
import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pandas as pd
import yaml

from pipelines.datasets.settings import ImageCache
from pipelines.messages import InputError, JobFailed, redacted, root_cause, suggestion
from pipelines.storage import storage, uris
from pipelines.training import decoded, fit, runs
from pipelines.training.decoded import DecodedData
from pipelines.training.fit import TrainingJob
from pipelines.training.recipe import Recipe, Search

log = logging.getLogger(__name__)

FOLDER, TRIALS = "search", "trials"
TABLE, BEST, MARKER = "trials.csv", "best.yaml", "tune.json"
DRIVER_CPUS = 0.1
"""What a trial's own process reserves besides its workers: it only waits for them."""
FIXED = ("model", "image_size", "patch_size", "fit", "resample", "crop_fraction")
"""Settings that change the pixels or the weights' shapes that trials share."""


def read_space(uri: str) -> dict[str, Any]:
    """A search space from YAML: setting -> how it is drawn; sections may be nested.

    Raises:
        InputError: not YAML, or an entry that is no way of drawing.
    """
    try:
        content = yaml.safe_load(storage.read_uri(uri))
    except yaml.YAMLError as error:
        raise InputError(f"{uri} is not YAML: {error}") from error
    if not isinstance(content, dict) or not content:
        raise InputError(f"{uri} must map settings of the recipe to how they are drawn")
    return _flatten(content)


def _flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{optimizer: {learning_rate: …}}` as `{optimizer.learning_rate: …}`."""
    found: dict[str, Any] = {}
    for name, value in content.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and not set(value) & set(DRAWS):
            found |= _flatten(value, f"{key}.")
        else:
            found[key] = value
    return found


DRAWS = ("choice", "uniform", "loguniform", "quniform", "randint")
"""Ways of drawing a value, named as in Ray Tune."""


def parse_distributions(space: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """Ray Tune's distributions of a space, checked against the recipe.

    Raises:
        InputError: a setting the recipe does not have or trials must share, or an unknown way of drawing.
    """
    from ray import tune

    found = {}
    for setting, how in space.items():
        _check_setting(recipe, setting)
        if not isinstance(how, dict) or len(how) != 1 or next(iter(how)) not in DRAWS:
            raise InputError(f"{setting} is {how!r}; it must be one of {', '.join(DRAWS)} with its values")
        ((draw, values),) = how.items()
        try:
            found[setting] = tune.choice(values) if draw == "choice" else getattr(tune, draw)(*values)
        except (TypeError, ValueError) as error:
            raise InputError(f"{setting} is {how!r}: {error}") from error
    return found


def _check_setting(recipe: Recipe, setting: str) -> None:
    if setting in FIXED:
        raise InputError(f"{setting} cannot be searched: all trials share the same decoded images")
    known = _flatten(dataclasses.asdict(recipe))
    if setting not in known:
        raise InputError(f"{setting} is not a setting of the recipe{suggestion(setting, list(known))}")


def apply_values(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """The recipe with these settings; a section checks itself when it has all of its own."""
    sections: dict[str, dict[str, Any]] = {}
    for setting, value in values.items():
        section, _, name = setting.rpartition(".")
        sections.setdefault(section, {})[name] = value
    plain = sections.pop("", {})
    changed = {name: replace(getattr(recipe, name), **inner) for name, inner in sections.items()}
    return replace(recipe, **changed, **plain)


def tune_recipe(
    job: TrainingJob, space: Mapping[str, Any], search: Search, how: ImageCache
) -> dict[str, Any]:
    """Run the search on the running cluster; leaves the table of trials and the best recipe as YAML.

    Raises:
        JobFailed: no trial got as far as one epoch.
    """
    prepared = decoded.prepare(job.data, job.spec, how, seed=job.recipe.seed)
    folder = storage.open_storage(job.output)
    folder.put(runs.RECIPE, runs.as_json(search_identity(job, space, search)))
    search = replace(
        search, max_concurrent=min(search.max_concurrent or _count_parallel_trials(job), search.trials)
    )
    log.info(
        "%d trials of up to %d epochs, %d at once", search.trials, job.recipe.epochs, search.max_concurrent
    )
    results = _build_tuner(_share_machines(job, search), prepared, space, search).fit()
    trials = list_trials(results, space)
    done = [trial for trial in trials if trial["score"] is not None]
    if not done:
        raise JobFailed(f"none of {len(trials)} trials finished an epoch; see {job.output}/{FOLDER}")
    best = max(done, key=lambda trial: trial["score"])
    values = {setting: best[setting] for setting in space}
    folder.put(TABLE, pd.DataFrame(trials).to_csv(index=False).encode())
    folder.put(BEST, render_recipe(apply_values(job.recipe, values), job, how, best))
    content = {"best": best, "trials": len(trials), "space": dict(space)}
    folder.put(MARKER, runs.as_json(content))
    return content


def search_identity(job: TrainingJob, space: Mapping[str, Any], search: Search) -> dict[str, Any]:
    """What makes two searches the same search."""
    return {
        **runs.identity(job.recipe, job.data),
        "space": dict(space),
        "search": {name: value for name, value in vars(search).items() if name != "max_concurrent"},
    }


def refuse_another(job: TrainingJob, space: Mapping[str, Any], search: Search) -> dict[str, Any] | None:
    """What a finished search of the same settings found; None for one to start or continue.

    Raises:
        InputError: the folder holds a search with other settings.
    """
    folder = storage.open_storage(job.output)
    if not folder.exists(runs.RECIPE):
        return None
    now = search_identity(job, space, search)
    runs.refuse_mismatch(job.output, runs.read_json(folder, runs.RECIPE), now)
    content: dict[str, Any] | None = runs.read_json(folder, MARKER) if folder.exists(MARKER) else None
    return content


def _build_tuner(job: TrainingJob, prepared: DecodedData, space: Mapping[str, Any], search: Search) -> Any:
    """A new search, or the one to continue."""
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.optuna import OptunaSearch

    trainable = tune.with_resources(
        tune.with_parameters(train_trial, job=job, prepared=prepared), {"CPU": DRIVER_CPUS}
    )
    filesystem, path = runs.ray_storage(job.output)
    folder = f"{path}/{FOLDER}"
    if tune.Tuner.can_restore(folder, storage_filesystem=filesystem):
        log.info("continuing: finished trials are kept, the others go on from their checkpoints")
        return tune.Tuner.restore(
            folder, trainable, resume_unfinished=True, restart_errored=True, storage_filesystem=filesystem
        )
    return tune.Tuner(
        trainable,
        param_space=parse_distributions(space, job.recipe),
        tune_config=tune.TuneConfig(
            metric="score",
            mode="max",
            search_alg=OptunaSearch(seed=search.seed),
            scheduler=ASHAScheduler(
                time_attr="training_iteration",
                max_t=job.recipe.epochs,
                grace_period=min(search.grace_epochs, job.recipe.epochs),
                reduction_factor=search.reduction,
            ),
            num_samples=search.trials,
            max_concurrent_trials=search.max_concurrent,
        ),
        run_config=tune.RunConfig(
            name=FOLDER,
            storage_path=path,
            storage_filesystem=filesystem,
            verbose=0,
            callbacks=[_build_progress_log(search.trials)],
        ),
    )


def _build_progress_log(total: int) -> Any:
    """A callback of Ray Tune that says in the log how the trials are doing."""
    from ray.tune import Callback

    class Announcer(Callback):  # type: ignore[misc]
        """Its base may be imported only where Ray is, so it is defined here."""

        def on_trial_result(self, trial: Any, result: Any, **_: Any) -> None:
            log.info("trial %s, epoch %s: score %.4f", trial.trial_id, result["epoch"], result["score"])

        def on_trial_complete(self, trials: list[Any], trial: Any, **_: Any) -> None:
            ended = 1 + sum(one.is_finished() for one in trials if one is not trial)
            log.info("trial %s ended, %d of %d", trial.trial_id, ended, total)

    return Announcer()


def _count_parallel_trials(job: TrainingJob) -> int:
    """Trials that fit the cluster at once, leaving a CPU to Ray Data; more would wait for each other."""
    import ray

    resources, cluster = job.resources, ray.cluster_resources()
    by_cpu = (cluster.get("CPU", 1) - 1) // (resources.num_workers * resources.cpus_per_worker + DRIVER_CPUS)
    by_gpu = cluster.get("GPU", 0) // resources.num_workers if resources.use_gpu else by_cpu
    return max(1, int(min(by_cpu, by_gpu)))


def _share_machines(job: TrainingJob, search: Search) -> TrainingJob:
    """The job of a trial that shares each machine with its part of the others."""
    import ray

    nodes = sum(node["Alive"] and node["Resources"].get("CPU", 0) > 0 for node in ray.nodes())
    at_once = math.ceil(search.max_concurrent / max(nodes, 1))
    return replace(job, resources=replace(job.resources, runs_at_once=at_once))


def train_trial(values: Mapping[str, Any], job: TrainingJob, prepared: DecodedData) -> None:
    """One trial: a whole training with Ray Train's workers, told to Ray Tune epoch by epoch."""
    from ray import tune
    from ray.tune.integration.ray_train import TuneReportCallback

    name = tune.get_context().get_trial_id()
    trial = replace(
        job,
        recipe=replace(apply_values(job.recipe, values), evaluate_every_steps=0),  # a report is an epoch
        output=uris.join(job.output, TRIALS, name),
        resources=replace(job.resources, num_to_keep=1, checkpoint_every_steps=0),
    )
    fit.train(trial, prepared, callbacks=(TuneReportCallback(),))


def list_trials(results: Any, space: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per trial, the best first: what it tried, how far it came, its best score."""
    rows = []
    for result in results:
        scores = result.metrics_dataframe["score"].tolist() if result.metrics_dataframe is not None else []
        rows.append(
            {
                "trial": (result.metrics or {}).get("trial_id"),
                **{setting: (result.config or {}).get(setting) for setting in space},
                "epochs": len(scores),
                "score": max(scores) if scores else None,
                "error": root_cause(str(result.error)) if result.error else None,
            }
        )
    return sorted(rows, key=lambda row: -math.inf if row["score"] is None else row["score"], reverse=True)


def render_recipe(recipe: Recipe, job: TrainingJob, how: ImageCache, best: Mapping[str, Any]) -> bytes:
    """The recipe and the search's own data as a file for `iab-vision train --config`, without credentials."""
    data = dataclasses.asdict(job.data.settings)
    content = {
        "dataset": data.pop("uri"),
        **data,
        "cache": dataclasses.asdict(how),
        **dataclasses.asdict(recipe),
        "num_workers": job.resources.num_workers,
        "cpus_per_worker": job.resources.cpus_per_worker,
    }
    kept = redacted(content)
    head = (
        f"# Best of the trials: {recipe.metric_for_best_model} score {best['score']:.4f} on validation"
        f" after {best['epochs']} epochs.\n# iab-vision train --config best.yaml --output RUN\n"
    )
    if kept != content:
        head += "# The credentials in its addresses were left out: give those settings on the command line.\n"
    return (head + yaml.safe_dump(kept, sort_keys=False)).encode()
