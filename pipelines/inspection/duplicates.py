"""Decoded images -> perceptual hashes, and from them the groups of images that show the same picture.

The hash is the usual pHash (64 bits: which low frequencies of a 32 x 32 grey picture are above their median),
written with scipy's DCT: the libraries that offer it are these six lines with further dependencies. It
survives another size, another quality and small changes of colour, not a crop, a rotation or a mirror.
"""

import numpy as np
import numpy.typing as npt
from scipy import fft, sparse

from pipelines.images.prepare import Pixels
from pipelines.specs import ImageSpec

HASHED = ImageSpec(height=32, width=32)
"""The pixels that a hash is made of."""
LOW = 8
"""Frequencies kept along each axis: 8 x 8 bits."""
LUMA = np.array([0.299, 0.587, 0.114], np.float32)
"""Weights of red, green and blue (ITU-R BT.601, as Pillow's `L`)."""
FLAT = 2.0
"""Standard deviation of grey values below which a picture has no structure to compare."""
MAX_DISTANCE = 4
"""Bits in which two hashes of one picture may differ."""
PAIRS_AT_ONCE = 1 << 24
"""128 MB of differences at a time."""

Hashes = npt.NDArray[np.uint64]


def hash_pictures(pixels_nhwc: Pixels) -> tuple[Hashes, npt.NDArray[np.bool_]]:
    """The hash of each image of `HASHED` size, and whether it has structure enough to have one."""
    grey_nhw = pixels_nhwc.astype(np.float32) @ LUMA
    low_nf = fft.dctn(grey_nhw, axes=(1, 2))[:, :LOW, :LOW].reshape(len(grey_nhw), LOW * LOW)
    bits_nf = low_nf > np.median(low_nf, axis=1, keepdims=True)
    hashes = np.packbits(bits_nf, axis=1).view(np.uint64).ravel()
    return hashes, grey_nhw.std(axis=(1, 2)) >= FLAT


def group_alike(hashes: Hashes, max_distance: int = MAX_DISTANCE) -> npt.NDArray[np.int64]:
    """A group number for each hash; hashes that differ in at most so many bits are in one group.

    All pairs of distinct hashes are compared: 100,000 take some 10 seconds of one core.
    """
    distinct, which = np.unique(hashes, return_inverse=True)
    n = len(distinct)
    pairs = [np.zeros((2, 0), np.int64)]
    step = max(1, PAIRS_AT_ONCE // max(n, 1))
    for start in range(0, n, step):
        differing = np.bitwise_count(distinct[start : start + step, None] ^ distinct[None, start:])
        pairs.append(np.stack(np.nonzero(differing <= max_distance)) + start)
    one, other = np.concatenate(pairs, axis=1)
    graph = sparse.coo_matrix((np.ones(len(one), np.int8), (one, other)), shape=(n, n))
    _, group = sparse.csgraph.connected_components(graph, directed=False)
    return np.asarray(group[which], np.int64)
