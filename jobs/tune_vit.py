"""`iab-vision tune`: many short trainings, the promising ones longer, and the best recipe as YAML.

    iab-vision tune --dataset photos/labels.csv --output search --model scratch:tiny --image-size 64 \\
        --patch-size 8 --num-workers 2 --epochs 6 --trials 8
    iab-vision train --config search/best.yaml --output run --epochs 20

On 2 CPU cores 8 trials of up to 6 epochs on 3,400 photos take about half an hour. Leaves trials.csv,
best.yaml and, last, tune.json.
"""

import logging
import os
from dataclasses import replace
from typing import Any

from jobs import cluster
from jobs.config import TuneConfig
from jobs.errors import checking_input
from jobs.settings import part_of
from jobs.train_vit import load_labelled
from pipelines.machine import cores
from pipelines.training.recipe import Recipe, Search
from pipelines.training.resources import Resources

log = logging.getLogger(__name__)


def run(config: TuneConfig) -> int:
    """Search, or say that it is done."""
    cluster.use_token()  # before the first import of Ray, or its clients send none
    import optuna

    from pipelines.training import fit, tune

    optuna.logging.set_verbosity(optuna.logging.WARNING)  # that it made a study
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # Ray Tune's own tables; ours is the log and trials.csv
    with checking_input():
        space = tune.read_space(config.space)
        resources = part_of(config, Resources, use_gpu=False)
        job = fit.plan_job(load_labelled(config), part_of(config, Recipe), config.output, resources)
        search = part_of(config, Search, max_concurrent=config.max_concurrent or fitting_here(config))
        tune.parse_distributions(space, job.recipe)
        done = tune.refuse_another(job, space, search)
    if done is None:
        with cluster.ray_cluster(config.ray_address, num_cpus=config.num_cpus):
            with checking_input():
                job = replace(job, resources=job.resources.on_cluster(config.use_gpu))
            done = tune.tune_recipe(job, space, search, config.cache)
    else:
        log.info("%s is complete already: no trial is run", config.output)
    tell(done, config.output)
    return 0


def fitting_here(config: TuneConfig) -> int:
    """Trials at once on a cluster of this machine, which has more logical CPUs than cores; 0 on another."""
    if cluster.joins_cluster(config.ray_address):
        return 0
    return max(1, cores() // int(config.num_workers))


def tell(content: dict[str, Any], output: str) -> None:
    best = {name: value for name, value in content["best"].items() if name != "error"}
    log.info("best of %d trials: %s", content["trials"], best)
    log.info("train it with: iab-vision train --config %s/best.yaml --output RUN", output.rstrip("/"))
