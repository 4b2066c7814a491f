"""On a GPU machine: certify a ViT-B/16-224 on CUDA and TensorRT, and measure it beside PyTorch and the floor.

    python benchmarks/gpu_inference.py --images ../shared/photos [--checkpoint RUN] [--providers cuda]

One NVIDIA GPU, ten minutes (TensorRT builds an engine per batch size). Pixels start in host memory for every
variant. The floor is arithmetic: 35.1 GFLOP per image over the matrix rate that a large fp16 product reaches
here. Not run in continuous integration: needs `pip install 'onnxruntime-gpu[cuda,cudnn]' 'tensorrt-cu13<11'`.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from export import certification, convert, release
from export.checkpoint import opened
from pipelines.bundle import Bundle, open_bundle
from pipelines.providers import ProviderUnavailable, gpu_name
from pipelines.runtime import load
from pipelines.specs import ImageSpec, Measuring, Precision, Provider, RuntimeSpec

FLOP_PER_IMAGE = 35.1e9
"""ViT-B/16 at 224 pixels: 17.6 G multiply-adds."""
VARIANTS: tuple[tuple[Provider, Precision], ...] = (("cuda", "fp32"), ("cuda", "fp16"), ("tensorrt", "fp16"))

Run = Callable[[np.ndarray], object]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", required=True)
    parser.add_argument("--checkpoint", help="run folder; without it ViT-B with random weights")
    parser.add_argument("--providers", default="cuda,tensorrt")
    parser.add_argument("--batches", default="1,8,32,64,128,256,512")
    arguments = parser.parse_args()
    batches = [int(size) for size in arguments.batches.split(",")]
    providers = arguments.providers.split(",")
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = arguments.checkpoint or random_vit_base(Path(folder) / "checkpoint")
        bundle = release.export(
            checkpoint,
            arguments.images,
            f"{folder}/bundle",
            precisions=("fp32", "fp16"),
            measuring=Measuring(sample_images=200, threads=8),
        )
        certify(bundle.uri, arguments.images, providers)
        floor = matrix_rate() / FLOP_PER_IMAGE
        print(
            f"\n{gpu_name(0)}: floor {floor:.0f} images/s ({matrix_rate() / 1e12:.0f} TFLOP/s measured, fp16)"
        )
        speeds(open_bundle(bundle.uri), checkpoint, providers, batches, floor)


def random_vit_base(folder: Path) -> str:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    ViTForImageClassification(ViTConfig(num_labels=37)).save_pretrained(folder)
    return str(folder)


def certify(bundle_uri: str, images: str, providers: list[str]) -> None:
    for provider, precision in VARIANTS:
        if provider in providers:
            documents = certification.certify(
                bundle_uri,
                images,
                provider=provider,
                precisions=(precision,),
                measuring=Measuring(sample_images=200, batch_size=64),
            )
            for document in documents.values():
                print(certification.one_line(provider, precision, document))


def speeds(bundle: Bundle, checkpoint: str, providers: list[str], batches: list[int], floor: float) -> None:
    spec = bundle.image_spec
    pixels_nhwc = np.random.default_rng(0).integers(
        0, 256, (max(batches), spec.height, spec.width, 3), np.uint8
    )
    for size in batches:
        for name, run in [*pytorch(checkpoint, spec), *exported(bundle, providers, size)]:
            rate = images_per_second(run, pixels_nhwc[:size])
            print(f"  batch {size:4}  {name:<24} {rate:9.0f} images/s  {rate / floor:6.1%} of the floor")


def exported(bundle: Bundle, providers: list[str], size: int) -> Iterator[tuple[str, Run]]:
    for provider, precision in VARIANTS:
        if provider in providers:
            try:
                yield (
                    f"{provider} {precision}",
                    load(bundle, RuntimeSpec(provider, precision, batch_size=size)).run,
                )
            except ProviderUnavailable as error:
                print(f"  batch {size:4}  {provider} {precision}: {error}")


def pytorch(checkpoint: str, spec: ImageSpec) -> Iterator[tuple[str, Run]]:
    for dtype in (torch.float16, torch.bfloat16):
        with opened(checkpoint) as trained:
            network = trained.network("sdpa").to("cuda", dtype)
        around = convert.Surroundings(spec, 1.0, multi_label=False)
        module = torch.compile(convert.PixelClassifier(network, around).eval().cuda(), mode="max-autotune")

        def run(pixels_nhwc: np.ndarray, module: torch.nn.Module = module) -> object:
            with torch.inference_mode():
                pixels = torch.from_numpy(pixels_nhwc).pin_memory().to("cuda", non_blocking=True)
                return module(pixels)[1].cpu()

        yield f"PyTorch compiled {str(dtype).removeprefix('torch.')}", run


def images_per_second(run: Run, pixels_nhwc: np.ndarray, *, rounds: int = 5, round_s: float = 1.0) -> float:
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
