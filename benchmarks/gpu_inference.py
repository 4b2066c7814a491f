"""On a GPU machine: certify a ViT-B/16-224 on CUDA, and compare its speed with PyTorch's and the floor.

    python benchmarks/gpu_inference.py --images photos [--checkpoint RUN]

One NVIDIA GPU, planned for under ten minutes on an H100: what would begin after `--minutes` is left out and
named, and what fails is printed. Pixels start in host memory for every variant. The floor is arithmetic: 35.1
GFLOP per image over the matrix rate that a large fp16 product reaches here. Not run in the gate:
needs no network, but `pip install 'onnxruntime-gpu[cuda,cudnn]'` and a torch for CUDA.
"""

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from export import convert, release, report
from export.checkpoint import open_checkpoint
from export.images import OwnImages
from export.settings import ParitySettings
from pipelines.bundle.bundle import Bundle, open_bundle
from pipelines.bundle.providers import gpu_name
from pipelines.bundle.session import load
from pipelines.bundle.settings import RuntimeSpec
from pipelines.specs import ImageSpec, Precision

FLOP_PER_IMAGE = 35.1e9
"""ViT-B/16 at 224 pixels: 17.6 G multiply-adds."""
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16")
COMPILED = (torch.float16, torch.bfloat16)
COMPILE_MODE = "reduce-overhead"
"""CUDA graphs around Inductor's kernels, half a minute a shape. max-autotune takes minutes a shape, and the
large products come from cuBLAS in both."""
BATCHES = "256,32,1"
"""256 first: with its tail of 32 it is the certified one."""
MEASURING = ParitySettings(sample_images=200, threads=8)

Run = Callable[[np.ndarray], object]
Variant = tuple[str, Callable[[], Run]]
"""A name, and what loads or compiles it."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", required=True)
    parser.add_argument("--checkpoint", help="run folder; without it ViT-B with random weights")
    parser.add_argument("--batches", default=BATCHES)
    parser.add_argument("--minutes", type=float, default=9)
    arguments = parser.parse_args()
    deadline = time.monotonic() + 60 * arguments.minutes
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = arguments.checkpoint or random_vit_base(Path(folder) / "checkpoint")
        bundle = release.export(
            checkpoint,
            OwnImages(arguments.images),
            f"{folder}/bundle",
            precisions=("fp32", "fp16"),
            settings=MEASURING,
        )
        certify(bundle.uri, arguments.images)
        rate = matrix_rate() if torch.cuda.is_available() else math.nan
        print(
            f"\n{gpu_name(0)}, torch {torch.__version__}: floor {rate / FLOP_PER_IMAGE:.0f} images/s "
            f"({rate / 1e12:.0f} TFLOP/s measured, fp16; nan: this torch is built without CUDA)",
            flush=True,
        )
        for size in map(int, arguments.batches.split(",")):
            variants = [*exported(open_bundle(bundle.uri), size), *pytorch(checkpoint)]
            speeds(variants, bundle.spec.image_spec, size, floor=rate / FLOP_PER_IMAGE, deadline=deadline)


def random_vit_base(folder: Path) -> str:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    ViTForImageClassification(ViTConfig(num_labels=37)).save_pretrained(folder)
    return str(folder)


def certify(bundle_uri: str, images: str) -> None:
    """What passes and what does not; neither keeps the speeds from being measured."""
    for precision in PRECISIONS:
        try:
            documents = release.certify(
                bundle_uri, OwnImages(images), provider="cuda", precisions=(precision,), settings=MEASURING
            )
        except Exception as error:  # whatever it is, the others are measured
            print(f"{precision} on cuda: no certificate: {described(error)}", flush=True)
        else:
            print(report.one_line("cuda", precision, documents["cuda", precision]), flush=True)


def speeds(variants: list[Variant], spec: ImageSpec, size: int, *, floor: float, deadline: float) -> None:
    """A line for each variant, one of them in memory at a time."""
    pixels_nhwc = np.random.default_rng(0).integers(0, 256, (size, spec.height, spec.width, 3), np.uint8)
    for name, make in variants:
        line = f"  batch {size:4}  {name:<24}"
        if time.monotonic() > deadline:
            print(f"{line} left out: no time", flush=True)
            continue
        try:
            rate = images_per_second(make(), pixels_nhwc)
        except Exception as error:  # Inductor and CUDA have a type each
            print(f"{line} {described(error)}", flush=True)
        else:
            print(f"{line} {rate:9.0f} images/s  {rate / floor:6.1%} of the floor", flush=True)


def described(error: Exception) -> str:
    """Type and text on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"


def exported(bundle: Bundle, size: int) -> Iterator[Variant]:
    for precision in PRECISIONS:
        spec = RuntimeSpec("cuda", precision, batch_size=size)
        yield f"cuda {precision}", lambda spec=spec: load(bundle, spec).run


def pytorch(checkpoint: str) -> Iterator[Variant]:
    for dtype in COMPILED:
        name = str(dtype).removeprefix("torch.")
        yield f"PyTorch compiled {name}", lambda dtype=dtype: compiled(checkpoint, dtype)


def compiled(checkpoint: str, dtype: torch.dtype) -> Run:
    torch.compiler.reset()  # a shape of its own each time, as ours
    with open_checkpoint(checkpoint) as trained:
        network, spec = trained.network("sdpa").to("cuda", dtype), trained.spec
    module = torch.compile(
        convert.PixelClassifier(network, spec).eval().cuda(), mode=COMPILE_MODE, dynamic=False
    )

    def run(pixels_nhwc: np.ndarray) -> object:
        with torch.inference_mode():
            pixels = torch.from_numpy(pixels_nhwc).pin_memory().to("cuda", non_blocking=True)
            return module(pixels)[1].cpu()

    return run


def images_per_second(run: Run, pixels_nhwc: np.ndarray, *, rounds: int = 3, round_s: float = 1.0) -> float:
    """Median over rounds; every run ends with its result in host memory."""
    for _ in range(3):
        run(pixels_nhwc)
    found = []
    for _ in range(rounds):
        started, images = time.perf_counter(), 0
        while time.perf_counter() - started < round_s:
            run(pixels_nhwc)
            images += len(pixels_nhwc)
        found.append(images / (time.perf_counter() - started))
    return statistics.median(found)


def matrix_rate(size: int = 8192, repeats: int = 50) -> float:
    """FLOP/s of a large fp16 product with float32 accumulation."""
    left, right = (torch.randn(size, size, device="cuda", dtype=torch.float16) for _ in range(2))
    for _ in range(5):
        left @ right
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        left @ right
    torch.cuda.synchronize()
    return repeats * 2 * size**3 / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
