"""Raw session throughput of what export writes, and of a naive export of the same network, in one run.

    python benchmarks/onnx_precisions.py [--models tiny,base] [--rounds 5]

Two cores, about four minutes with ViT-base. Random weights at 224 pixels: speed does not depend on them, and
the int8 layers are those of a checkpoint in which none has to be left out. One thread, batch 8. Variants take
turns, so that a machine that drifts drifts for all of them; the medians and their ratios are printed.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from unittest import mock

import numpy as np
import onnxruntime as ort
import torch
from transformers import ViTConfig, ViTForImageClassification

from export import convert, quantize
from pipelines.bundle.providers import cpu_name
from pipelines.bundle.session import OUTPUTS, OnnxModel
from pipelines.bundle.settings import RuntimeSpec
from pipelines.specs import ImageSpec, ModelSpec

MODELS = {
    "tiny": {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768},
    "small": {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536},
    "base": {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
}
BATCH = 8
MODEL_SPEC = ModelSpec((), "labels", ImageSpec())

Run = Callable[[np.ndarray], object]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="tiny,base")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--round-s", type=float, default=2.0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"{cpu_name()}, ONNX Runtime {ort.__version__}, torch {torch.__version__}, one thread, batch {BATCH}"
    )
    for name in arguments.models.split(","):
        report(name, arguments.rounds, arguments.round_s)


def report(name: str, rounds: int, round_s: float) -> None:
    pixels_nhwc = np.random.default_rng(0).integers(0, 256, (BATCH, 224, 224, 3), dtype=np.uint8)
    rates: dict[str, list[float]] = {}
    runs = variants(name)
    for _ in range(rounds):
        for variant, run in runs.items():
            rates.setdefault(variant, []).append(rate(run, pixels_nhwc, round_s))
    median = {variant: statistics.median(found) for variant, found in rates.items()}
    base = median["fp32, opset 23, 3-D attention (ours)"]
    print(f"\nViT-{name} 224")
    for variant, found in median.items():
        low, high = min(rates[variant]), max(rates[variant])
        print(
            f"  {variant:<45} {found:8.1f} images/s  ({low:.1f}-{high:.1f})  {found / base:5.2f} x ours fp32"
        )


def rate(run: Run, pixels_nhwc: np.ndarray, at_least_s: float) -> float:
    run(pixels_nhwc)
    started, images = time.perf_counter(), 0
    while time.perf_counter() - started < at_least_s:
        run(pixels_nhwc)
        images += len(pixels_nhwc)
    return images / (time.perf_counter() - started)


def variants(name: str) -> dict[str, Run]:
    torch.manual_seed(0)
    config = ViTConfig(num_hidden_layers=12, num_labels=37, **MODELS[name])
    network = ViTForImageClassification(config).eval()
    ours = convert.convert(network, MODEL_SPEC, {})
    calibration_nhwc = np.random.default_rng(1).integers(0, 256, (32, 224, 224, 3), dtype=np.uint8)
    with mock.patch.multiple(quantize, WISHED_AGREEMENT=0.0, WISHED_RELATIVE=1.0):
        int8 = quantize.quantize_int8(ours, calibration_nhwc, MODEL_SPEC, {}).payload
    return {
        "PyTorch, sdpa": pytorch(network),
        "fp32, opset 20 as torch writes it, ORT basic": naive(network, 20, "sdpa"),
        "fp32, opset 20 as torch writes it, ORT all": naive(network, 20, "sdpa", basic=False),
        "fp32, opset 23, 3-D attention (ours)": ours_of(ours),
        "int8, static (ours)": ours_of(int8),
    }


def ours_of(payload: bytes) -> Run:
    return OnnxModel(payload, RuntimeSpec(batch_size=BATCH, threads=1)).run


def naive(network: torch.nn.Module, opset: int, attention: str, *, basic: bool = True) -> Run:
    network.set_attn_implementation(attention)
    payload = convert.finish(convert.trace(network, MODEL_SPEC, opset=opset), {})
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    if basic:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    session = ort.InferenceSession(payload, options, providers=["CPUExecutionProvider"])
    return lambda pixels_nhwc: session.run(OUTPUTS, {"pixels": pixels_nhwc})


def pytorch(network: torch.nn.Module) -> Run:
    module = convert.PixelClassifier(network, MODEL_SPEC).eval()

    def run(pixels_nhwc: np.ndarray) -> object:
        with torch.inference_mode():
            return module(torch.from_numpy(pixels_nhwc))

    return run


if __name__ == "__main__":
    main()
