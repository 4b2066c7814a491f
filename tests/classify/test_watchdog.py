"""How long a dataflow on Ray waits for its actors, and what it says meanwhile."""

import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from ray.data.exceptions import ExecutionTimeoutError

from pipelines.bundle.settings import RuntimeSpec
from pipelines.classify import watchdog
from pipelines.classify.settings import Workers
from pipelines.classify.sizing import ClusterChanged, Node, size_pools
from pipelines.classify.watchdog import Watchdog
from pipelines.messages import JobFailed

NO_WORKERS: list[Node] = [{}]
"""A head that takes no actors."""


class Dataflow:
    """What Ray shows of two pools, on a clock of its own."""

    def __init__(self, *, load: int = 1, infer: int = 4, gpus_per_infer: float = 1) -> None:
        self.nodes = NO_WORKERS
        self.now = 0.0
        self._pools = [
            _Pool("MapBatches(Loader)", load, cpu=1, gpu=0),
            _Pool("MapBatches(Classifier)", infer, cpu=1 - gpus_per_infer, gpu=gpus_per_infer),
        ]

    def start(self, *, load: int, infer: int) -> None:
        """So many actors have started."""
        for pool, running in zip(self._pools, (load, infer), strict=True):
            pool.running = running

    def run(self, start_s: float, *, until_s: float) -> None:
        """Let the watchdog look every five seconds until a time."""
        executor = SimpleNamespace(_topology=[*self._pools, SimpleNamespace(
            name="MapBatches(write_batch)", has_completed=lambda: False, get_autoscaling_actor_pools=list
        )])  # fmt: skip
        look = Watchdog(start_s)
        while self.now < until_s:
            self.now += 5
            look.on_execution_step(executor)


class _Pool:
    def __init__(self, name: str, size: int, *, cpu: float, gpu: float) -> None:
        self.name, self.running = name, 0
        self._size, self._usage = size, SimpleNamespace(cpu=cpu, gpu=gpu)

    def has_completed(self) -> bool:
        return False

    def get_actor_info(self) -> Any:
        return SimpleNamespace(running=self.running, pending=self._size - self.running, restarting=0)

    def get_autoscaling_actor_pools(self) -> list[Any]:
        return [SimpleNamespace(per_actor_resource_usage=lambda: self._usage, shutdown=lambda force: None)]


@pytest.fixture
def on_clock(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[Any]:
    """Puts a dataflow on its own clock and nodes."""

    def put(dataflow: Dataflow) -> Dataflow:
        monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic=lambda: dataflow.now))
        monkeypatch.setattr(watchdog, "list_nodes", lambda: dataflow.nodes)
        return dataflow

    with caplog.at_level(logging.INFO):
        yield put


def test_a_run_waits_as_long_for_nodes_as_it_is_told(on_clock: Any, caplog: pytest.LogCaptureFixture) -> None:
    on_clock(Dataflow()).run(900, until_s=895)
    lines = [record.getMessage() for record in caplog.records if "sessions" in record.getMessage()]
    assert len(lines) == 14  # each minute
    assert lines[1] == (
        "0 of 4 sessions started after 120 s: no node has 1 GPU free for another one. The cluster has "
        "1 node of no CPU. The run waits for nodes up to 900 s (--workers.start-s)"
    )


def test_a_run_without_a_session_ends_when_the_time_is_over(on_clock: Any) -> None:
    dataflow = on_clock(Dataflow())
    dataflow.start(load=1, infer=0)
    dataflow.nodes = [{"CPU": 16.0}]
    with pytest.raises(ExecutionTimeoutError) as ended:
        dataflow.run(200, until_s=300)
    assert dataflow.now == 200
    assert isinstance(ended.value.__cause__, JobFailed)
    assert "0 of 4 sessions started after 200 s" in str(ended.value)
    assert "--workers.start-s" in str(ended.value)


def test_a_run_goes_on_with_the_sessions_that_came_in_time(
    on_clock: Any, caplog: pytest.LogCaptureFixture
) -> None:
    dataflow = on_clock(Dataflow())
    dataflow.start(load=1, infer=3)
    dataflow.nodes = [{"CPU": 16.0, "GPU": 1.0}] * 3
    dataflow.run(120, until_s=600)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "3 of 4 sessions started after 120 s" in warnings[0]
    assert "The run goes on with these" in warnings[0]


@pytest.mark.parametrize("infer", [15, 30])
def test_pools_that_leave_no_cpu_for_parts_end_the_run(on_clock: Any, infer: int) -> None:
    """Whether all have started or not; sized for a cluster that grew less than was said."""
    dataflow = on_clock(Dataflow(load=1, infer=infer, gpus_per_infer=0))
    dataflow.start(load=1, infer=15)
    dataflow.nodes = [{"CPU": 16.0}]
    with pytest.raises(ExecutionTimeoutError, match="hold 16 CPUs, the writing of parts") as ended:
        dataflow.run(120, until_s=300)
    assert isinstance(ended.value.__cause__, ClusterChanged)
    dataflow.start(load=1, infer=14)
    dataflow.run(120, until_s=600)


def test_pools_of_a_cluster_that_grows_from_zero_have_the_sizes_that_are_given() -> None:
    workers = Workers(load_actors=2, infer_actors=14, start_s=900)
    for provider in ("cpu", "cuda"):
        runtime = RuntimeSpec(provider=provider)  # type: ignore[arg-type]
        pools = size_pools(workers, NO_WORKERS, runtime, n_items=1_000_000, local_cores=None)
        assert (pools.load_actors, pools.infer_actors, pools.start_s) == (2, 14, 900)


@pytest.mark.parametrize("workers", [Workers(), Workers(load_actors=2), Workers(infer_actors=14)])
def test_a_cluster_without_cpus_is_refused_where_a_size_is_left_open(workers: Workers) -> None:
    with pytest.raises(
        JobFailed, match=r"the cluster has 0\. .*--workers.load-actors and --workers.infer-actors"
    ):
        size_pools(workers, NO_WORKERS, RuntimeSpec(), n_items=1_000_000, local_cores=None)


def test_a_cluster_with_too_few_cpus_is_refused_though_the_sizes_are_given() -> None:
    workers = Workers(load_actors=2, infer_actors=14)
    with pytest.raises(JobFailed, match=r"16\.25 CPUs at once; the cluster has 8"):
        size_pools(workers, [{"CPU": 8.0}], RuntimeSpec(), n_items=1_000_000, local_cores=None)
