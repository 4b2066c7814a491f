"""Classify against its peers: the same photos over loopback HTTP, the same ONNX file, interleaved.

    make peers          # an environment for Daft, which needs an older pyarrow than ours
    python benchmarks/peers.py --images photos --counts 64 500 5000 --rounds 3

Each way is a process of its own. `whole` is its wall-clock time from start to exit; the rate of a peer leaves
out what it needs before its first request (imports, sessions), ours leaves out nothing. Ways:

* `bare`: a Python process per core that fetches, decodes with `images.prepare` and runs the session;
* `local`, `local-int8`, `ray`: classify with its two engines;
* `daft`, `ray-docs` (Ray Data as its documentation has it), `transformers` (its pipeline in PyTorch).

The defaults take two hours on 2 cores; `--ways` and `--counts` choose.
"""

import argparse
import asyncio
import json
import multiprocessing as mp
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
BATCH = 16
OURS = {"local": ("--engine", "local"), "ray": ("--engine", "ray"),
        "local-int8": ("--engine", "local", "--precision", "int8")}  # fmt: skip
PEERS = ("bare", "daft", "ray-docs", "transformers")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, help="folder of images; drawn at 500 x 375 if not given")
    parser.add_argument("--counts", type=int, nargs="+", default=[64, 500, 5_000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=[*OURS, *PEERS], default=[*OURS, *PEERS])
    parser.add_argument("--daft-python", type=Path, default=Path(".venv-peers/bin/python"))
    parser.add_argument("--child", nargs=3, metavar=("WAY", "URIS", "BUNDLE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        run_child(*arguments.child)
        return
    folder = Path(tempfile.mkdtemp(prefix="peers-"))
    try:
        compare(arguments, folder)
    finally:
        shutil.rmtree(folder)


def compare(arguments: argparse.Namespace, folder: Path) -> None:
    """Every way in turn, round after round, and the table of medians."""
    from inputs import VIT_TINY, given_or_drawn, random_bundle

    files = given_or_drawn(arguments.images, folder)
    bundle = random_bundle(folder, VIT_TINY, precisions=("fp32", "int8"))
    found: dict[tuple[int, str], list[dict[str, float]]] = defaultdict(list)
    with serve(files) as address:
        for count in arguments.counts:
            uris = write_uris(folder / f"uris-{count}.parquet", address, len(files), count)
            for number in range(arguments.rounds):
                for way in arguments.ways:
                    timing = time_way(way, uris, bundle, folder / "out", arguments.daft_python)
                    found[count, way].append(timing)
                    print(f"{count:>6} round {number + 1} {way:>12}: {json.dumps(timing)}", flush=True)
            show(count, {way: found[count, way] for way in arguments.ways})


@contextmanager
def serve(files: list[Path]) -> Iterator[str]:
    """An HTTP server over the files in a process of its own; yields its address."""
    receiver, sender = mp.Pipe(duplex=False)
    server = mp.get_context("spawn").Process(target=run_server, args=(files, sender), daemon=True)
    server.start()
    try:
        yield f"http://127.0.0.1:{receiver.recv()}"
    finally:
        server.kill()


def run_server(files: list[Path], sender: Any) -> None:
    """Serve file n, with its bytes in memory, at /m/<m> for every m that is n modulo the number of files."""
    from aiohttp import web

    bodies = [path.read_bytes() for path in files]

    async def answer(request: web.Request) -> web.Response:
        body = bodies[int(request.match_info["number"].partition(".")[0]) % len(bodies)]
        return web.Response(body=body, content_type="image/jpeg")

    async def start() -> None:
        application = web.Application()
        application.router.add_get("/{number}", answer)
        runner = web.AppRunner(application, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        sender.send(runner.addresses[0][1])
        await asyncio.Event().wait()

    asyncio.run(start())


def write_uris(path: Path, address: str, files: int, count: int) -> Path:
    """A table of `count` distinct URIs over the files."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"uri": [f"{address}/{number}.jpg" for number in range(count)]}), path)
    return path


def time_way(way: str, uris: Path, bundle: Path, output: Path, daft_python: Path) -> dict[str, float]:
    """Seconds of the whole process, and images/s without what a peer needs before its first request."""
    shutil.rmtree(output, ignore_errors=True)
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    if way in OURS:
        command = [
            sys.executable, "-m", "jobs", "classify", "--inventory", str(uris), "--bundle", str(bundle),
            "--output", str(output), "--fetch.allow-private-addresses", *OURS[way],
        ]  # fmt: skip
    else:
        python = daft_python if way == "daft" else sys.executable
        command = [str(python), __file__, "--child", way, str(uris), str(bundle)]
    began = time.monotonic()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    whole_s = time.monotonic() - began
    if done.returncode:
        raise SystemExit(f"{way} ended with exit code {done.returncode}: {done.stderr[-2000:]}")
    if way in OURS:
        report = json.loads((output / "state" / "report.json").read_text())
        return {"whole_s": round(whole_s, 2), "rate": round(report["statuses"]["ok"] / whole_s, 1)}
    child = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    return {"whole_s": round(whole_s, 2), "rate": round(child["images"] / child["seconds"], 1)}


def show(count: int, found: dict[str, list[dict[str, float]]]) -> None:
    from rich.console import Console
    from rich.table import Table

    rates = {way: statistics.median(each["rate"] for each in rounds) for way, rounds in found.items()}
    table = Table(
        "way", "images/s (median)", "lowest", "highest", "whole, s (median)", title=f"{count:,} images"
    )
    for reference in ("bare", "daft"):
        table.add_column(f"to {reference}")
    for way, rounds in found.items():
        each = [one["rate"] for one in rounds]
        whole = statistics.median(one["whole_s"] for one in rounds)
        ratios = [f"{rates[way] / rates[to]:.2f}" if to in rates else "-" for to in ("bare", "daft")]
        table.add_row(
            way, f"{rates[way]:.1f}", f"{min(each):.1f}", f"{max(each):.1f}", f"{whole:.1f}", *ratios
        )
    Console(width=120).print(table)


def run_child(way: str, uris_path: str, bundle: str) -> None:
    """One peer; prints its number of images and the seconds from first request to last result."""
    ways: dict[str, Callable[[str, str], tuple[int, float]]] = {
        "bare": run_bare, "daft": run_daft, "ray-docs": run_ray_docs, "transformers": run_transformers,
    }  # fmt: skip
    images, seconds = ways[way](uris_path, bundle)
    print(json.dumps({"images": images, "seconds": seconds}))


def read_uris(path: str) -> list[str]:
    import pyarrow.parquet as pq

    return pq.ParquetFile(path).read()["uri"].to_pylist()  # type: ignore[no-any-return]


def run_bare(uris_path: str, bundle: str) -> tuple[int, float]:
    """A process per core: fetch, decode, run."""
    context = mp.get_context("spawn")
    n_processes = len(os.sched_getaffinity(0))
    taken, ready, done = context.Value("q", 0), context.Barrier(n_processes + 1), context.SimpleQueue()
    arguments = (read_uris(uris_path), bundle, taken, ready, done)
    processes = [context.Process(target=run_bare_worker, args=arguments) for _ in range(n_processes)]
    for process in processes:
        process.start()
    ready.wait()
    began = time.monotonic()
    images = sum(done.get() for _ in processes)
    return images, time.monotonic() - began


def run_bare_worker(uris: list[str], bundle: str, taken: Any, ready: Any, done: Any) -> None:
    import http.client
    from urllib.parse import urlsplit

    import numpy as np

    from pipelines.bundle import session
    from pipelines.bundle.bundle import open_bundle
    from pipelines.bundle.settings import RuntimeSpec
    from pipelines.images.prepare import prepare

    opened = open_bundle(bundle, verify=False)
    model = session.load(opened, RuntimeSpec(batch_size=BATCH, threads=1))
    connection = http.client.HTTPConnection(urlsplit(uris[0]).netloc)
    images = 0
    ready.wait()
    while True:
        with taken.get_lock():
            start = taken.value
            taken.value += BATCH
        if start >= len(uris):
            break
        pixels = []
        for uri in uris[start : start + BATCH]:
            connection.request("GET", urlsplit(uri).path)
            prepared = prepare(connection.getresponse().read(), opened.spec.image_spec)
            if prepared.pixels_hwc is not None:
                pixels.append(prepared.pixels_hwc)
        model.run(np.stack(pixels))
        images += len(pixels)
    done.put(images)


class OnnxClassifier:
    """The session as a user of Daft or Ray Data writes it: one thread, resized pixels in, best class out."""

    def __init__(self, bundle: str) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        model = str(Path(bundle) / "model.onnx")
        self.session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def best(self, pixels_nhwc: Any) -> Any:
        return self.session.run(["probabilities"], {"pixels": pixels_nhwc})[0].argmax(axis=1)


def run_daft(uris_path: str, bundle: str) -> tuple[int, float]:
    """Daft as its documentation has it: download, decode, resize, a class UDF per core."""
    import daft
    import numpy as np

    @daft.cls(max_concurrency=len(os.sched_getaffinity(0)))
    class Classify:
        def __init__(self) -> None:
            self.classifier = OnnxClassifier(bundle)

        @daft.method.batch(return_dtype=daft.DataType.int64(), batch_size=BATCH)
        def best(self, images: Any) -> Any:
            return self.classifier.best(np.stack([np.asarray(image) for image in images.to_pylist()]))

    began = time.monotonic()
    image = daft.col("uri").download(on_error="null").decode_image(on_error="null", mode="RGB")
    table = daft.read_parquet(uris_path).with_column("image", image.resize(224, 224))
    table = table.where(daft.col("image").not_null())
    labelled = table.with_column("label", Classify().best(daft.col("image"))).select("uri", "label").collect()
    return len(labelled), time.monotonic() - began


def run_ray_docs(uris_path: str, bundle: str) -> tuple[int, float]:
    """Ray Data as its batch-inference guide has it: a map that loads, an actor pool that classifies."""
    os.environ.setdefault("RAY_DATA_LOG_LEVEL", "ERROR")
    import io
    import urllib.request

    import numpy as np
    import ray
    from PIL import Image

    def load(row: dict[str, Any]) -> dict[str, Any]:
        with urllib.request.urlopen(row["uri"]) as answer:
            image = Image.open(io.BytesIO(answer.read())).convert("RGB").resize((224, 224))
        return {"uri": row["uri"], "image": np.asarray(image)}

    class Classify(OnnxClassifier):
        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            return {"uri": batch["uri"], "label": self.best(batch["image"])}

    ray.init(address="local", log_to_driver=False, include_dashboard=False, num_cpus=8)
    ray.data.DataContext.get_current().enable_progress_bars = False
    began = time.monotonic()
    pool = ray.data.ActorPoolStrategy(size=len(os.sched_getaffinity(0)))
    loaded = ray.data.read_parquet(uris_path, override_num_blocks=32).map(load)
    labelled = loaded.map_batches(Classify, fn_constructor_args=(bundle,), batch_size=BATCH, compute=pool)
    images = sum(len(batch["label"]) for batch in labelled.iter_batches(batch_size=None))
    return images, time.monotonic() - began


def run_transformers(uris_path: str, bundle: str) -> tuple[int, float]:
    """transformers' pipeline over the URLs, sixteen at a time, PyTorch with every core."""
    from transformers import ViTForImageClassification, ViTImageProcessor, pipeline

    model = ViTForImageClassification.from_pretrained(Path(bundle).parent / "checkpoint")
    classify = pipeline("image-classification", model=model, image_processor=ViTImageProcessor())
    uris = read_uris(uris_path)
    began = time.monotonic()
    images = sum(1 for _ in classify((uri for uri in uris), batch_size=BATCH, top_k=5))
    return images, time.monotonic() - began


if __name__ == "__main__":
    main()
