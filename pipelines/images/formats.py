"""Which format a file is in, by the ending of its name or by its first bytes; nothing is decoded."""

IMAGE_SUFFIXES = frozenset({
    "apng", "avif", "bmp", "cur", "dds", "dib", "eps", "gif", "heic", "heics", "heif", "hif",
    "icns", "ico", "j2c", "j2k", "jfif", "jp2", "jpc", "jpe", "jpeg", "jpf", "jpg", "jpx", "jxl",
    "mpo", "pbm", "pcx", "pgm", "png", "pnm", "ppm", "psd", "qoi", "ras", "sgi", "svg", "svgz",
    "tga", "tif", "tiff", "wbmp", "webp", "xbm", "xpm",
})  # fmt: skip
"""Endings of image files, lower-case, also of formats that are not decoded: their rows say so."""

MAGIC = (
    (b"\xff\xd8\xff", "jpeg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF8", "gif"),
    (b"BM", "bmp"),
    (b"II*\0", "tiff"),
    (b"MM\0*", "tiff"),
    (b"II+\0", "tiff"),
    (b"MM\0+", "tiff"),
    (b"\0\0\x01\0", "ico"),
    (b"\0\0\x02\0", "cur"),
    (b"8BPS", "psd"),
    (b"\0\0\0\x0cjP  ", "jpeg2000"),
    (b"\xff\x4f\xff\x51", "jpeg2000"),
    (b"qoif", "qoi"),
    (b"DDS ", "dds"),
    (b"icns", "icns"),
    (b"\xff\x0a", "jpegxl"),
    (b"\0\0\0\x0cJXL ", "jpegxl"),
    (b"II\xbc", "jpegxr"),
    (b"%!PS", "eps"),
    (b"\xc5\xd0\xd3\xc6", "eps"),
    (b"\xd7\xcd\xc6\x9a", "wmf"),
    (b"AT&TFORM", "djvu"),
    (b"gimp xcf", "xcf"),
    (b"\x76\x2f\x31\x01", "exr"),
    (b"#?RADIANCE", "hdr"),
    (b"FLIF", "flif"),
)
"""First bytes -> format, for a file that no plugin would open."""

HEIF_BRANDS = frozenset(
    {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"mif2", b"mif3", b"msf1"}
)
AVIF_BRANDS = frozenset({b"avif", b"avis"})


def is_image_name(path: str) -> bool:
    """Whether the ending of a file's name says that it is an image."""
    return path.rsplit(".", 1)[-1].lower() in IMAGE_SUFFIXES


def sniff(payload: bytes) -> str | None:
    """Name the image format by the first bytes, lower-case; None for no known format."""
    head = bytes(payload[:1024])
    for magic, name in MAGIC:
        if head.startswith(magic):
            return name
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    if head[4:8] == b"ftyp":
        return _sniff_brands(head)
    if head[:1] == b"P" and head[1:2] in b"1234567" and head[2:3].isspace():
        return "ppm"
    return "svg" if _is_svg(head) else None


def _sniff_brands(head: bytes) -> str | None:
    """Tell AVIF from HEIF by the brands of an ISO media file; None for video."""
    end = min(int.from_bytes(head[:4], "big"), len(head))
    brands = {head[start : start + 4] for start in range(8, end, 4) if start != 12}
    if brands & AVIF_BRANDS:
        return "avif"
    return "heif" if brands & HEIF_BRANDS else None


def _is_svg(head: bytes) -> bool:
    """Whether this is an SVG document rather than HTML that holds one."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return text.startswith(b"<svg") or (
        text.startswith((b"<?xml", b"<!--", b"<!doctype svg")) and b"<svg" in text
    )
