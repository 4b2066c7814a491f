"""A site that changes overnight, as a server with ETags holds it: what `nights.py` publishes."""

import io

import numpy as np
from PIL import Image

from tests.builders.etag_server import EtagServer


def serve(server: EtagServer, uris: list[str]) -> dict[str, bytes]:
    """URI -> what the server holds."""
    return {uri: server.images["/" + uri.rpartition("/")[2]] for uri in uris}


def lay_out(server: EtagServer, rows: int) -> list[str]:
    """Rows of which 30 % are another's image; a tenth each on hosts without and with random validators."""
    draws = np.random.default_rng(0)
    for number in range(rows):
        origin = int(draws.integers(0, number)) if number and draws.random() < 0.3 else None
        server.images[f"/{number}.jpg"] = (
            server.images[f"/{origin}.jpg"] if origin is not None else draw_jpeg(number)
        )
    return [server.url(f"/{number}.jpg", kind_of(number)) for number in range(rows)]


def change(server: EtagServer, uris: list[str], night: int, rows: int) -> list[str]:
    """1 % removed, 2 % other bytes, 5 % new, of which 30 % are known images."""
    draws = np.random.default_rng(night)
    paths = list(server.images)
    kept = [uri for uri in uris if draws.random() >= 0.01]
    for uri in kept:
        if draws.random() < 0.02:
            server.images["/" + uri.rpartition("/")[2]] = draw_jpeg(int(draws.integers(1 << 40, 1 << 41)))
    for number in range(rows // 20):
        path = f"/{night}-{number}.jpg"
        known = draws.random() < 0.3
        server.images[path] = (
            server.images[paths[int(draws.integers(0, len(paths)))]]
            if known
            else draw_jpeg((night << 32) + number)
        )
        kept.append(server.url(path, kind_of(number)))
    return kept


def kind_of(number: int) -> str:
    return {0: "plain", 1: "random"}.get(number % 10, "etag")


def draw_jpeg(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 255, (12, 16, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((320, 240)).save(buffer, "jpeg", quality=85)
    return buffer.getvalue()
