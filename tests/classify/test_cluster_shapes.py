"""Every shape of cluster starts or says why not; lost nodes stop nothing, nodes that join are used."""

import itertools
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow.dataset as pads
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from jobs import classify_images, cli
from pipelines.bundle.settings import RuntimeSpec
from pipelines.classify import local, sizing
from pipelines.classify.run import Engine
from pipelines.classify.settings import Workers
from pipelines.classify.sizing import ClusterChanged, Node, refuse_outgrown, size_pools
from pipelines.classify.steps import Pools
from pipelines.messages import JobFailed
from tests.builders.clusters import Clusters
from tests.builders.models import small_bundle

CUDA = RuntimeSpec(provider="cuda")
N_IMAGES = 80


def node(cpus: float, gpus: float = 0) -> Node:
    return {"CPU": cpus, "GPU": gpus}


@pytest.mark.parametrize(
    ("nodes", "load", "infer"),
    [
        ([*[node(16, 1)] * 4, *[node(16)] * 2], 91, 4),
        ([*[node(16, 1)] * 4, *[node(64)] * 2], 187, 4),
        ([node(96, 8), node(48, 4)], 131, 12),
        ([node(2, 8), node(16)], 9, 8),  # a node with fewer CPUs than GPUs
        ([node(0), node(4, 1)], 2, 1),  # a head without CPUs
    ],
)
def test_pools_of_gpu_clusters_use_every_gpu(nodes: list[Node], load: int, infer: int) -> None:
    pools = size_pools(Workers(), nodes, CUDA, n_items=10_000_000, local_cores=None)
    assert (pools.load_actors, pools.infer_actors, pools.gpus_per_infer) == (load, infer, 1)


@pytest.mark.parametrize(("infer", "share"), [(4, 1), (6, 0.5), (8, 0.5), (9, 1 / 3)])
def test_sessions_share_gpus_in_whole_numbers(infer: int, share: float) -> None:
    nodes = [node(8, 1)] * 4
    pools = size_pools(Workers(infer_actors=infer), nodes, CUDA, n_items=1_000_000, local_cores=None)
    assert pools.gpus_per_infer == share


@settings(suppress_health_check=[HealthCheck.too_slow])  # on a busy machine
@given(
    shapes=st.lists(st.tuples(st.integers(0, 96), st.integers(0, 8)), min_size=1, max_size=12),
    threads=st.integers(1, 8),
    images=st.sampled_from([1, 1_000, 1_000_000]),
    cuda=st.booleans(),
)
def test_pools_of_any_cluster_find_their_places_or_it_is_said_why(
    shapes: list[tuple[int, int]], threads: int, images: int, cuda: bool
) -> None:
    """Load actors take the nodes in turn, as Ray spreads them; each session takes the first that fits.

    If the only session finds no place, the watchdog says so.
    """
    nodes = [node(cpus, gpus) for cpus, gpus in shapes]
    runtime = CUDA if cuda else RuntimeSpec(threads=threads)
    try:
        pools = size_pools(Workers(), nodes, runtime, n_items=images, local_cores=None)
    except JobFailed as reason:
        assert re.search("needs a GPU|CPUs at once", str(reason))
        return
    free = [[cpus, gpus] for cpus, gpus in shapes]
    turns = itertools.cycle(free)
    for _ in range(pools.load_actors):
        next(each for each in turns if each[0] >= 1)[0] -= 1
    for _ in range(pools.infer_actors):
        fits = (each for each in free if each[0] >= pools.cpus_per_infer and each[1] >= pools.gpus_per_infer)
        if not (place := next(fits, None)):
            assert pools.infer_actors == 1
            return
        place[0] -= pools.cpus_per_infer
        place[1] -= pools.gpus_per_infer
    assert sum(cpus for cpus, _ in free) >= sizing.CPUS_TO_WRITE


def test_sessions_of_many_threads_stay_on_one_node() -> None:
    nodes = [node(6), node(6)]
    threads = RuntimeSpec(threads=4)
    pools = size_pools(Workers(), nodes, threads, n_items=1_000_000, local_cores=None)
    assert pools.infer_actors == 2  # not 11 // 4: no node has 8
    nodes = [node(4)] * 8
    pools = size_pools(Workers(), nodes, threads, n_items=1_000_000, local_cores=None)
    assert (pools.load_actors, pools.infer_actors) == (3, 5)  # three nodes have a load actor


@pytest.mark.parametrize(("images", "chunk"), [(64, 16), (500, 16), (1_000, 31), (100_000, 64)])
def test_short_runs_travel_in_small_chunks_that_both_sessions_share(images: int, chunk: int) -> None:
    pools = size_pools(Workers(), [node(8)], RuntimeSpec(), n_items=images, local_cores=2)
    assert (pools.items_per_batch, pools.infer_actors) == (chunk, 2)


def test_pools_are_started_again_only_for_a_share_that_pays() -> None:
    def pools(cpus: float, gpus: float = 0, *, n_items: int = 1_000_000, sessions: int = 0) -> Pools:
        runtime = CUDA if gpus else RuntimeSpec()
        workers = Workers(infer_actors=sessions)
        return size_pools(workers, [node(cpus, gpus)], runtime, n_items=n_items, local_cores=None)

    refuse_outgrown(pools(16), lambda: pools(16))
    refuse_outgrown(pools(16), lambda: pools(18))
    refuse_outgrown(pools(16), lambda: pools(4))
    refuse_outgrown(pools(16), lambda: pools(64, n_items=100))  # the last images
    with pytest.raises(ClusterChanged, match="1 load actors and 14 sessions instead of 1 and 6"):
        refuse_outgrown(pools(8), lambda: pools(16))
    with pytest.raises(ClusterChanged):  # four sessions shared a GPU
        refuse_outgrown(pools(16, 1, sessions=4), lambda: pools(16, 4, sessions=4))


@pytest.fixture(scope="module")
def clusters() -> Iterator[Clusters]:
    clusters = Clusters()
    yield clusters
    clusters.close()


def write_inputs(folder: Path, images: int) -> None:
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for number in range(images):
        Image.fromarray(rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(
            folder / "images" / f"{number}.png"
        )
    small_bundle(folder / "bundle")


def arguments_for(folder: Path, inventory: str, *settings: str) -> list[str]:
    return [
        "classify", "--inventory", str(folder / inventory), "--bundle", str(folder / "bundle"), "--output",
        str(folder / "out"), "--workers.items-per-batch", "4", "--commit-interval-s", "0.2",
        "--allow-uncertified", *settings,
    ]  # fmt: skip


def classify(
    clusters: Clusters,
    folder: Path,
    shape: dict[str, object],
    *settings: str,
    images: int = N_IMAGES,
    inventory: str = "images",
) -> subprocess.CompletedProcess[str]:
    write_inputs(folder, images)
    arguments = arguments_for(folder, inventory, *settings)
    return clusters.classify(shape, arguments, folder / "stderr")


def rows(folder: Path) -> int:
    statuses = pads.dataset(folder / "out" / "table", format="parquet").to_table()["status"].to_pylist()
    assert set(statuses) == {"ok"}
    return len(statuses)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(
    "nodes",
    [
        [[2, 1], [2, 1], [4, 0]],  # four in five load actors would be spread over the GPU nodes
        [[1, 1], [1, 1], [4, 0]],
        [[4, 2], [3, 1]],
        [[3, 1], [3, 1]],
        [[1, 4], [4, 0]],
    ],
)
def test_clusters_of_unequal_nodes_start(clusters: Clusters, tmp_path: Path, nodes: list[list[int]]) -> None:
    done = classify(clusters, tmp_path, {"nodes": nodes}, "--provider", "cuda")
    assert done.returncode == 0, done.stderr
    assert rows(tmp_path) == N_IMAGES


@pytest.mark.ray
@pytest.mark.slow
def test_run_goes_on_with_the_actors_that_have_a_place(clusters: Clusters, tmp_path: Path) -> None:
    """Sessions of two CPUs on nodes of three and of one: one fits, though six CPUs would do for two."""
    shape = {"nodes": [[3, 0], [1, 0], [1, 0], [1, 0]], "sessions": 1}
    settings = ["--threads-per-session", "2", "--workers.infer-actors", "2", "--workers.items-per-part", "8"]
    done = classify(clusters, tmp_path, shape, *settings, images=400)
    assert done.returncode == 0, done.stderr
    assert rows(tmp_path) == 400
    assert "1 of 2 sessions started after 1 s: no node has 2 CPU free" in done.stderr


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_lost_node_shrinks_the_run(clusters: Clusters, tmp_path: Path, lost: int) -> None:
    """The first node has a session, the second only load actors."""
    shape = {"nodes": [[2, 1], [2, 0], [2, 1]], "remove": lost}
    settings = ["--provider", "cuda", "--workers.items-per-part", "100"]
    done = classify(clusters, tmp_path, shape, *settings, images=1_200)
    assert done.returncode == 0, done.stderr
    assert "a node was removed" in done.stderr
    if lost == 0:  # load actors may have finished what they had to load: then nothing waits for a place
        assert "found no place; the rest of the cluster goes on" in done.stderr
    assert rows(tmp_path) == 1_200


@pytest.mark.ray
@pytest.mark.slow
def test_images_that_a_node_does_not_see_stop_the_run_before_it_starts(
    clusters: Clusters, tmp_path: Path
) -> None:
    (tmp_path / "in.csv").write_text("uri\n/proc/self/fd/200/0.png\n")
    shape = {"nodes": [[2, 0], [2, 0]], "mounted": [str(tmp_path / "images"), 200]}
    done = classify(clusters, tmp_path, shape, "--fetch.allow", "/proc/self/fd", images=1, inventory="in.csv")
    assert done.returncode == 1
    assert "/proc/self/fd/200/0.png does not exist on " in done.stderr
    assert not list((tmp_path / "out" / "state" / "parts").rglob("*.parquet"))


@pytest.mark.ray
@pytest.mark.slow
def test_cluster_without_a_place_for_a_session_says_why(clusters: Clusters, tmp_path: Path) -> None:
    shape = {"nodes": [[4, 0]], "sessions": 0}
    done = classify(clusters, tmp_path, shape, "--provider", "cuda", "--workers.infer-actors", "2")
    assert done.returncode == 1
    assert "0 of 2 sessions started after 1 s: no node has 1 GPU free" in done.stderr
    assert "1 node of 4 CPU" in done.stderr


@pytest.mark.ray
@pytest.mark.slow
def test_node_that_joins_late_is_used(clusters: Clusters, tmp_path: Path) -> None:
    settings = ["--provider", "cuda", "--workers.items-per-part", "40"]
    done = classify(clusters, tmp_path, {"nodes": [[2, 1]], "add": [2, 1]}, *settings, images=2_000)
    assert done.returncode == 0, done.stderr
    assert "nodes have joined: starting again with" in done.stderr
    assert rows(tmp_path) == 2_000


@pytest.mark.ray
@pytest.mark.slow
def test_run_on_a_cluster_without_workers_waits_for_them(clusters: Clusters, tmp_path: Path) -> None:
    sizes = ["--workers.load-actors", "1", "--workers.infer-actors", "2"]
    done = classify(clusters, tmp_path, {"nodes": [], "add": [4, 0]}, "--provider", "cpu", *sizes)
    assert done.returncode == 0, done.stderr
    assert rows(tmp_path) == N_IMAGES


def test_pools_grow_in_the_middle_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On the local engine, which is told of a larger machine once it has started."""
    cpus = itertools.chain([4, 4], itertools.repeat(8))

    @contextmanager
    def growing(*_: object, **__: object) -> Iterator[Engine]:
        yield Engine("local", local.run_dataflow, lambda: [node(next(cpus))], None)

    monkeypatch.setattr(classify_images, "open_engine", growing)
    monkeypatch.setattr(sizing, "GROW_AFTER_S", 0.0)
    write_inputs(tmp_path, N_IMAGES)
    assert cli.main(arguments_for(tmp_path, "images", "--workers.items-per-part", "8")) == 0
    assert "nodes have joined: starting again with" in caplog.text
    assert rows(tmp_path) == N_IMAGES
