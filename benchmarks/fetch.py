"""Fetching: objects per second and CPU per object, compared with the barest loop over the same client.

    python benchmarks/fetch.py --objects 5000 --files photos    # local files
    python benchmarks/fetch.py    # the S3 server of AWS_ENDPOINT_URL, by s3:// and by http://

Every way runs three times, alternating; the best of each is shown, CPU is the client process alone. The
http rows fetch the same objects by presigned URLs. Expected: at most 0.15 ms of CPU per object beyond the
bare loop, which is nothing compared with the 2 ms that decoding takes.
"""

import argparse
import asyncio
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from pipelines.fetch.fetch import Fetcher
from pipelines.fetch.settings import FetchLimits
from pipelines.fetch.source import Source

BUCKET = "fetch-benchmark"
ROUNDS = 3
AT_ONCE = 64
LIMITS = FetchLimits(concurrency=AT_ONCE, per_host=AT_ONCE, allow_private_addresses=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--objects", type=int, default=5_000)
    parser.add_argument("--bytes", type=int, default=35_000, help="size of an S3 object")
    parser.add_argument("--files", type=Path, default=None, help="folder of local files")
    arguments = parser.parse_args()
    print("| way | objects/s | CPU ms per object | of bare, objects/s | beyond bare, CPU ms |")
    print("|---|---|---|---|---|")
    if arguments.files:
        paths = [str(path) for path in sorted(arguments.files.glob("*/*"))[: arguments.objects]]
        compare("local files", paths, bare_files)
    if os.environ.get("AWS_ENDPOINT_URL"):
        keys = fill_bucket(arguments.objects, arguments.bytes)
        compare("s3, obstore", [f"s3://{BUCKET}/{key}" for key in keys], bare_obstore)
        compare("http, aiohttp", presigned(keys), bare_aiohttp)


def compare(name: str, uris: list[str], bare: Callable[[list[str]], int]) -> None:
    fetcher = Fetcher(LIMITS)

    def ours(wanted: list[str]) -> int:
        return sum(len(one.payload or b"") for _, one in fetcher.fetch_many([Source(uri) for uri in wanted]))

    ours(uris[:100])
    measured: dict[str, list[tuple[float, float]]] = {"bare": [], "fetcher": []}
    for _ in range(ROUNDS):
        expected = timed(bare, uris, measured["bare"])
        assert timed(ours, uris, measured["fetcher"]) == expected
    fetcher.close()
    bare_s, bare_cpu = (min(found) for found in zip(*measured["bare"], strict=True))
    our_s, our_cpu = (min(found) for found in zip(*measured["fetcher"], strict=True))
    n = len(uris)
    print(f"| {name}: bare loop | {n / bare_s:,.0f} | {bare_cpu / n * 1e3:.3f} | | |")
    ratio, beyond = bare_s / our_s, (our_cpu - bare_cpu) / n * 1e3
    print(f"| {name}: Fetcher | {n / our_s:,.0f} | {our_cpu / n * 1e3:.3f} | {ratio:.2f} | {beyond:.3f} |")


def timed(work: Callable[[list[str]], int], uris: list[str], into: list[tuple[float, float]]) -> int:
    wall, cpu = time.perf_counter(), time.process_time()
    n_bytes = work(uris)
    into.append((time.perf_counter() - wall, time.process_time() - cpu))
    return n_bytes


def bare_files(paths: list[str]) -> int:
    return sum(len(Path(path).read_bytes()) for path in paths)


def bare_obstore(uris: list[str]) -> int:
    from obstore import get_async
    from obstore.store import S3Store

    store = S3Store(BUCKET, client_options={"allow_http": True})

    async def one(uri: str) -> int:
        return len(await (await get_async(store, uri.rpartition("/")[2])).bytes_async())

    return asyncio.run(bounded(one, uris))


def bare_aiohttp(urls: list[str]) -> int:
    import aiohttp
    from yarl import URL

    async def everything() -> int:
        async with aiohttp.ClientSession() as session:

            async def one(url: str) -> int:
                async with session.get(URL(url, encoded=True)) as response:
                    return len(await response.read())

            return await bounded(one, urls)

    return asyncio.run(everything())


async def bounded(one, uris: list[str]) -> int:  # type: ignore[no-untyped-def]
    slots = asyncio.Semaphore(AT_ONCE)

    async def slotted(uri: str) -> int:
        async with slots:
            return await one(uri)

    return sum(await asyncio.gather(*(slotted(uri) for uri in uris)))


def fill_bucket(n: int, n_bytes: int) -> list[str]:
    import boto3
    from obstore.store import S3Store

    client = boto3.client("s3")
    client.create_bucket(Bucket=BUCKET)
    store = S3Store(BUCKET, client_options={"allow_http": True})
    payload = np.random.default_rng(0).bytes(n_bytes)
    keys = [f"{number:06d}.jpg" for number in range(n)]
    with ThreadPoolExecutor(16) as threads:
        list(threads.map(lambda key: store.put(key, payload), keys))
    return keys


def presigned(keys: list[str]) -> list[str]:
    import boto3

    client = boto3.client("s3")
    return [client.generate_presigned_url("get_object", {"Bucket": BUCKET, "Key": key}) for key in keys]


if __name__ == "__main__":
    main()
