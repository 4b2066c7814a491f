"""Draws the demo's and the tests' pictures: labelled scenes of a few IAB categories, and broken files.

Size, place, colour, tilt, background and noise vary, so that a model has something to learn beyond one
pixel; the same seed draws the same files. They take the place of photographs and prove nothing about those.
"""

import cmath
import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

Rgb = tuple[int, int, int]
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Pen:
    """Draws in a unit square, placed, scaled and tilted on the canvas."""

    draw: ImageDraw.ImageDraw
    centre: tuple[float, float]
    scale: float
    tilt: float

    def place(self, points: Points) -> Points:
        turn = cmath.rect(self.scale, self.tilt)
        placed = (complex(*self.centre) + turn * complex(*point) for point in points)
        return [(one.real, one.imag) for one in placed]

    def polygon(self, points: Points, fill: Rgb) -> None:
        self.draw.polygon(self.place(points), fill=fill)

    def disc(self, x: float, y: float, radius: float, fill: Rgb, *, squash: float = 1.0) -> None:
        turns = [2 * math.pi * k / 24 for k in range(24)]
        ring = [(x + radius * math.cos(t), y + radius * squash * math.sin(t)) for t in turns]
        self.polygon(ring, fill)

    def line(self, points: Points, fill: Rgb, width: float) -> None:
        self.draw.line(self.place(points), fill=fill, width=max(1, round(width * self.scale)), joint="curve")


def draw_car(pen: Pen, paint: Rgb, rng: np.random.Generator) -> None:
    roof = rng.uniform(0.25, 0.4)
    left = [(-0.9, 0.3), (-0.9, 0.0), (-0.5, -0.05), (-0.3, -roof)]
    pen.polygon([*left, (0.3, -roof), (0.6, 0.0), (0.9, 0.05), (0.9, 0.3)], paint)
    pen.polygon([(-0.35, -0.03), (-0.22, -roof + 0.06), (0.22, -roof + 0.06), (0.42, -0.01)], (190, 220, 235))
    for x in (-0.5, 0.5):
        pen.disc(x, 0.32, 0.2, (25, 25, 25))
        pen.disc(x, 0.32, 0.09, (170, 170, 170))


def draw_sailboat(pen: Pen, paint: Rgb, rng: np.random.Generator) -> None:
    pen.polygon([(-0.7, 0.35), (0.75, 0.35), (0.45, 0.65), (-0.45, 0.65)], paint)
    pen.line([(0.0, 0.35), (0.0, -0.85)], (90, 60, 30), 0.05)
    pen.polygon([(0.05, -0.8), (0.05, 0.25), (rng.uniform(0.5, 0.7), 0.25)], (245, 245, 240))
    pen.polygon([(-0.05, -0.6), (-0.05, 0.25), (-rng.uniform(0.35, 0.55), 0.25)], (230, 235, 245))


def draw_flower(pen: Pen, paint: Rgb, rng: np.random.Generator) -> None:
    pen.line([(0.0, 0.0), (0.05, 0.95)], (40, 130, 50), 0.07)
    pen.disc(0.25, 0.6, 0.22, (50, 150, 60), squash=0.45)
    petals = int(rng.integers(5, 9))
    for k in range(petals):
        turn = 2 * math.pi * k / petals
        pen.disc(0.36 * math.cos(turn), -0.25 + 0.36 * math.sin(turn), 0.21, paint)
    pen.disc(0.0, -0.25, 0.2, (240, 200, 40))


def draw_bird(pen: Pen, paint: Rgb, rng: np.random.Generator) -> None:
    lift = rng.uniform(0.3, 0.7)
    pen.polygon([(-0.1, 0.0), (-0.95, -lift), (-0.45, 0.12)], paint)
    pen.polygon([(0.1, 0.0), (0.95, -lift), (0.45, 0.12)], paint)
    pen.disc(0.0, 0.1, 0.3, paint, squash=0.6)
    pen.disc(0.3, -0.02, 0.13, paint)
    pen.polygon([(0.4, -0.05), (0.6, 0.02), (0.4, 0.06)], (240, 160, 30))


def draw_plane(pen: Pen, paint: Rgb, rng: np.random.Generator) -> None:
    sweep = rng.uniform(0.15, 0.35)
    pen.disc(0.0, 0.0, 0.95, (235, 238, 242), squash=0.13)
    pen.polygon([(0.15, 0.0), (-0.1, 0.0), (-0.1 - sweep, 0.75), (0.05 - sweep, 0.75)], paint)
    pen.polygon([(0.15, 0.0), (-0.1, 0.0), (-0.1 - sweep, -0.6), (0.05 - sweep, -0.6)], paint)
    pen.polygon([(-0.65, 0.0), (-0.85, 0.0), (-1.0, -0.4), (-0.85, -0.4)], paint)


def draw_guitar(pen: Pen, paint: Rgb, rng: np.random.Generator) -> None:
    pen.disc(0.0, 0.6, rng.uniform(0.36, 0.42), paint)
    pen.disc(0.0, 0.15, 0.3, paint)
    pen.disc(0.0, 0.35, 0.12, (30, 20, 15))
    pen.line([(0.0, 0.3), (0.0, -0.8)], (70, 45, 25), 0.12)
    pen.polygon([(-0.12, -0.75), (0.12, -0.75), (0.16, -1.0), (-0.16, -1.0)], (50, 30, 20))


SUBJECTS: dict[str, Callable[[Pen, Rgb, np.random.Generator], None]] = {
    "1": draw_car,  # Automotive
    "530": draw_sailboat,  # Sports > Sailing
    "275": draw_flower,  # Home & Garden > Gardening
    "259": draw_bird,  # Hobbies & Interests > Birdwatching
    "672": draw_plane,  # Travel > Travel Type > Air Travel
    "243": draw_guitar,  # Hobbies & Interests > Musical Instruments
}
"""What is drawn for each id of IAB Content Taxonomy 3.1."""


def draw(subject: str, rng: np.random.Generator) -> Image.Image:
    """One scene of `subject`, RGB, 90 to 320 pixels a side."""
    width, height = (int(side) for side in rng.integers(90, 321, 2))
    scene = backdrop(width, height, rng)
    scale = min(width, height) * rng.uniform(0.28, 0.45)
    centre = (width * rng.uniform(0.4, 0.6), height * rng.uniform(0.4, 0.6))
    pen = Pen(ImageDraw.Draw(scene), centre, scale, rng.uniform(-0.35, 0.35))
    red, green, blue = (int(value) for value in rng.integers(20, 236, 3))
    SUBJECTS[subject](pen, (red, green, blue), rng)
    return noisy(scene, rng)


def backdrop(width: int, height: int, rng: np.random.Generator) -> Image.Image:
    """A vertical gradient between two random colours with a few faint blobs."""
    top, bottom = rng.uniform(60, 255, (2, 3))
    ramp = np.linspace(0, 1, height)[:, None, None]
    gradient = np.broadcast_to(top * (1 - ramp) + bottom * ramp, (height, width, 3))
    scene = Image.fromarray(gradient.astype(np.uint8))
    canvas = ImageDraw.Draw(scene)
    for _ in range(int(rng.integers(0, 5))):
        x, y, r = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(4, 24)
        red, green, blue = (int(value) for value in rng.integers(60, 256, 3))
        canvas.ellipse((x - r, y - r, x + r, y + r), fill=(red, green, blue))
    return scene.filter(ImageFilter.GaussianBlur(2))


def noisy(scene: Image.Image, rng: np.random.Generator) -> Image.Image:
    grain = rng.normal(0, rng.uniform(2, 18), (scene.height, scene.width, 1))
    return Image.fromarray(np.clip(np.asarray(scene) + grain, 0, 255).astype(np.uint8))


def encode(scene: Image.Image, rng: np.random.Generator) -> tuple[bytes, str]:
    """The scene as a file: JPEG of some quality, or PNG; with its extension."""
    buffer = io.BytesIO()
    if rng.random() < 0.75:
        scene.save(buffer, "JPEG", quality=int(rng.integers(60, 95)))
        return buffer.getvalue(), "jpg"
    scene.save(buffer, "PNG")
    return buffer.getvalue(), "png"


def draw_dataset(root: Path, *, per_class: int, seed: int) -> None:
    """An image folder `root/<IAB id>/NNNN.jpg|png` of `per_class` scenes of every subject."""
    rng = np.random.default_rng(seed)
    for subject in SUBJECTS:
        folder = root / subject
        folder.mkdir(parents=True)
        for number in range(per_class):
            payload, extension = encode(draw(subject, rng), rng)
            (folder / f"{number:04d}.{extension}").write_bytes(payload)


def broken_files(seed: int) -> Iterator[tuple[str, bytes]]:
    """Damaged files of the kinds that web servers send: a name and its bytes."""
    rng = np.random.default_rng(seed)
    jpeg = io.BytesIO()
    draw("1", rng).save(jpeg, "JPEG")
    png = io.BytesIO()
    draw("530", rng).save(png, "PNG")
    yield "truncated.jpg", jpeg.getvalue()[: len(jpeg.getvalue()) // 2]
    yield "truncated.png", png.getvalue()[: len(png.getvalue()) // 2]
    yield "empty.jpg", b""
    yield "error-page.jpg", b"<!DOCTYPE html><html><body>404 Not Found</body></html>"
    yield "header-only.png", png.getvalue()[:8]
    yield "noise.gif", rng.bytes(2_000)
