"""A file of many images that is replaced is never read as the one that was planned, wherever it is."""

import io
import ssl
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from aiohttp import connector

from pipelines.fetch.fetch import Fetcher
from pipelines.fetch.settings import FetchLimits
from pipelines.fetch.source import ContainerVersion, sources_of
from pipelines.inventory.inventory import plan
from pipelines.inventory.settings import InventoryOptions
from pipelines.messages import InputError
from pipelines.status import Status
from pipelines.storage.storage import open_storage
from tests.builders.etag_server import ADDRESS, EtagServer

N_IMAGES = 12
TRIES = 20
LIMITS = FetchLimits(max_attempts=1, concurrency=4, allowed_networks=(f"{ADDRESS}/32",))


@dataclass
class Place:
    """A folder of files that can be replaced."""

    uri: str
    put: Callable[[str, bytes], None]


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> ssl.SSLContext:
    """Of a server whose certificate this process trusts."""
    certificate = str(tmp_path_factory.mktemp("tls") / "certificate.pem")
    subprocess.run(
        f"openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=test -days 1 -keyout {certificate}.key "
        f"-addext subjectAltName=IP:{ADDRESS} -out {certificate}".split(),
        check=True,
        capture_output=True,
    )
    connector._SSL_CONTEXT_VERIFIED.load_verify_locations(certificate)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate, f"{certificate}.key")
    return server


@pytest.fixture(params=["local", "https", pytest.param("s3", marks=pytest.mark.s3)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    if request.param == "https":
        server = EtagServer(request.getfixturevalue("tls"))
        yield Place(
            server.url("", "ranges"), lambda name, payload: server.images.update({f"/{name}": payload})
        )
        server.close()
        return
    storage = open_storage(
        f"{request.getfixturevalue('bucket')}/containers" if request.param == "s3" else str(tmp_path / "in")
    )
    yield Place(storage.uri, storage.put)


def image(number: int) -> bytes:
    return f"image {number:02d}".encode().ljust(3_000, b".")


def encode(form: str, version: int) -> bytes:
    """The images in another order in each version, and every file of the same size."""
    order = range(N_IMAGES) if version % 2 else reversed(range(N_IMAGES))
    images = [image(number) for number in order]
    sink = io.BytesIO()
    if form == "parquet":
        pq.write_table(pa.table({"image": images}), sink, row_group_size=5, compression="none")
        return sink.getvalue()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for number, payload in enumerate(images):
            member = tarfile.TarInfo(f"{number:02d}.jpg")
            member.size = len(payload)
            tar.addfile(member, io.BytesIO(payload))
    return sink.getvalue()


@pytest.mark.parametrize("form", ["tar", "parquet"])
def test_images_of_a_file_replaced_during_a_run_are_the_planned_ones_or_none(
    place: Place, form: str, tmp_path: Path
) -> None:
    """Replaced before the first image, and after each quarter, by a file of the same size."""
    before, after = encode(form, 1), encode(form, 2)
    assert len(before) == len(after)
    n_changed = 0
    with Fetcher(LIMITS) as fetcher:
        for number in range(TRIES):
            name = f"{number}.{form}"
            place.put(name, before)
            frozen = plan(f"{place.uri}/{name}", open_storage(str(tmp_path / f"state-{number}")))
            versions = {one.uri: ContainerVersion(one.size_bytes, one.version) for one in frozen.containers}
            sources = sources_of(frozen.items([(0, N_IMAGES)]), versions)
            for start in range(0, N_IMAGES, 3):
                if start == number % 4 * 3:
                    place.put(name, after)
                for index, fetched in fetcher.fetch_many(sources[start : start + 3]):
                    assert fetched.status in (Status.OK, Status.SOURCE_CHANGED), fetched.error
                    assert fetched.payload in (None, image(start + index))
                    n_changed += fetched.status is Status.SOURCE_CHANGED
    assert n_changed >= TRIES * N_IMAGES // 4


@pytest.mark.parametrize("form", ["tar", "parquet"])
def test_file_replaced_between_two_starts_is_refused(place: Place, form: str, tmp_path: Path) -> None:
    for number in range(TRIES):
        uri = f"{place.uri}/{number}.{form}"
        state = open_storage(str(tmp_path / f"state-{number}"))
        place.put(f"{number}.{form}", encode(form, 1))
        plan(uri, state)
        place.put(f"{number}.{form}", encode(form, 2))
        for keep in (False, True):
            with pytest.raises(InputError, match=r"another output folder|no longer, that inventory"):
                plan(uri, state, options=InventoryOptions(keep_plan=keep))
