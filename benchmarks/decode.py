"""What decoding costs, in and out of process, and what damaged files do to it.

    python benchmarks/decode.py [--photos photos] [--tricky tricky] [--mutations 2000]

Three tables, in about two minutes on 2 cores. Cost per image: Pillow's full decode, `images.prepare`, and
`DecoderProcess` in batches of 64, turn by turn over the same JPEGs. Damage: seeded mutations
of real broken and odd files, each of which must get a status, while the caller and its supervisor live on.
Faults: among 5,000 images one that crashes its decoder, one that aborts it, one that hangs it.

Expected: `prepare` <= 2 ms, process overhead < 10 %, no caller lost, images/s on damage within 2x of clean.
"""

import argparse
import io
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from pipelines.images import prepare
from pipelines.images.decoder import DecoderProcess
from pipelines.specs import DecodeLimits, ImageSpec
from pipelines.status import Status
from tests.builders import decoder_faults
from tests.builders.mutations import mutations

SPEC = ImageSpec()
BATCH = 64
console = Console(width=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, help="JPEGs to decode; drawn if not given")
    parser.add_argument("--tricky", type=Path, help="files to damage; left out if not given")
    parser.add_argument("--mutations", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    for size in ((500, 375), (1600, 1200)):
        title = f"JPEGs of {size[0]} x {size[1]} to {SPEC.width}"
        console.print(costs(jpegs(arguments.photos, size), arguments.rounds, title))
    if arguments.tricky:
        console.print(damage(arguments.tricky, arguments.mutations))
    console.print(faults(jpegs(arguments.photos, (500, 375))))


def jpegs(photos: Path | None, size: tuple[int, int]) -> list[bytes]:
    """128 JPEGs of one size, quality 85: photographs, or drawn noise where there are none."""
    files = sorted(photos.glob("*/*.jpg"))[::43][:128] if photos else []
    pictures = [Image.open(file).convert("RGB") for file in files] or [drawn(seed) for seed in range(128)]
    return [encoded(picture.resize(size)) for picture in pictures]


def drawn(seed: int) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC)


def encoded(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def costs(payloads: Sequence[bytes], rounds: int, title: str) -> Table:
    """Milliseconds per image, wall clock and median of the rounds, each way in turn."""
    with DecoderProcess(SPEC) as process:
        ways: dict[str, Callable[[Sequence[bytes]], object]] = {
            "Pillow, full decode": lambda batch: [full_decode(payload) for payload in batch],
            "images.prepare": lambda batch: [prepare.prepare(payload, SPEC) for payload in batch],
            "DecoderProcess": process.prepare_batch,
        }
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(rounds):
            for way, decode in ways.items():
                started = time.perf_counter()
                for batch in batches(payloads):
                    decode(batch)
                seconds[way].append((time.perf_counter() - started) / len(payloads))
    return cost_table({way: statistics.median(values) for way, values in seconds.items()}, payloads, title)


def cost_table(seconds: dict[str, float], payloads: Sequence[bytes], title: str) -> Table:
    table = Table("way", "ms per image", "to images.prepare", title=title)
    for way, value in seconds.items():
        table.add_row(way, f"{value * 1000:.3f}", f"{value / seconds['images.prepare'] - 1:+.1%}")
    differences = [
        np.abs(full_decode(payload).astype(int) - prepare.prepare(payload, SPEC).pixels_hwc).mean()
        for payload in payloads
    ]
    table.caption = f"mean |full decode - prepare|: {np.mean(differences):.2f} of 255"
    return table


def full_decode(payload: bytes) -> np.ndarray:
    picture = Image.open(io.BytesIO(payload)).convert("RGB")
    return np.asarray(picture.resize((SPEC.width, SPEC.height), Image.Resampling.BILINEAR))


def batches(payloads: Sequence[bytes]) -> Iterator[Sequence[bytes]]:
    for start in range(0, len(payloads), BATCH):
        yield payloads[start : start + BATCH]


def damage(tricky: Path, count: int) -> Table:
    """Statuses of whole and of damaged files, and the rate of each."""
    whole = [file.read_bytes() for file in sorted(tricky.iterdir()) if file.suffix != ".csv"]
    # the same mix of files, undamaged, is what the rate is compared with
    sources = [whole[index % len(whole)] for index in range(count)]
    table = Table("input", "images/s", "supervisor lives", "statuses", title=f"{tricky.name}: {count} images")
    with DecoderProcess(SPEC, DecodeLimits(timeout_s=10)) as process:
        for name, payloads in (("whole", sources), ("damaged", list(mutations(whole, count)))):
            supervisor = process._supervisor.pid
            started = time.perf_counter()
            prepared = [image for batch in batches(payloads) for image in process.prepare_batch(batch)[0]]
            rate = count / (time.perf_counter() - started)
            counts = Counter(image.status.value for image in prepared)
            lives = str(process._supervisor.pid == supervisor)
            table.add_row(
                name, f"{rate:,.0f}", lives, ", ".join(f"{key} {n}" for key, n in counts.most_common())
            )
    return table


def faults(clean: Sequence[bytes]) -> Table:
    """Three provoked faults among 5,000 images."""
    payloads = [clean[index % len(clean)] + index.to_bytes(4, "big") for index in range(5000)]
    culprits = {1234: "segv", 2345: "abort", 3456: "hang"}
    table = Table("run", "seconds", "statuses", "culprits", title="5,000 images, timeout_s = 5")
    sys.path.insert(0, decoder_faults.FOLDER)
    for name, provoked in (("clean", {}), ("3 faults", culprits)):
        os.environ |= decoder_faults.variable({payloads[index]: fault for index, fault in provoked.items()})
        with DecoderProcess(SPEC, DecodeLimits(timeout_s=5)) as process:
            started = time.perf_counter()
            prepared = [image for batch in batches(payloads) for image in process.prepare_batch(batch)[0]]
            seconds = time.perf_counter() - started
        counts = Counter(image.status.value for image in prepared)
        found = {
            index: image.status.value for index, image in enumerate(prepared) if image.status is not Status.OK
        }
        table.add_row(name, f"{seconds:.1f}", str(dict(counts)), str(found))
    return table


if __name__ == "__main__":
    main()
