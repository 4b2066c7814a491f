"""The text of URIs: scheme, join, split, local paths, and taking the secrets out. Makes no request."""

import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

QUERY_VALUE = re.compile(r"([?&][^=&?\s]*=)[^&\s]+")
"""All of them: every service has another name for its signatures."""

USERINFO = re.compile(
    r"(\b[a-z][a-z0-9+.-]{0,20}://)(?:[^/\s?]{0,2000}|[^/\s?:@]{0,200}:(?!\d*/)[^\s?@]{0,2000})@", re.I
)
"""Also where a password holds a slash, which no parser takes for a part of it; a port is none. Bounded, or
a long text made for it would take time quadratic in its length."""


def scheme_of(uri: str) -> str:
    """The URI's scheme in lower case; a plain path is `file`."""
    head, separator, _ = uri.partition("://")
    return head.lower() if separator else "file"


def is_local(uri: str) -> bool:
    """Whether the URI is a path on this machine."""
    return scheme_of(uri) == "file"


def local_path(uri: str) -> Path:
    """The absolute path of a local URI."""
    path = unquote(urlsplit(uri).path) if "://" in uri else uri
    return Path(path).expanduser().absolute()


def join(uri: str, *names: str) -> str:
    """The URI of something below a folder URI."""
    return "/".join([uri.rstrip("/"), *(name.strip("/") for name in names)])


def split(uri: str) -> tuple[str, str]:
    """A file's URI as its folder and its name."""
    folder, _, name = uri.rstrip("/").rpartition("/")
    return folder or ("/" if uri.startswith("/") else "."), name


def redact(text: str) -> str:
    """The text with user names, passwords and the values of queries taken out of every URI in it."""
    return QUERY_VALUE.sub(r"\1REDACTED", USERINFO.sub(r"\1", text))


def redacted(value: Any) -> Any:
    """`redact` for every string in plain data, keys included, before it is written as JSON or YAML."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {redacted(key): redacted(inner) for key, inner in value.items()}
    return [redacted(inner) for inner in value] if isinstance(value, (list, tuple)) else value
