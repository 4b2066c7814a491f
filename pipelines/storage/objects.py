"""A prefix of a bucket in S3, Google Cloud Storage or Azure as a storage, through obstore.

Its conditional put fences two drivers, in the ledger (If-None-Match) and in the table (If-Match). Requests
are repeated during an outage of the server; obstore's errors, 30 lines of internals each, become one
sentence.
"""

import contextlib
import errno
import logging
import os
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.fs as pafs

from pipelines.messages import redact
from pipelines.storage.uris import (
    AlreadyExists,
    Entry,
    StorageError,
    StorageRefused,
    Version,
    join,
    scheme_of,
)

PATIENCE_S = 120.0
"""How long a request is repeated while the server answers 5xx or nothing, seconds."""

SILENCE_S = 8.0
"""After so long without an answer the store is named in the log, seconds."""

REQUEST_S = 60
"""Time limit of one request, seconds; an upload of a large file gets more."""

SLOWEST_BYTES_PER_S = 250_000
"""Rate below which an upload times out."""

SINGLE_PUT_BYTES = 2 << 30
"""Largest file that is put conditionally: in one request, from memory. obstore cannot in parts."""

OBJECT_SCHEMES = {
    "s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs",
    "az": "az", "azure": "az", "abfs": "abfs", "abfss": "abfss",
}  # fmt: skip
"""URI schemes that go through obstore -> the name that obstore knows each by."""


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ObjectStorage:
    """A prefix in a bucket of S3, Google Cloud Storage or Azure."""

    uri: str
    patience_s: float = PATIENCE_S
    fenced = True

    def __reduce__(self) -> tuple[Any, ...]:
        return ObjectStorage, (self.uri, self.patience_s)

    @cached_property
    def store(self) -> Any:
        """The obstore client, opened on first use in each process."""
        return object_store(self.uri, patience_s=self.patience_s)

    def read(self, path: str) -> bytes:
        with self._explained(path):
            return bytes(self.store.get(path).bytes())

    def put(self, path: str, payload: bytes) -> None:
        with self._explained(path):
            self.store.put(path, payload)

    def put_file(self, path: str, local_file: Path) -> None:
        with self._explained(path):
            self.store.put(path, local_file)

    def version(self, path: str) -> Version | None:
        try:
            with self._explained(path):
                found = self.store.head(path)
        except FileNotFoundError:
            return None
        return Version(found["e_tag"], found["version"])

    def put_file_over(self, path: str, local_file: Path, seen: Version | None) -> None:
        if (size := local_file.stat().st_size) > SINGLE_PUT_BYTES:
            self.put_file(path, local_file)
            return
        store = self._store_for(size)
        for mode in _conditions(seen):
            with contextlib.suppress(AlreadyExists):
                self._put_if(store, path, local_file, mode)
                return
        if self.size(path) != size or self.read(path) != local_file.read_bytes():
            raise AlreadyExists(f"{join(self.uri, path)} was written by another process")

    def create(self, path: str, payload: bytes) -> None:
        try:
            self._put_if(self.store, path, payload, "create")
        except AlreadyExists:
            if self.read(path) != payload:
                raise

    def _put_if(self, store: Any, path: str, content: bytes | Path, mode: Any) -> None:
        """One conditional request. Raises AlreadyExists when refused, if only for its own earlier success."""
        from obstore.exceptions import AlreadyExistsError, GenericError, PreconditionError

        deadline = time.monotonic() + self.patience_s
        while True:
            try:
                with self._explained(path, AlreadyExistsError, PreconditionError, GenericError):
                    store.put(path, content, mode=mode, use_multipart=False)
                return
            except (AlreadyExistsError, PreconditionError):
                raise AlreadyExists(f"{join(self.uri, path)} was written by another process") from None
            except GenericError as error:
                # Some servers answer a lost race with 500, and an answer can get lost: read to find out.
                if time.monotonic() > deadline:
                    raise StorageError(self._message(path, error)) from error
                time.sleep(0.2)

    def _store_for(self, n_bytes: int) -> Any:
        """A client whose requests may take as long as an upload of so many bytes."""
        longer_s = n_bytes / SLOWEST_BYTES_PER_S - REQUEST_S
        if longer_s <= 0:
            return self.store
        return object_store(self.uri, patience_s=self.patience_s + longer_s, request_s=REQUEST_S + longer_s)

    def exists(self, path: str) -> bool:
        try:
            self.size(path)
        except FileNotFoundError:
            return False
        return True

    def size(self, path: str) -> int:
        with self._explained(path):
            return int(self.store.head(path)["size"])

    def list(self, prefix: str = "") -> list[Entry]:
        with self._explained(prefix):
            found = [meta for chunk in self.store.list(prefix or None) for meta in chunk]
        entries = [Entry(meta["path"], meta["size"], meta["e_tag"], meta["last_modified"]) for meta in found]
        return sorted(entries, key=lambda entry: entry.path)

    def delete(self, *paths: str) -> None:
        with contextlib.suppress(FileNotFoundError), self._explained(paths[0] if paths else ""):
            self.store.delete(list(paths))

    def open_input(self, path: str) -> Any:
        filesystem, folder = self._filesystem_and_folder()
        # Not pyarrow's open_input_file: it asks isfile() first, to which any failure means "no such file".
        n_bytes = self.size(path)
        return pa.PythonFile(filesystem.open(f"{folder}/{path}", size=n_bytes), mode="r")

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        with self._explained(path):
            return bytes(self.store.get_range(path, start=start, end=stop))

    def filesystem_and_path(self) -> tuple[pafs.FileSystem, str]:
        filesystem, folder = self._filesystem_and_folder()
        return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), folder

    def _filesystem_and_folder(self) -> tuple[Any, str]:
        """This folder's fsspec filesystem and its path there."""
        from obstore.fsspec import FsspecStore

        protocol: Any = OBJECT_SCHEMES[scheme_of(self.uri)]
        filesystem = FsspecStore(protocol, **store_settings(self.uri, self.patience_s))
        return filesystem, "/".join(_bucket_and_prefix(self.uri)).rstrip("/")

    @contextlib.contextmanager
    def _explained(self, path: str, *passed: type[Exception]) -> Iterator[None]:
        from obstore.exceptions import BaseError, NotFoundError

        try:
            with self._named_when_silent(path):
                yield
        except passed:
            raise
        except (NotFoundError, FileNotFoundError) as error:
            if "NoSuchBucket" in str(error) or "ContainerNotFound" in str(error):
                raise StorageRefused(self._message(path, error)) from error
            raise FileNotFoundError(errno.ENOENT, "no such object", join(self.uri, path)) from error
        except BaseError as error:
            # Not by type: a listing that is refused raises GenericError.
            refused = re.search(r"status code: 40[13]|NoSuchBucket|PermissionDenied", str(error))
            raise (StorageRefused if refused else StorageError)(self._message(path, error)) from error

    @contextlib.contextmanager
    def _named_when_silent(self, path: str) -> Iterator[None]:
        """Log once that a request has no answer yet: it is repeated for minutes."""
        timer = threading.Timer(SILENCE_S, self._log_silence, (path,))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _log_silence(self, path: str) -> None:
        log.warning(
            "no answer from %s for %.0f s; the request is repeated for up to %.0f s. Check the endpoint (%s)",
            redact(join(self.uri, path)), SILENCE_S, self.patience_s,
            os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "the store's own",
        )  # fmt: skip

    def _message(self, path: str, error: Exception) -> str:
        reason = str(error).split("\n\nDebug source", maxsplit=1)[0]
        code = re.search(r"Server returned non-2xx status code: ([^:]+):.*<Code>(\w+)</Code>", reason, re.S)
        return redact(
            f"{join(self.uri, path)} cannot be used: {' '.join(code.groups()) if code else reason[:600]}; "
            "check the bucket's name, the credentials in the environment, and the endpoint"
        )


def _conditions(seen: Version | None) -> list[Any]:
    """obstore's put modes for replacing exactly this, to be tried in turn; for creating, if None."""
    if seen is None:
        return ["create"]
    given = {key: tag for key, tag in asdict(seen).items() if tag}
    bare = given | {"e_tag": given.get("e_tag", "").strip('"')}  # Ceph 16 compares the ETag without quotes
    return [given, bare]


def object_store(uri: str, *, patience_s: float = PATIENCE_S, request_s: float = REQUEST_S) -> Any:
    """An obstore client rooted at `uri`, its credentials from the environment's usual chain."""
    return open_client(uri, store_settings(uri, patience_s, request_s))


def open_client(uri: str, settings: dict[str, Any]) -> Any:
    """An obstore client rooted at `uri`, every character of which is taken literally."""
    from obstore.store import S3Store, from_url

    bucket, prefix = _bucket_and_prefix(uri)
    scheme = OBJECT_SCHEMES[scheme_of(uri)]
    if scheme == "s3":
        return S3Store(bucket, prefix=prefix or None, **settings)
    return from_url(f"{scheme}://{bucket}/{quote(prefix)}", **settings)


def _bucket_and_prefix(uri: str) -> tuple[str, str]:
    """Not by urlsplit: `#`, `?` and `%` are characters of a key like any other."""
    bucket, _, prefix = uri.partition("://")[2].partition("/")
    return bucket, prefix.strip("/")


def store_settings(uri: str, patience_s: float, request_s: float = REQUEST_S) -> dict[str, Any]:
    """Time-outs, retries for up to `patience_s`, and the source of credentials."""
    backoff = {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=5), "base": 2}
    retry = {"max_retries": 1000, "retry_timeout": timedelta(seconds=patience_s), "backoff": backoff}
    client: dict[str, Any] = {
        "timeout": timedelta(seconds=request_s),
        "connect_timeout": timedelta(seconds=5),
    }
    settings: dict[str, Any] = {"client_options": client, "retry_config": retry}
    if OBJECT_SCHEMES[scheme_of(uri)] == "s3":
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")
        client["allow_http"] = endpoint.startswith("http://")
        settings |= _read_aws_profile()
    return settings


def _read_aws_profile() -> dict[str, Any]:
    """botocore's settings from ~/.aws: obstore itself reads the environment, web identity, ECS and EC2."""
    named = any(name in os.environ for name in ("AWS_PROFILE", "AWS_SHARED_CREDENTIALS_FILE"))
    if "AWS_ACCESS_KEY_ID" in os.environ or not (named or (Path.home() / ".aws").is_dir()):
        return {}
    from botocore.session import Session  # type: ignore[import-untyped]

    session = Session()
    credentials, region = session.get_credentials(), session.get_config_variable("region")
    found = {"region": region} if region else {}
    return found | ({"credential_provider": partial(_renew, credentials)} if credentials else {})


def _renew(credentials: Any) -> dict[str, Any]:
    """botocore's credentials, renewed if they expired, in obstore's form, valid for five minutes."""
    frozen = credentials.get_frozen_credentials()
    keys = {"access_key_id": frozen.access_key, "secret_access_key": frozen.secret_key}
    token = {"token": frozen.token} if frozen.token else {}
    return keys | token | {"expires_at": datetime.now(UTC) + timedelta(minutes=5)}
