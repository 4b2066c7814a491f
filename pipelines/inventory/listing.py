"""What an inventory's URI names -> its form and its files, with what tells whether they have changed.

A file is taken for what its name says. In a folder or prefix, images win over tar shards and those over
tables, so that a `labels.csv` among pictures is not mistaken for the inventory; `form` decides otherwise.
Files and folders whose names start with a dot are skipped. Nothing is opened.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal
from urllib.parse import quote

from obstore.exceptions import InvalidPathError

from pipelines.images.formats import is_image_name
from pipelines.inventory import tables
from pipelines.inventory.plan import FoundFile
from pipelines.inventory.settings import InventoryOptions
from pipelines.messages import InputError, redact
from pipelines.storage.storage import Storage, open_storage
from pipelines.storage.uris import Entry, StorageError, file_name, is_local, local_path, split

WILDCARD = re.compile(r"[*?]")

Form = Literal["table", "images", "tars"]


@dataclass(frozen=True)
class Found:
    """What an inventory's URI turned out to be."""

    form: Form
    base: str
    """Folder that relative URIs of a table start from."""
    files: tuple[FoundFile, ...]


def find(inventory_uri: str, options: InventoryOptions) -> Found:
    """Look at a file, or list a folder or prefix, or what of it matches a last part with `*` or `?`.

    Raises:
        InputError: nothing is there, or nothing of the form.
    """
    uri = absolute(inventory_uri)
    base, name = split(uri)
    form = _form_of_name(file_name(uri), options)
    if form and (single := _single(open_storage(base), name)):
        return Found(form, base, (single,))
    is_pattern = WILDCARD.search(name) and not (is_local(uri) and local_path(uri).is_dir())
    folder, pattern = (base, name) if is_pattern else (uri, "*")
    entries = [entry for entry in _list(folder) if not entry.is_hidden]
    entries = [entry for entry in entries if fnmatchcase(entry.path, pattern)]
    if not entries:
        raise InputError(f"{redact(inventory_uri)} does not exist or holds no file")
    form, chosen = _choose(inventory_uri, entries, options)
    return Found(form, folder, tuple(_found(folder, entry) for entry in chosen))


def _list(uri: str) -> list[Entry]:
    try:
        return open_storage(uri).list()
    except StorageError as error:
        if not isinstance(error.__cause__, InvalidPathError):
            raise
        raise InputError(
            f"{redact(uri)} cannot be listed: {error}. Keys that a listing cannot express (such as a//b) "
            "can still be fetched: name them in a table with a column uri"
        ) from error
    except NotADirectoryError as error:
        raise InputError(
            f"{redact(uri)} is a file whose name does not say what it holds: end it in .parquet, .csv, "
            ".jsonl or .tar, or say --inventory-type images or tars"
        ) from error
    except PermissionError as error:
        raise InputError(
            f"{redact(uri)} cannot be listed whole: {error}. Make that folder readable, or name the images "
            "in a table with a column uri"
        ) from error


def absolute(uri: str) -> str:
    """A local path made absolute, any other URI as it is; without a slash at the end."""
    if not is_local(uri):
        return uri.rstrip("/")
    path = local_path(uri)
    return str(path.resolve() if ".." in path.parts else path)


def _single(storage: Storage, name: str) -> FoundFile | None:
    if not storage.exists(name):
        return None
    return FoundFile(f"{storage.uri.rstrip('/')}/{name}", storage.size(name), _version(storage, name))


def _version(storage: Storage, name: str) -> str:
    if found := storage.version(name):
        return found.e_tag or ""
    return str((local_path(storage.uri) / name).stat().st_mtime_ns)


def _found(base: str, entry: Entry) -> FoundFile:
    version = entry.etag or (entry.last_modified.isoformat() if entry.last_modified else "")
    return FoundFile(_writable(f"{base.rstrip('/')}/{entry.path}"), entry.size, version)


def _writable(uri: str) -> str:
    """The URI; a local name that is not UTF-8, which no table can hold, as a percent-encoded `file://`."""
    try:
        uri.encode()
    except UnicodeEncodeError:
        return "file://" + quote(os.fsencode(uri))
    return uri


def _form_of_name(name: str, options: InventoryOptions) -> Form | None:
    if options.inventory_type != "auto":
        return options.inventory_type
    if tables.format_of(name):
        return "table"
    if name.lower().endswith(".tar"):
        return "tars"
    return "images" if is_image_name(name) else None


def _choose(
    inventory_uri: str, entries: Sequence[Entry], options: InventoryOptions
) -> tuple[Form, list[Entry]]:
    if options.all_files:
        return "images", list(entries)
    automatic = InventoryOptions()
    for form in (
        ("images", "tars", "table") if options.inventory_type == "auto" else (options.inventory_type,)
    ):
        chosen = [entry for entry in entries if _form_of_name(entry.path, automatic) == form]
        if chosen:
            return form, chosen
    sought = (
        "an image, a tar or a table"
        if options.inventory_type == "auto"
        else f"of type {options.inventory_type}"
    )
    raise InputError(
        f"{redact(inventory_uri)} holds {len(entries):,} files, the first one {entries[0].path}, "
        f"and by its name none is {sought}; --all-files takes every file as an image"
    )
