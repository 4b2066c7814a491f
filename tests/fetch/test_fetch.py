"""Fetching gives every object its bytes or the reason, within its limits, whatever the other side does."""

import asyncio
import contextlib
import io
import json
import os
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import BinaryIO
from urllib.parse import urlsplit

import boto3
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
from aiohttp import ClientPayloadError, ClientResponseError
from obstore.exceptions import GenericError

from pipelines.fetch import hosts, objects, retry
from pipelines.fetch.fetch import FILE_THREADS, Fetcher
from pipelines.fetch.hosts import AdaptiveSlots, Hosts
from pipelines.fetch.parquet import EmbeddedReader, read_embedded
from pipelines.fetch.retry import FetchError, backoff_s, parse_retry_after
from pipelines.fetch.settings import FetchLimits
from pipelines.fetch.source import ContainerVersion, Fetched, Source, sources_of
from pipelines.fetch.ssrf import block_reason
from pipelines.inventory.inventory import plan
from pipelines.messages import InputError
from pipelines.status import TRANSIENT, Status
from pipelines.storage.storage import open_storage
from pipelines.storage.uris import StorageError, StorageRefused
from tests.builders.fault_server import ADDRESS, BODY, FaultServer, Forwarder, fault_server, witness
from tests.builders.tls import self_signed

LIMITS_OF_A_RUN = FetchLimits(per_host=16)
LIMITS = FetchLimits(
    connect_timeout_s=0.5,
    read_timeout_s=0.7,
    total_timeout_s=3.0,
    max_attempts=3,
    backoff_s=0.05,
    max_bytes=1_000_000,
    max_buffered_bytes=4_000_000,
    per_host=64,
    breaker_failures=1_000,
    allowed_networks=(f"{ADDRESS}/32",),
)


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with fault_server() as running:
        yield running


@pytest.fixture
def fetcher() -> Iterator[Fetcher]:
    running = Fetcher(LIMITS)
    yield running
    running.close()


def free_bytes(fetcher: Fetcher) -> int:
    return fetcher._memory._small._free + fetcher._memory._large._free


def outcomes(fetcher: Fetcher, uris: list[str]) -> list[Fetched]:
    found = dict(fetcher.fetch_many([Source(uri) for uri in uris]))
    assert sorted(found) == list(range(len(uris)))
    return [found[index] for index in range(len(uris))]


FAULT_TABLE = {
    "empty": (Status.OK, 1),
    "404": (Status.NOT_FOUND, 1),
    "403": (Status.DENIED, 1),
    "410": (Status.NOT_FOUND, 1),
    "418": (Status.HTTP_ERROR, 1),
    "latin-1-reason": (Status.NOT_FOUND, 1),
    "latin-1-location": (Status.HTTP_ERROR, 1),
    "429-once": (Status.OK, 2),
    "429-for-ever": (Status.THROTTLED, 3),
    "500": (Status.SERVER_ERROR, 3),
    "503-twice": (Status.OK, 3),
    "silent": (Status.TIMEOUT, 3),
    "drip": (Status.TIMEOUT, 1),
    "truncated": (Status.CONNECTION_FAILED, 3),
    "length-too-small": (Status.CONNECTION_FAILED, 3),
    "length-of-terabytes": (Status.TOO_LARGE, 1),
    "length-is-text": (Status.CONNECTION_FAILED, 3),
    "not-http": (Status.CONNECTION_FAILED, 3),
    "loop": (Status.REDIRECT_LOOP, 6),
    "redirect": (Status.OK, 1),
    "hops/5": (Status.OK, 2),  # hops/6 leads through it
    "hops/6": (Status.REDIRECT_LOOP, 1),
    "redirect?http://127.0.0.1:WITNESS/": (Status.BLOCKED_ADDRESS, 1),
    "redirect?http://localhost:WITNESS/": (Status.BLOCKED_ADDRESS, 1),
    "redirect?http://169.254.169.254/latest/meta-data/": (Status.BLOCKED_ADDRESS, 1),
    "redirect?http://[x]@/": (Status.HTTP_ERROR, 1),
    "redirect?file:///etc/passwd": (Status.BLOCKED_ADDRESS, 1),
    "html": (Status.OK, 1),
    "endless": (Status.TOO_LARGE, 1),
    "reset": (Status.CONNECTION_FAILED, 3),
    "gzip": (Status.OK, 1),
    "gzip-bomb": (Status.TOO_LARGE, 1),
    "brotli": (Status.HTTP_ERROR, 1),
}


def test_every_http_fault_has_its_status_and_number_of_requests(
    server: FaultServer, fetcher: Fetcher
) -> None:
    with witness() as (port, seen):
        paths = [fault.replace("WITNESS", str(port)) for fault in FAULT_TABLE]
        began = time.monotonic()
        found = outcomes(fetcher, [f"{server.url}/{path}" for path in paths])
        seconds = time.monotonic() - began
    requests = [server.requests[f"/{path}"] for path in paths]
    print(f"\n{len(found)} faults at once in {seconds:.1f} s\n\n| fault | status | requests | error |")
    print("|---|---|---|---|")
    for fault, fetched, n_requests in zip(FAULT_TABLE, found, requests, strict=True):
        print(f"| {fault} | {fetched.status} | {n_requests} | {fetched.error or ''} |")
    assert {
        fault: (one.status, n) for fault, one, n in zip(FAULT_TABLE, found, requests, strict=True)
    } == FAULT_TABLE
    pa.array([fetched.error for fetched in found], pa.string())  # raises for a byte that is no UTF-8
    assert seconds < LIMITS.total_timeout_s + 1
    assert seen == []


def test_body_arrives_whole_through_redirects_and_packing(server: FaultServer, fetcher: Fetcher) -> None:
    found = outcomes(
        fetcher, [f"{server.url}/{path}" for path in ("ok", "redirect", "hops/3", "gzip", "503-twice")]
    )
    assert [fetched.payload for fetched in found] == [BODY] * 5
    assert server.requests["/hops/0"] == 1


def test_large_headers_are_read(server: FaultServer, fetcher: Fetcher) -> None:
    assert fetcher.fetch(f"{server.url}/large-headers").payload == BODY


def test_retry_after_is_waited_for_and_never_into_the_time_out(server: FaultServer, fetcher: Fetcher) -> None:
    began = time.monotonic()
    assert fetcher.fetch(f"{server.url}/429-once").status is Status.OK
    assert 0.9 < time.monotonic() - began < 2
    began = time.monotonic()
    assert fetcher.fetch(f"{server.url}/429-for-an-hour").status is Status.THROTTLED
    assert server.requests["/429-for-an-hour"] == 1
    assert time.monotonic() - began < 0.5


def test_long_retry_after_stops_all_requests_to_its_host(server: FaultServer, fetcher: Fetcher) -> None:
    fetcher.fetch(f"{server.url}/429-for-an-hour")
    asked = server.requests.total()
    found = outcomes(fetcher, [f"{server.url}/ok?{n}" for n in range(50)])
    assert {fetched.status for fetched in found} == {Status.THROTTLED}
    assert server.requests.total() == asked


def test_host_sees_no_more_requests_at_once_than_allowed(server: FaultServer) -> None:
    fetcher = Fetcher(FetchLimits(per_host=5, allow_private_addresses=True))
    assert {one.status for one in outcomes(fetcher, [f"{server.url}/slow?{n}" for n in range(60)])} == {
        Status.OK
    }
    assert server.most_at_once == 5
    fetcher.close()


def test_redirects_from_many_hosts_to_one_do_not_crowd_it(server: FaultServer) -> None:
    """Forty hosts redirect to one that serves five at once; the sixth request may be a redirect's."""
    fetcher = Fetcher(FetchLimits(per_host=5, allow_private_addresses=True))
    uris = [f"http://{ADDRESS}:{server.another_port()}/redirect?{server.url}/slow?{n}" for n in range(40)]
    assert {one.status for one in outcomes(fetcher, uris)} == {Status.OK}
    assert server.most_at_once <= 5 + 1
    fetcher.close()


def test_retry_after_holds_for_the_host_that_sent_it_and_no_other(
    server: FaultServer, fetcher: Fetcher
) -> None:
    with fault_server() as other:
        asked = fetcher.fetch(f"{other.url}/redirect?{server.url}/429-for-an-hour")
        assert asked.status is Status.THROTTLED
        assert fetcher.fetch(f"{other.url}/ok").status is Status.OK
    for host in (f"{ADDRESS}:{server.port}", f"user:word@{ADDRESS}:{server.port}"):
        assert fetcher.fetch(f"http://{host}/ok").status is Status.THROTTLED
    assert server.requests["/ok"] == 0
    assert fetcher.fetch(f"http://{ADDRESS}:{server.another_port()}/ok").status is Status.OK


def test_expired_or_foreign_certificate_is_a_passing_failure_of_the_host(
    server: FaultServer, fetcher: Fetcher, tmp_path: Path
) -> None:
    _, tls = self_signed(tmp_path, "-subj", "/CN=elsewhere")
    fetched = fetcher.fetch(f"https://{ADDRESS}:{server.another_port(tls)}/ok")
    assert fetched.status is Status.TLS_FAILED
    assert "certificate" in f"{fetched.error}"
    assert Status.TLS_FAILED in TRANSIENT


def test_retry_after_of_a_missing_page_stops_nothing(server: FaultServer, fetcher: Fetcher) -> None:
    assert fetcher.fetch(f"{server.url}/404-for-an-hour").status is Status.NOT_FOUND
    assert fetcher.fetch(f"{server.url}/ok").status is Status.OK


def test_circuit_of_a_dead_host_opens_and_is_probed_later(
    server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.fetch.hosts.GRACE_S", 0)
    monkeypatch.setattr("pipelines.fetch.hosts.PROBE_INTERVAL_S", 0.5)
    limits = FetchLimits(breaker_failures=10, per_host=4, backoff_s=0.01, allow_private_addresses=True)
    fetcher, forwarder = Fetcher(limits), Forwarder(server.port, ADDRESS)
    forwarder.down = True
    url = f"http://127.0.0.1:{forwarder.port}"
    found = outcomes(fetcher, [f"{url}/ok?{n}" for n in range(2_000)])
    assert {fetched.status for fetched in found} == {Status.CONNECTION_FAILED}
    assert "not tried: the host failed 1" in f"{found[-1].error}"
    assert forwarder.refused < 50
    forwarder.down = False
    assert fetcher.fetch(f"{server.url}/ok").status is Status.OK
    time.sleep(0.6)
    found = outcomes(fetcher, [f"{url}/ok?{n}" for n in range(3)])
    assert Status.OK in {fetched.status for fetched in found}
    assert fetcher.fetch(f"{url}/ok").status is Status.OK
    fetcher.close()
    forwarder.close()


@pytest.mark.parametrize(
    ("path", "status"), [("429-without-advice", Status.THROTTLED), ("500", Status.SERVER_ERROR)]
)
def test_overloaded_host_is_slowed_down_and_its_circuit_opens(
    server: FaultServer, monkeypatch: pytest.MonkeyPatch, path: str, status: Status
) -> None:
    """300 images at three attempts each would be 900 requests, as fast as the host answers."""
    monkeypatch.setattr("pipelines.fetch.hosts.GRACE_S", 0.5)
    limits = replace(LIMITS, per_host=16, breaker_failures=20)
    with Fetcher(limits) as fetcher:
        found = outcomes(fetcher, [f"{server.url}/{path}?{n}" for n in range(300)])
        assert {fetched.status for fetched in found} == {status}
        assert server.requests.total() < 100
        assert "not tried" in f"{found[-1].error}"


def test_slots_of_an_overloaded_host_adapt_until_all_its_images_arrive(server: FaultServer) -> None:
    """It serves four requests at once and answers 429 to all others; 16 are allowed."""
    patient = replace(LIMITS, per_host=16, max_attempts=5, total_timeout_s=30.0)  # the machine may be busy
    with Fetcher(patient) as fetcher:
        found = outcomes(fetcher, [f"{server.url}/four-at-once?{n}" for n in range(300)])
    assert {fetched.status for fetched in found} == {Status.OK}
    assert server.requests.total() < 450


def test_slots_halve_on_overload_and_grow_back_one_by_one() -> None:
    async def use() -> list[int]:
        slots, counts = AdaptiveSlots(8), []
        for change in ("decrease", "decrease", "increase", "increase", "increase"):
            getattr(slots, change)()
            async with contextlib.AsyncExitStack() as held:
                for _ in range(8):  # each release adapts the number of free slots
                    async with slots.hold():
                        pass
                n = 0
                while not slots._free.locked():
                    await held.enter_async_context(slots.hold())
                    n += 1
                counts.append(n)
        return counts

    assert asyncio.run(use()) == [4, 2, 2, 2, 3]


def test_hiccup_of_a_host_costs_no_image(server: FaultServer) -> None:
    """With more images under way than failures are allowed in a row."""
    limits = FetchLimits(breaker_failures=10, per_host=4, backoff_s=0.2, allow_private_addresses=True)
    fetcher, forwarder = Fetcher(limits), Forwarder(server.port, ADDRESS)
    forwarder.down = True
    back = threading.Timer(0.5, lambda: setattr(forwarder, "down", False))
    back.start()
    found = outcomes(fetcher, [f"http://127.0.0.1:{forwarder.port}/ok?{n}" for n in range(200)])
    assert {fetched.status for fetched in found} == {Status.OK}
    assert forwarder.refused > 0
    fetcher.close()
    forwarder.close()


def test_hosts_in_use_and_those_that_failed_last_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.fetch.hosts.MAX_HOSTS", 4)

    async def ask() -> None:
        hosts = Hosts(LIMITS)
        async with hosts.get("used", 80).slot():
            for n in range(20):
                timeout = asyncio.timeout(None)
                with contextlib.suppress(FetchError), hosts.get(f"dead-{n}", 80).record(timeout):
                    raise FetchError(Status.TIMEOUT, "late")
            assert hosts.get("used", 80).is_busy()
            assert hosts.get("dead-19", 80).has_failed()
            assert not hosts.get("dead-0", 80).has_failed()

    asyncio.run(ask())


def test_load_actors_share_what_a_host_may_be_asked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """91 of them at a host with 16 slots take turns, by a clock of their own."""
    loop, clock = asyncio.SelectorEventLoop(), 0.0

    def skip(timeout: float | None) -> list[object]:
        nonlocal clock
        clock += timeout or 0.0
        return []

    monkeypatch.setattr(loop, "time", lambda: clock)
    monkeypatch.setattr(loop._selector, "select", skip)
    monkeypatch.setattr(hosts, "TURN_S", 0.2)
    monkeypatch.setattr(hosts, "random", Random(1))
    now = most = served = 0

    async def use(host: hosts.Host) -> None:
        nonlocal now, most, served
        async with host.slot():
            now += 1
            most = max(most, now)
            await asyncio.sleep(0.02)
            now -= 1
            served += 1

    async def run() -> None:
        actors = [Hosts(LIMITS_OF_A_RUN, 91).get("a", 80) for _ in range(91)]
        await asyncio.gather(*(use(actor) for actor in actors for _ in range(5)))

    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(run())
    assert served == 91 * 5
    assert 8 < most <= 32
    assert Hosts(LIMITS_OF_A_RUN, 4).get("a", 80)._slots._most == 4


def test_crowded_host_does_not_hold_up_the_others(server: FaultServer) -> None:
    """Forty objects of a slow host come first in the plan; another host behind them need not wait."""
    fetcher = Fetcher(FetchLimits(per_host=2, allow_private_addresses=True, concurrency=100))
    sources = [Source(f"{server.url}/slow?{n}") for n in range(40)]
    with fault_server() as other:
        arrivals = [index for index, _ in fetcher.fetch_many([*sources, Source(f"{other.url}/ok")])]
    assert arrivals.index(40) < 10
    fetcher.close()


def test_signed_query_is_sent_as_given_and_never_told(server: FaultServer, fetcher: Fetcher) -> None:
    query = "X-Amz-Signature=0123%2Fabc%3D%3d&x=%7Etilde+plus"
    fetched = fetcher.fetch(f"{server.url}/403?{query}")
    assert server.paths_in_order == [f"/403?{query}"]
    blocked = fetcher.fetch("http://user:secret@127.0.0.1/?X-Amz-Signature=0123")
    assert "0123" not in f"{fetched.error}{blocked.error}"
    assert "secret" not in f"{blocked.error}"


def test_no_proxy_is_used_whatever_the_environment_says(
    server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with Fetcher(LIMITS) as direct:
        assert direct.fetch(f"{server.url}/ok").status is Status.OK


def test_address_is_judged_where_the_connection_is_made(fetcher: Fetcher) -> None:
    with witness() as (port, seen):
        hosts = ["127.0.0.1", "localhost", "0.0.0.0", "[::1]", "[::ffff:127.0.0.1]", "0x7f.1", "127.1"]
        found = outcomes(fetcher, [f"http://{host}:{port}/" for host in hosts])
    assert {fetched.status for fetched in found} <= {Status.BLOCKED_ADDRESS, Status.INVALID_URI}
    assert seen == []


REFUSED = """
    127.0.0.1 10.1.2.3 172.16.0.1 192.168.1.1 169.254.169.254 0.0.0.0 100.100.100.200 168.63.129.16
    224.0.0.1 255.255.255.255 240.0.0.1 192.0.0.192 198.18.0.1
    ::1 :: fe80::1%eth0 fd00:ec2::254 fec0::1 ff02::1 2001:db8::1 ::7f00:1
    ::ffff:10.0.0.1 64:ff9b::a9fe:a9fe 64:ff9b:1::7f00:1 2002:7f00:1::
    64:ff9b:1:7f00:0:100:808:808 64:ff9b:1::808:808
"""


@pytest.mark.parametrize("address", REFUSED.split())
def test_addresses_that_are_not_the_public_internet_are_refused(address: str) -> None:
    assert block_reason(address)


@pytest.mark.parametrize(
    "address", ["93.184.216.34", "2606:2800:220:1::1", "::ffff:93.184.216.34", "64:ff9b::5db8:d822"]
)
def test_public_addresses_are_not_refused(address: str) -> None:
    assert block_reason(address) is None


@pytest.mark.parametrize(
    ("uri", "status"),
    [
        ("", Status.INVALID_URI),
        ("http://", Status.INVALID_URI),
        ("http:///x.jpg", Status.INVALID_URI),
        ("http://[::1/x", Status.INVALID_URI),
        ("http://a:99999/x", Status.INVALID_URI),
        ("http://[x]@/a.jpg", Status.INVALID_URI),
        ("https://user[1]@/x", Status.INVALID_URI),
        ("what://x/y.jpg", Status.INVALID_URI),
        ("s3://bucket", Status.INVALID_URI),
        ("s3://bucket/", Status.INVALID_URI),
        ("bad\0name.jpg", Status.INVALID_URI),
        ("/dev/zero", Status.INVALID_URI),
        ("/", Status.INVALID_URI),
        ("/no/such/file.jpg", Status.NOT_FOUND),
        ("memory://nothing/here.jpg", Status.NOT_FOUND),
        ("ftp://127.0.0.1/x.jpg", Status.BLOCKED_ADDRESS),
        ("simplecache::http://127.0.0.1/x.jpg", Status.BLOCKED_ADDRESS),
        ("http://no-such-host.invalid/x.jpg", Status.CONNECTION_FAILED),
    ],
)
def test_uri_that_leads_nowhere_gets_a_status(fetcher: Fetcher, uri: str, status: Status) -> None:
    fetched = fetcher.fetch(uri)
    assert (fetched.status, fetched.payload) == (status, None)
    assert fetched.error
    assert "\n" not in fetched.error


class Endless(fsspec.AbstractFileSystem):
    """Objects without a size and without an end."""

    protocol = "endless"

    def info(self, path: str, **_: object) -> dict[str, object]:
        return {"name": path, "size": None, "type": "file"}

    def open(self, path: str, mode: str = "rb", **_: object) -> BinaryIO:
        return Path("/dev/zero").open("rb")


class Hung(fsspec.AbstractFileSystem):
    """A server that does not answer."""

    protocol = "hung"
    restored = threading.Event()

    def info(self, path: str, **_: object) -> dict[str, object]:
        self.restored.wait(20)
        raise FileNotFoundError(path)


def test_object_of_unknown_size_is_read_up_to_the_limit(fetcher: Fetcher) -> None:
    fsspec.register_implementation("endless", Endless, clobber=True)
    assert fetcher.fetch("endless://x/y.jpg").status is Status.TOO_LARGE
    assert free_bytes(fetcher) == LIMITS.max_buffered_bytes


def test_filesystem_that_hangs_stops_no_name_look_up(fetcher: Fetcher) -> None:
    fsspec.register_implementation("hung", Hung, clobber=True)
    found = outcomes(fetcher, [*(f"hung://x/{n}" for n in range(64)), "http://localhost:9/x.jpg"])
    Hung.restored.set()
    assert {fetched.status for fetched in found[:64]} == {Status.TIMEOUT}
    assert found[64].status is Status.BLOCKED_ADDRESS


def test_member_without_bytes_is_empty_wherever_its_shard_is(fetcher: Fetcher, server: FaultServer) -> None:
    shards = ("/tmp/none.tar", f"{server.url}/416.tar", "s3://bucket/shard.tar")
    sources = [Source(f"{shard}#a.jpg", shard, 512, 0) for shard in shards]
    assert {one.payload for _, one in fetcher.fetch_many(sources)} == {b""}


@pytest.mark.parametrize(
    "uri", ["//cdn.example.com/a.jpg", "data:image/png;base64,xx", "data:" + "x" * 9_000,
            "javascript:void(0)", "https:/x", "/" + "x" * 300],
)  # fmt: skip
def test_text_that_names_no_file_is_an_invalid_uri(fetcher: Fetcher, uri: str) -> None:
    assert fetcher.fetch(uri).status is Status.INVALID_URI


@pytest.mark.parametrize("scheme", ["ftp", "webdav", "oss", "arrow_hdfs", "reference", "generic", "zip"])
def test_schemes_that_can_reach_any_host_are_refused(scheme: str) -> None:
    with Fetcher(FetchLimits(max_attempts=1)) as fetcher:
        assert fetcher.fetch(f"{scheme}://127.0.0.1/a.jpg").status is Status.BLOCKED_ADDRESS


def test_pipe_under_the_name_of_another_scheme_hangs_nothing(fetcher: Fetcher, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert fetcher.fetch(f"local://{tmp_path}/pipe").status is Status.NOT_FOUND


@pytest.mark.parametrize("scheme", ["s3", "s3a", "gs", "gcs"])
def test_every_name_of_a_store_opens_its_client(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    key = {"private_key": "", "private_key_id": "", "client_email": "", "disable_oauth": True}
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", json.dumps(key))
    assert objects.open_store(f"{scheme}://bucket", LIMITS)


def test_clients_of_many_buckets_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "open_store", lambda bucket, _limits: bucket)
    client = objects.BucketClient(LIMITS)
    for number in range(1_000):
        client._store("s3://often")
        client._store(f"s3://{number}")
    assert len(client._stores) == objects.MAX_BUCKETS
    assert "s3://often" in client._stores


URI_SEEDS = [
    "http://127.0.0.1:9/a.jpg",
    "https://ex%41mple.invalid/ü?x=1#f",
    "http://user:p@[::1]:80/",
    "http://xn--/",
    "http://\u2100.invalid/",
    "s3://bucket/key",
    "az://container/../x",
    "abfss://c@a.invalid/x",
    "file:///tmp/x",
    "memory://\ud800",
    "zip://x",
    "data:image/png;base64,xx",
    "~nobody_/x",
]


def test_any_text_as_a_uri_gets_a_status(monkeypatch: pytest.MonkeyPatch) -> None:
    """600 mutations, fixed seed; one of them once made the object-store client panic."""
    for name, value in {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "a"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    random = Random(3)
    junk = [*"%:/@[]#? \\\0\x7fé", "%zz", "::", "..", "\u202e", "\r\n"]
    uris = []
    for _ in range(600):
        text = list(random.choice(URI_SEEDS))
        for _ in range(random.randint(1, 4)):
            text.insert(random.randrange(len(text) + 1), random.choice(junk))
            del text[random.randrange(len(text))]
        uris.append("".join(text))
    fetcher = Fetcher(replace(LIMITS, backoff_s=0.01, max_attempts=1, total_timeout_s=1))
    found = outcomes(fetcher, uris)
    fetcher.close()
    assert Status.OK not in {fetched.status for fetched in found}
    assert all(fetched.error and "\n" not in fetched.error for fetched in found)


def test_local_names_of_every_kind_are_found(fetcher: Fetcher, tmp_path: Path) -> None:
    for name in ("a b.jpg", "100%.jpg", "q?x#y.jpg", "ü.jpg"):
        (tmp_path / name).write_bytes(name.encode())
        assert fetcher.fetch(str(tmp_path / name)).payload == name.encode()
        assert fetcher.fetch((tmp_path / name).as_uri()).payload == name.encode()


def test_named_pipe_and_file_over_the_limit_cost_nothing(fetcher: Fetcher, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    with (tmp_path / "large.jpg").open("wb") as file:
        file.truncate(LIMITS.max_bytes + 1)
    assert fetcher.fetch(str(tmp_path / "pipe.jpg")).status is Status.INVALID_URI
    assert fetcher.fetch(str(tmp_path / "large.jpg")).status is Status.TOO_LARGE


@pytest.mark.parametrize("kind", ["file", "large", "large-chunked"])
def test_large_objects_share_a_bounded_memory(server: FaultServer, tmp_path: Path, kind: str) -> None:
    """Twenty objects of 900 kB, four megabytes for them: all arrive, though the caller is slow."""
    (tmp_path / "large.jpg").write_bytes(bytes(900_000))
    uri = str(tmp_path / "large.jpg") if kind == "file" else f"{server.url}/{kind}"
    fetcher = Fetcher(LIMITS)
    arrived = 0
    for _, fetched in fetcher.fetch_many([Source(uri)] * 20):
        arrived += len(fetched.payload or b"")
        time.sleep(0.01)
        assert 0 <= free_bytes(fetcher) < LIMITS.max_buffered_bytes
    assert arrived == 20 * 900_000
    assert fetcher.fetch(uri).status is Status.OK
    fetcher.close()


def test_slow_large_bodies_hold_up_no_others(server: FaultServer) -> None:
    """Twenty bodies that claim three times the memory trickle in; all good images arrive before them."""
    limits = replace(LIMITS, max_bytes=64_000_000, max_buffered_bytes=400_000_000)
    sources = [Source(f"{server.url}/trickle?{n}") for n in range(20)]
    sources += [Source(f"{server.url}/{path}?{n}") for path in ("ok", "large") for n in range(50)]
    with Fetcher(limits) as fetcher:
        arrived = list(fetcher.fetch_many(sources))
        assert [fetched.status for _, fetched in arrived] == [Status.OK] * 100 + [Status.TIMEOUT] * 20
        assert free_bytes(fetcher) == limits.max_buffered_bytes


def test_streamed_bodies_that_outgrow_the_small_half_all_arrive(server: FaultServer) -> None:
    """Bodies of unknown size move to the large half, one at a time; the bound holds while they do."""
    limits = replace(LIMITS, max_bytes=1_000_000, max_buffered_bytes=1_200_000)
    with Fetcher(limits) as fetcher:
        for _, fetched in fetcher.fetch_many([Source(f"{server.url}/large-chunked")] * 10):
            assert len(fetched.payload or b"") == 900_000
            assert 0 <= free_bytes(fetcher) <= limits.max_buffered_bytes - 900_000


def test_caller_that_stops_listening_leaves_nothing_held(server: FaultServer, tmp_path: Path) -> None:
    (tmp_path / "large.jpg").write_bytes(bytes(900_000))
    fetcher = Fetcher(LIMITS)
    sources = [Source(f"{server.url}/silent"), *[Source(str(tmp_path / "large.jpg"))] * 30]
    for _ in fetcher.fetch_many(sources):
        break
    deadline = time.monotonic() + 3
    while free_bytes(fetcher) != LIMITS.max_buffered_bytes and time.monotonic() < deadline:
        time.sleep(0.02)
    assert free_bytes(fetcher) == LIMITS.max_buffered_bytes
    assert fetcher.fetch(f"{server.url}/ok").status is Status.OK
    fetcher.close()


def test_two_threads_fetch_at_once_and_each_gets_its_own(server: FaultServer, fetcher: Fetcher) -> None:
    asked = {name: [f"{server.url}/echo?{name}{n}" for n in range(100)] for name in "ab"}
    found: dict[str, list[tuple[int, str]]] = {}

    def work(name: str) -> None:
        sources = [Source(uri) for uri in asked[name]]
        found[name] = [(n, (fetched.payload or b"").decode()) for n, fetched in fetcher.fetch_many(sources)]

    threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, uris in asked.items():
        assert sorted(found[name]) == [(n, uri.removeprefix(server.url)) for n, uri in enumerate(uris)]


def test_close_ends_requests_that_hang(server: FaultServer) -> None:
    fetcher = Fetcher(FetchLimits(allow_private_addresses=True))
    waiting = fetcher.fetch_many([Source(f"{server.url}/silent"), Source(f"{server.url}/ok")])
    next(waiting)
    began = time.monotonic()
    threading.Timer(0.1, fetcher.close).start()
    with pytest.raises(RuntimeError, match="closed"):
        next(waiting)
    assert time.monotonic() - began < 1


def test_process_that_ends_with_an_open_fetcher_says_nothing() -> None:
    code = "from pipelines.fetch.fetch import Fetcher; print(Fetcher().fetch('/no/such').status)"
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=30
    )
    assert (done.stdout, done.stderr) == ("not_found\n", "")


def test_member_of_a_tar_is_read_by_its_byte_range(fetcher: Fetcher, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "shard-000.tar", "w") as tar:
        for n in range(3):
            for name, payload in ((f"d/{n}.jpg", BODY[n:]), (f"d/{n}.json", b"{}")):
                member = tarfile.TarInfo(name)
                member.size = len(payload)
                tar.addfile(member, io.BytesIO(payload))
    frozen = plan(str(tmp_path / "shard-000.tar"), open_storage(str(tmp_path / "state")))
    items = frozen.read(0, frozen.n_items)
    assert [row[0]["key"] for row in items["table_rows"].to_pylist()] == ["d/0", "d/1", "d/2"]
    payloads = dict(fetcher.fetch_many(sources_of(items)))
    assert [payloads[n].payload for n in range(3)] == [BODY[n:] for n in range(3)]
    with (tmp_path / "shard-000.tar").open("r+b") as file:
        file.truncate(items["offset"][2].as_py() + 10)
    cut = dict(fetcher.fetch_many(sources_of(items)))
    assert [cut[n].status for n in range(3)] == [Status.OK, Status.OK, Status.TRUNCATED]


@pytest.mark.parametrize("hugging_face", [True, False])
def test_images_inside_parquet_are_read_in_place(
    fetcher: Fetcher, tmp_path: Path, hugging_face: bool
) -> None:
    payloads = [bytes([n]) * (n * 100) for n in range(1, 60)] + [None, bytes(LIMITS.max_bytes + 1)]
    values = (
        [{"bytes": one, "path": f"{n}.jpg"} for n, one in enumerate(payloads)] if hugging_face else payloads
    )
    table = pa.table({"image": pa.array(values), "label": list(range(61))})
    pq.write_table(table, tmp_path / "train.parquet", row_group_size=7)
    frozen = plan(str(tmp_path), open_storage(str(tmp_path / "state")))
    items = frozen.read(0, frozen.n_items)
    rows = [row for rows in items["table_rows"].to_pylist() for row in rows]
    assert [row["label"] for row in rows] == list(range(61))
    assert rows[3].get("image_path") == ("3.jpg" if hugging_face else None)
    found = dict(fetcher.fetch_many(sources_of(items)))
    assert [found[n].payload for n in range(59)] == payloads[:59]
    assert [found[59].status, found[60].status] == [Status.EMPTY, Status.TOO_LARGE]
    backwards = items.take(list(range(58, -1, -1)))
    assert {index: one.payload for index, one in fetcher.fetch_many(sources_of(backwards))} == {
        58 - n: payloads[n] for n in range(59)
    }
    (tmp_path / "train.parquet").unlink()
    with Fetcher(LIMITS) as another:
        gone = another.fetch_many(sources_of(frozen.read(30, 40)))
        assert {one.status for _, one in gone} == {Status.NOT_FOUND}


def test_table_that_its_bucket_refuses_is_a_passing_failure(
    server: FaultServer, fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key that is wrong or an outage must not be recorded as images that are not there."""
    for name, value in {"AWS_ENDPOINT_URL": server.url, "AWS_ACCESS_KEY_ID": "a"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    storage = open_storage("s3://403/folder", patience_s=0.2)
    with pytest.raises(StorageError, match="403"):
        storage.open_input("train.parquet")
    with pytest.raises(FileNotFoundError):
        open_storage("s3://404/folder").open_input("train.parquet")
    sources = [
        Source(f"s3://{bucket}/t.parquet#0", f"s3://{bucket}/t.parquet", 0, None, "image")
        for bucket in ("403", "404")
    ]
    found = dict(fetcher.fetch_many(sources))
    assert [found[0].status, found[1].status] == [Status.CONNECTION_FAILED, Status.NOT_FOUND]


def test_object_store_that_refuses_our_keys_or_clock_is_a_passing_failure(
    server: FaultServer, fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"AWS_ENDPOINT_URL": server.url, "AWS_ACCESS_KEY_ID": "a"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    buckets = ("s3-expired-token", "s3-skewed-clock", "s3-request-timeout", "s3-denied")
    found = outcomes(fetcher, [f"s3://{bucket}/a.jpg" for bucket in buckets])
    assert [fetched.status for fetched in found] == [
        Status.CREDENTIALS_FAILED,
        Status.CREDENTIALS_FAILED,
        Status.TIMEOUT,
        Status.DENIED,
    ]
    assert [fetched.status in TRANSIENT for fetched in found] == [True, True, True, False]
    assert "ExpiredToken" in f"{found[0].error}"


class CountingFile(io.FileIO):
    n_bytes = 0

    def read(self, size: int | None = -1, /) -> bytes:
        found = super().read(-1 if size is None else size) or b""
        CountingFile.n_bytes += len(found)
        return found


@pytest.fixture
def images_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], tuple[str, list[bytes]]]:
    """Writes 16,000 images of 2 kB in row groups of so many, and counts what is read of them."""
    monkeypatch.setattr("pipelines.fetch.parquet.open_input", lambda uri: pa.PythonFile(CountingFile(uri)))
    monkeypatch.setattr(CountingFile, "n_bytes", 0)

    def write(row_group_size: int) -> tuple[str, list[bytes]]:
        payloads = [Random(n).randbytes(2_000) for n in range(16_000)]
        path = tmp_path / "train.parquet"
        pq.write_table(pa.table({"image": payloads}), path, row_group_size=row_group_size, compression="none")
        return str(path), payloads

    return write


@pytest.mark.parametrize("block", [50, 1_000], ids=["in turn", "each a sixteenth"])
@pytest.mark.parametrize("row_group_size", [100, 1_000, 4_000, 16_000])
def test_table_of_images_is_read_once_by_sixteen_calls(
    images_table: Callable[[int], tuple[str, list[bytes]]], row_group_size: int, block: int
) -> None:
    """Each call takes its block 50 rows at a time, in turn with the others, which may be far ahead."""
    path, payloads = images_table(row_group_size)
    planned = ContainerVersion(Path(path).stat().st_size, "")
    reader = EmbeddedReader()
    for first in range(0, 16_000, 16 * block):
        for start in range(0, block, 50):
            for call in reversed(range(16)):
                rows = range(first + call * block + start, min(first + call * block + start + 50, 16_000))
                found = [payload.as_py() for payload in reader.read(path, "image", rows, planned)]
                assert found == payloads[rows.start : rows.stop]
    assert CountingFile.n_bytes <= 1.1 * planned.size_bytes
    assert not any(cursor.kept_bytes or cursor.users for cursor in reader._open)


def test_scattered_images_of_a_table_are_read_once_and_again_where_they_are_asked_for_again(
    images_table: Callable[[int], tuple[str, list[bytes]]],
) -> None:
    path, payloads = images_table(4_000)
    reader = EmbeddedReader()
    for times in (1, 2):
        scattered = [payload.as_py() for payload in reader.read(path, "image", range(0, 16_000, 300))]
        assert scattered == payloads[::300]
        assert CountingFile.n_bytes <= 1.1 * times * Path(path).stat().st_size


def test_what_calls_leave_unread_is_dropped_beyond_the_memory(
    images_table: Callable[[int], tuple[str, list[bytes]]], caplog: pytest.LogCaptureFixture
) -> None:
    path, payloads = images_table(1_000)
    planned = ContainerVersion(Path(path).stat().st_size, "")
    reader = EmbeddedReader(max_bytes=1_000_000)
    for row in range(999, 16_000, 1_000):
        assert [one.as_py() for one in reader.read(path, "image", [row], planned)] == [payloads[row]]
        assert sum(cursor.kept_bytes for cursor in reader._open) <= 1_000_000 + 1.1 * 1_000 * 2_000
    assert [one.as_py() for one in reader.read(path, "image", range(1_500))] == payloads[:1_500]
    assert caplog.text.count("--fetch.max-buffered-bytes") == 1


FORMS = [(form, listed, moved) for form in ("tar", "parquet") for listed in (0, 1) for moved in (0, 1)]


@pytest.mark.parametrize(("form", "listed", "moved"), FORMS)
def test_container_that_changed_after_planning_gives_no_other_image(
    tmp_path: Path, form: str, listed: bool, moved: bool
) -> None:
    """Five rows in reverse order, of equal size: overwritten in place or by a rename."""

    def write(path: Path, payloads: list[bytes]) -> None:
        if form == "parquet":
            pq.write_table(pa.table({"image": payloads}), path)
            return
        with tarfile.open(path, "w") as tar:
            for n, payload in enumerate(payloads):
                member = tarfile.TarInfo(f"{n}.jpg")
                member.size = len(payload)
                tar.addfile(member, io.BytesIO(payload))

    payloads = [bytes([n]) * 999 for n in range(5)]
    path = tmp_path / "shards" / f"latest.{form}"
    path.parent.mkdir()
    write(path, payloads)
    inventory = path.parent if listed else path
    frozen = plan(str(inventory), open_storage(str(tmp_path / "state")))
    containers = {file.uri: ContainerVersion(file.size_bytes, file.version) for file in frozen.containers}
    sources = sources_of(frozen.read(0, 5), containers)
    with Fetcher(LIMITS) as fetcher:
        before = dict(fetcher.fetch_many(sources[:2]))
        assert [before[n].payload for n in range(2)] == payloads[:2]
        write(path.with_suffix(".new") if moved else path, payloads[::-1])
        if moved:
            path.with_suffix(".new").replace(path)
        after = dict(fetcher.fetch_many(sources))
    with Fetcher(LIMITS) as another:
        after |= {5 + n: one for n, one in another.fetch_many(sources)}
    for n, one in after.items():  # an open table may serve what it read before
        assert one.status == Status.SOURCE_CHANGED or one.payload == payloads[n % 5]
    assert {after[n].status for n in range(5, 10)} == {Status.SOURCE_CHANGED}


@pytest.mark.parametrize(("code", "expected"), [(503, Status.SERVER_ERROR), (404, Status.NOT_FOUND)])
def test_table_that_its_web_server_fails_to_serve_is_tried_again(code: int, expected: Status) -> None:
    opened = []

    class Failing(EmbeddedReader):
        def read(self, container: str, *_: object) -> Iterator[pa.Scalar]:
            opened.append(container)
            answer = ClientResponseError(None, (), status=code)  # type: ignore[arg-type]
            raise FileNotFoundError(container) from answer

    sources = [(row, Source("", "https://a/t.parquet", row, payload_column="image")) for row in range(3)]
    found = dict(read_embedded(Failing(), sources, LIMITS))
    assert {error.status for error in found.values() if isinstance(error, FetchError)} == {expected}
    assert len(opened) == (LIMITS.max_attempts if code == 503 else 1)


def test_table_that_breaks_off_keeps_the_rows_that_were_read() -> None:
    class Breaking(EmbeddedReader):
        def read(self, *_: object) -> Iterator[pa.Scalar]:
            yield pa.scalar(b"first")
            raise GenericError("the server is gone")

    sources = [(row, Source("", "s3://b/t.parquet", row, payload_column="image")) for row in range(3)]
    found = dict(read_embedded(Breaking(), sources, LIMITS))
    assert found[0] == b"first"
    failures = [outcome.status for outcome in found.values() if isinstance(outcome, FetchError)]
    assert failures == [Status.CONNECTION_FAILED] * 2


REAL_S3 = urlsplit(os.environ.get("AWS_ENDPOINT_URL", "")).hostname in ("127.0.0.1", "localhost")


@pytest.fixture(scope="module")
def s3_port() -> Iterator[int]:
    """A real S3 server if the environment names one on this machine, else moto's."""
    if REAL_S3:
        yield urlsplit(os.environ["AWS_ENDPOINT_URL"]).port or 80
        return
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    yield server.get_host_and_port()[1]
    server.stop()


@pytest.fixture
def s3(s3_port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Forwarder]:
    """A bucket `fetch-test`, reached through a port that can be cut off."""
    s3fs.S3FileSystem.clear_instance_cache()  # it would still use the endpoint of the test before
    forwarder = Forwarder(s3_port)
    keys = {"AWS_ACCESS_KEY_ID": "test-access", "AWS_SECRET_ACCESS_KEY": "test-secret-key-0123456789"}
    for name, value in keys.items():
        monkeypatch.setenv(name, os.environ.get(name, value))
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{forwarder.port}")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    client = boto3.client("s3")
    with contextlib.suppress(client.exceptions.BucketAlreadyOwnedByYou):
        client.create_bucket(Bucket="fetch-test")
    for key in S3_KEYS:
        client.put_object(Bucket="fetch-test", Key=key, Body=key.encode())
    client.put_object(Bucket="fetch-test", Key="large.jpg", Body=bytes(LIMITS.max_bytes + 1))
    yield forwarder
    forwarder.close()


S3_KEYS = [
    "a.jpg",
    "a b%20c.jpg",
    "x//y.jpg",
    "ü.jpg",
    "/lead.jpg",
    "listed/q?x=1#f.jpg",
    "listed/ü%20.jpg",
    "plus+.jpg",
]


@pytest.mark.s3
def test_bucket_keys_are_taken_literally(s3: Forwarder, fetcher: Fetcher) -> None:
    found = outcomes(fetcher, [f"s3://fetch-test/{key}" for key in S3_KEYS])
    assert [fetched.payload for fetched in found] == [key.encode() for key in S3_KEYS]


@pytest.mark.s3
def test_bucket_that_refuses_gives_each_object_its_reason(s3: Forwarder, fetcher: Fetcher) -> None:
    uris = ["s3://fetch-test/missing.jpg", "s3://no-such-bucket/a.jpg", "s3://fetch-test/large.jpg"]
    found = outcomes(fetcher, uris)
    assert [one.status for one in found] == [Status.NOT_FOUND, Status.NOT_FOUND, Status.TOO_LARGE]
    assert "NoSuchBucket" in f"{found[1].error}"


@pytest.mark.s3
@pytest.mark.skipif(not REAL_S3, reason="moto checks no signatures")
def test_wrong_key_is_a_failure_of_the_credentials(s3: Forwarder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    fetcher = Fetcher(LIMITS)
    fetched = fetcher.fetch("s3://fetch-test/a.jpg")
    assert fetched.status is Status.CREDENTIALS_FAILED
    assert "test-access" not in f"{fetched.error}"
    fetcher.close()


@pytest.mark.s3
def test_part_of_an_object_is_read_by_its_range(s3: Forwarder, fetcher: Fetcher) -> None:
    sources = [Source("u", "s3://fetch-test/a.jpg", 1, 3), Source("u", "s3://fetch-test/a.jpg", 3, 30)]
    found = dict(fetcher.fetch_many(sources))
    assert found[0].payload == b".jp"
    assert found[1].status is Status.TRUNCATED


@pytest.mark.s3
def test_wait_for_memory_does_not_count_as_an_objects_time(s3: Forwarder) -> None:
    """Whoever takes the images is slow, and there is memory for four of ten at once."""
    boto3.client("s3").put_object(Bucket="fetch-test", Key="900kB.jpg", Body=bytes(900_000))
    limits = FetchLimits(max_bytes=1_000_000, max_buffered_bytes=4_000_000, total_timeout_s=1, max_attempts=1)
    statuses = []
    with Fetcher(limits) as fetcher:
        for batch in fetcher.fetch_batches([Source("s3://fetch-test/900kB.jpg")] * 10):
            statuses += [fetched.status for _, fetched in batch]
            time.sleep(1.2)
    assert statuses == [Status.OK] * 10


@pytest.mark.s3
def test_outage_of_the_object_store_is_outlasted(s3: Forwarder) -> None:
    """Cut off for a second in the middle of 200 objects: all arrive, some at a later attempt."""
    fetcher = Fetcher(FetchLimits(backoff_s=0.4, concurrency=8))
    arrived = []
    for index, fetched in fetcher.fetch_many([Source("s3://fetch-test/a.jpg")] * 200):
        arrived.append(fetched)
        if index == 20:
            s3.cut()
            threading.Timer(1.0, lambda: setattr(s3, "down", False)).start()
    assert {fetched.status for fetched in arrived} == {Status.OK}
    assert s3.refused > 0
    fetcher.close()


@pytest.mark.s3
def test_unreachable_object_store_is_a_passing_failure(s3: Forwarder, fetcher: Fetcher) -> None:
    s3.cut()
    refused = s3.refused
    assert fetcher.fetch("s3://fetch-test/a.jpg").status is Status.CONNECTION_FAILED
    assert s3.refused - refused == LIMITS.max_attempts


@pytest.mark.s3
def test_prefix_of_a_bucket_is_an_inventory(s3: Forwarder, fetcher: Fetcher, tmp_path: Path) -> None:
    state = open_storage(str(tmp_path / "state"))
    frozen = plan("s3://fetch-test/listed/", state)
    items = frozen.read(0, frozen.n_items)
    found = {items["uri"][index].as_py(): one.payload for index, one in fetcher.fetch_many(sources_of(items))}
    assert found == {f"s3://fetch-test/{key}": key.encode() for key in S3_KEYS if "listed" in key}
    assert plan("s3://fetch-test/listed/", state) == frozen
    with pytest.raises(InputError, match=r"x//y\.jpg.*table"):
        plan("s3://fetch-test", open_storage(str(tmp_path / "other")))
    with pytest.raises(StorageRefused, match="no-such-bucket"):
        plan("s3://no-such-bucket/x", open_storage(str(tmp_path / "other")))


def test_back_off_grows_with_jitter_and_retry_after_reads_dates() -> None:
    assert [backoff_s(n, 1.0, 0.5) for n in (1, 2, 3)] == [1.0, 2.5, 6.25]
    assert backoff_s(1, 1.0, 0.0) == 0.5
    now = datetime(2026, 11, 21, 12, 0, 0, tzinfo=UTC)
    assert parse_retry_after("Sat, 21 Nov 2026 12:00:07 GMT", now) == 7
    assert parse_retry_after("120", now) == 120
    assert [parse_retry_after(text, now) for text in (None, "", "soon")] == [None, None, None]
    assert [parse_retry_after(text, now) for text in ("-5", "nan", "inf", "1e9")] == [0, 0, 3600, 3600]


class Panic(BaseException):
    """Like pyo3's PanicException, which no `except Exception` catches."""


@pytest.mark.parametrize("kind", [KeyError, MemoryError, Panic])
def test_unexpected_exception_is_the_status_of_its_object_alone(
    kind: type[BaseException],
    server: FaultServer,
    fetcher: Fetcher,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def broken(*_: object) -> None:
        raise kind("ours\nsk_secret")

    monkeypatch.setattr(retry, "_logged", set())
    monkeypatch.setattr(fetcher._downloader._buckets, "get", broken)
    uris = [f"{server.url}/ok", *(f"s3://bucket/{n}.jpg" for n in range(5)), f"{server.url}/ok"]
    found = outcomes(fetcher, uris)
    assert [one.status for one in found] == [Status.OK, *[Status.INTERNAL_ERROR] * 5, Status.OK]
    assert kind.__name__ in f"{found[1].error}"
    assert "\n" not in f"{found[1].error}"
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "broken" in caplog.text
    assert free_bytes(fetcher) == LIMITS.max_buffered_bytes


def test_closing_wakes_those_who_wait_for_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More files than threads read at once: `close` cancels those that nobody has begun to read."""
    closing = threading.Event()
    monkeypatch.setattr("pipelines.fetch.files.read_source", lambda *_: Fetched.of(bytes(closing.wait())))
    fetcher = Fetcher()
    arriving = fetcher.fetch_many([Source(str(tmp_path / f"{n}.jpg")) for n in range(3 * FILE_THREADS)])
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(list, arriving)
        while fetcher._file_threads._work_queue.qsize() < 2 * FILE_THREADS:
            time.sleep(0.01)
        fetcher.close()
        closing.set()
        with pytest.raises(RuntimeError, match="closed"):
            waiting.result(timeout=20)


def test_unexpected_exception_for_a_file_is_its_status(
    fetcher: Fetcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> bytes:
        raise TypeError("ours")

    monkeypatch.setattr("pipelines.fetch.files.read_local", broken)
    assert fetcher.fetch(str(tmp_path / "a.jpg")).status is Status.INTERNAL_ERROR


@pytest.mark.parametrize(
    ("error", "status"),
    [(TypeError("ours"), Status.INTERNAL_ERROR), (ClientPayloadError("503"), Status.CONNECTION_FAILED)],
)
def test_exception_while_reading_a_table_is_the_status_of_its_rows(error: Exception, status: Status) -> None:
    class Broken(EmbeddedReader):
        def read(self, *_: object) -> Iterator[pa.Scalar]:
            yield pa.scalar(b"first")
            raise error

    sources = [(row, Source("", "s3://b/t.parquet", row, payload_column="image")) for row in range(2)]
    found = dict(read_embedded(Broken(), sources, LIMITS))
    assert found[0] == b"first"
    assert isinstance(found[1], FetchError)
    assert found[1].status is status


def test_fetcher_works_inside_a_running_event_loop(server: FaultServer, fetcher: Fetcher) -> None:
    async def inside() -> Fetched:
        return fetcher.fetch(f"{server.url}/empty")

    assert asyncio.run(inside()).payload == b""
