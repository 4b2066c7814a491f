"""uint8 pixels [n, height, width, 3] as an Arrow column and back without a copy; as a JPEG for a page."""

import base64
import io

import numpy as np
import pyarrow as pa
from PIL import Image

from pipelines.images.prepare import Pixels
from pipelines.schema import pixels_type
from pipelines.specs import ImageSpec


def black_pixels(n: int, spec: ImageSpec) -> Pixels:
    """uint8 [n, height, width, 3] of zeros; rows without pixels stay zero."""
    return np.zeros((n, spec.height, spec.width, 3), np.uint8)


def pixels_column(pixels_nhwc: Pixels) -> pa.Array:
    """uint8 [n, height, width, 3] as fixed-size binary; a C-contiguous array is not copied."""
    n, height, width, _ = pixels_nhwc.shape
    buffers = [None, pa.py_buffer(np.ascontiguousarray(pixels_nhwc))]
    return pa.FixedSizeBinaryArray.from_buffers(pixels_type(height, width), n, buffers)


def pixels_of(column: pa.ChunkedArray, spec: ImageSpec) -> Pixels:
    """The inverse of `pixels_column`: uint8 [n, height, width, 3]; a single chunk is not copied."""
    array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    size = spec.pixel_bytes
    flat = np.frombuffer(array.buffers()[1], np.uint8, len(array) * size, array.offset * size)
    return flat.reshape(len(array), spec.height, spec.width, 3)


def jpeg_uri(pixels_hwc: np.ndarray) -> str:
    """uint8 RGB as a JPEG `data:` URI, for pages that load nothing from elsewhere."""
    sink = io.BytesIO()
    Image.fromarray(pixels_hwc).save(sink, format="JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(sink.getvalue()).decode()}"
