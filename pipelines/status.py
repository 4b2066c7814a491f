"""What can become of one image. Standard library only: the decoder's process starts without Arrow."""

from enum import StrEnum
from typing import Self


class Status(StrEnum):
    """What became of one image; every value but `OK` means that the row carries no label."""

    meaning: str
    """One sentence for a person; docs/statuses.md lists them all."""

    def __new__(cls, value: str, meaning: str = "") -> Self:
        member = str.__new__(cls, value)
        member._value_ = value
        member.meaning = meaning
        return member

    OK = "ok", "The image was decoded and classified."
    # fetching
    NOT_FOUND = "not_found", "There is no such file, object or page (HTTP 404, 410)."
    DENIED = "denied", "Reading it is not permitted (HTTP 401, 403, 451)."
    TIMEOUT = "timeout", "No complete answer arrived within the time limits of `--fetch`."
    THROTTLED = "throttled", "The server asked for fewer requests (HTTP 429) until the attempts ran out."
    SERVER_ERROR = "server_error", "The server failed (HTTP 500 and above) until the attempts ran out."
    CONNECTION_FAILED = "connection_failed", "No connection was made, or it broke off."
    TLS_FAILED = "tls_failed", "The server's TLS certificate could not be verified."
    CREDENTIALS_FAILED = (
        "credentials_failed",
        "The object store rejected the credentials, or the clock is wrong.",
    )
    REDIRECT_LOOP = "redirect_loop", "There were more redirects than `--fetch.max-redirects` allows."
    BLOCKED_ADDRESS = (
        "blocked_address",
        "Fetching from there is not allowed: a private address, or a place that needs `--fetch.allow`.",
    )
    INVALID_URI = "invalid_uri", "The URI is empty, malformed, or does not name a file."
    HTTP_ERROR = "http_error", "The server answered with another error, or invalidly."
    SOURCE_CHANGED = (
        "source_changed",
        "The tar or table that holds the image has changed since it was planned.",
    )
    TOO_LARGE = "too_large", "The object has more bytes than `--fetch.max-bytes` allows."
    # decoding
    EMPTY = "empty", "The object has no bytes."
    NOT_AN_IMAGE = "not_an_image", "The bytes begin like no image format, such as an HTML error page."
    UNSUPPORTED_FORMAT = "unsupported_format", "The bytes are of an image format that is not decoded here."
    TRUNCATED = "truncated", "The image file ends too early."
    TOO_MANY_PIXELS = (
        "too_many_pixels",
        "The image has more pixels, or a longer side, than `--decode` allows.",
    )
    DECODE_FAILED = "decode_failed", "The image file is damaged, or needs more memory than `--decode` allows."
    DECODER_CRASHED = "decoder_crashed", "The decoder's process died over this image twice."
    DECODE_TIMEOUT = "decode_timeout", "Decoding took longer than `--decode.timeout-s`."
    # the model
    MODEL_ERROR = "model_error", "The model gave scores that are not finite numbers."
    # a bug
    INTERNAL_ERROR = "internal_error", "Another exception was raised over this image; the log shows it."


NOT_MODIFIED = "not_modified"
"""In a part: the server said that the image is as it was (HTTP 304)."""
SAME_BYTES = "same_bytes"
"""In a part: these bytes were classified before."""
CARRIED = frozenset({NOT_MODIFIED, SAME_BYTES})
"""What a part says instead of a status where the row's result is one of an earlier night; never published."""

TRANSIENT = frozenset(
    {
        Status.TIMEOUT,
        Status.THROTTLED,
        Status.SERVER_ERROR,
        Status.CONNECTION_FAILED,
        Status.TLS_FAILED,
        Status.CREDENTIALS_FAILED,
        Status.INTERNAL_ERROR,  # memory or threads may have run out, or a later version fixes it
    }
)
"""Failures that may pass: tried again in a later pass, and by `--retry-failed`."""
