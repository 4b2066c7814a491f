"""What can become of one image. Standard library only: the decoder's process starts without Arrow."""

from enum import StrEnum


class Status(StrEnum):
    """What became of one image; every value but `OK` means that the row carries no label."""

    OK = "ok"
    # fetching
    NOT_FOUND = "not_found"
    DENIED = "denied"
    TIMEOUT = "timeout"
    THROTTLED = "throttled"
    SERVER_ERROR = "server_error"
    CONNECTION_FAILED = "connection_failed"
    TLS_FAILED = "tls_failed"
    CREDENTIALS_FAILED = "credentials_failed"
    REDIRECT_LOOP = "redirect_loop"
    BLOCKED_ADDRESS = "blocked_address"
    INVALID_URI = "invalid_uri"
    HTTP_ERROR = "http_error"
    TOO_LARGE = "too_large"
    # decoding
    EMPTY = "empty"
    NOT_AN_IMAGE = "not_an_image"
    UNSUPPORTED_FORMAT = "unsupported_format"
    TRUNCATED = "truncated"
    TOO_MANY_PIXELS = "too_many_pixels"
    DECODE_FAILED = "decode_failed"
    DECODER_CRASHED = "decoder_crashed"
    DECODE_TIMEOUT = "decode_timeout"
    # the model
    MODEL_ERROR = "model_error"
    # a bug: whatever else was raised for this one image
    INTERNAL_ERROR = "internal_error"


TRANSIENT = frozenset(
    {
        Status.TIMEOUT,
        Status.THROTTLED,
        Status.SERVER_ERROR,
        Status.CONNECTION_FAILED,
        Status.TLS_FAILED,
        Status.CREDENTIALS_FAILED,
        Status.INTERNAL_ERROR,  # memory or threads may have run out, or a later version mends it
    }
)
"""Failures that may pass: tried again in a later pass, and by `--retry-failed`."""
