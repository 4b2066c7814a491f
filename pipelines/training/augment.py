"""Random changes of a batch of training images, as tensor operations on the training device.

First `draw` decides everything for a whole global batch from one generator, then each worker applies its
slice: so the same seed changes the same images in the same way, however many workers share them. Every
geometric change is one affine map, sampled once. (No torchvision: for some builds of torch there is none.)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pipelines.training.recipe import Augment

Uniform = Callable[[float, float], Tensor]
Column = Callable[[Tensor], Tensor]
LUMA = (0.299, 0.587, 0.114)
"""Grey from RGB, ITU-R BT.601."""
YIQ = ((0.299, 0.587, 0.114), (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))
"""RGB to luma and two chroma axes, in whose plane a hue is an angle (NTSC)."""
BLUR_TAPS = 9
POLICY = (
    "rotate", "shear_x", "shear_y", "translate_x", "translate_y", "brightness", "contrast", "saturation",
    "sharpness", "posterize", "solarize", "autocontrast",
)  # fmt: skip
"""Operations of the policy: RandAugment's (Cubuk et al. 2020) but equalize and identity."""


@dataclass(frozen=True)
class Draws:
    """What happens to each image; every tensor's first axis is the batch."""

    affine: Tensor
    """[n, 2, 3]: output to input coordinates in [-1, 1]."""
    brightness: Tensor
    contrast: Tensor
    saturation: Tensor
    """[n] factors, 1 changes nothing."""
    hue: Tensor
    """[n] radians."""
    sharpness: Tensor
    """[n] blend with the blurred picture: below 1 softens, above sharpens."""
    posterize_bits: Tensor
    solarize_above: Tensor
    autocontrast: Tensor
    """[n] bits kept, threshold in [0, 1], 0 or 1."""
    blur_sigma: Tensor
    """[n] pixels, 0 leaves as is."""
    erased: Tensor
    """[n, 4] top, bottom, left, right in [0, 1] of the side; all 0 erases nothing."""
    erased_colour: Tensor
    """[n, 3] what is put there."""
    mix_share: Tensor
    """[n] share of an image's own in its pair, by mixup."""
    mix_box: Tensor
    """[n, 4] rectangle taken from the partner, by cutmix."""

    def slice(self, start: int, stop: int) -> "Draws":
        """The same decisions for some of the images."""
        return Draws(**{name: value[start:stop] for name, value in vars(self).items()})

    def active(self) -> frozenset[str]:
        """Names of the changes that some image has: asked before a GPU has them, which would have to wait."""
        still = {"brightness": 1, "contrast": 1, "saturation": 1, "sharpness": 1}
        still |= {"mix_share": 1, "posterize_bits": 8, "solarize_above": 1}
        return frozenset(name for name, one in vars(self).items() if (one != still.get(name, 0)).any())

    def to(self, device: torch.device) -> "Draws":
        return Draws(**{name: value.to(device) for name, value in vars(self).items()})


def draw(spec: Augment, n: int, generator: torch.Generator) -> Draws:
    """Decide the changes of `n` images."""

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(n, generator=generator) * (high - low) + low

    factors = {
        name: uniform(1 - getattr(spec, name), 1 + getattr(spec, name)).clamp(min=0)
        for name in ("brightness", "contrast", "saturation")
    }
    extra = _draw_policy(spec, n, generator)
    turn = uniform(-1, 1) * math.radians(spec.rotation_degrees)
    affine = _compose(_crop_map(spec, uniform), turn + extra.pop("rotate"), extra)
    factors = {name: factor * extra.pop(name) for name, factor in factors.items()}
    hue = uniform(-1, 1) * math.radians(spec.hue_degrees)
    sigma = uniform(0.1, 2.0) * (uniform(0, 1) < spec.blur)
    box = _rectangle(uniform(0.02, 0.33), uniform(-1.2, 1.2).exp(), uniform(0, 1), uniform(0, 1))
    erased = box * (uniform(0, 1) < spec.erasing)[:, None]
    share, mix_box = _draw_mix(spec, n, generator)
    return Draws(
        affine=affine,
        **factors,
        **extra,
        hue=hue,
        blur_sigma=sigma,
        erased=erased,
        erased_colour=torch.rand(n, 3, generator=generator),
        mix_share=share,
        mix_box=mix_box,
    )


def _crop_map(spec: Augment, uniform: Uniform) -> Tensor:
    """Random resized crop with flips, as an affine map [n, 2, 3] from the output to the whole picture."""
    area = uniform(spec.min_crop_scale, 1.0)
    aspect = (uniform(-1, 1) * math.log(spec.crop_aspect)).exp() if spec.min_crop_scale < 1 else uniform(1, 1)
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    affine = torch.zeros(len(area), 2, 3)
    affine[:, 0, 0] = width * torch.where(uniform(0, 1) < spec.flip, -1.0, 1.0)
    affine[:, 1, 1] = height * torch.where(uniform(0, 1) < spec.vertical_flip, -1.0, 1.0)
    affine[:, 0, 2] = uniform(-1, 1) * (1 - width)
    affine[:, 1, 2] = uniform(-1, 1) * (1 - height)
    return affine


def _compose(crop: Tensor, turn: Tensor, extra: dict[str, Tensor]) -> Tensor:
    """The crop of a picture that was rotated, sheared and shifted before; takes its part out of `extra`."""
    cos, sin = turn.cos(), turn.sin()
    rotation = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)
    shear = torch.eye(2).repeat(len(turn), 1, 1)
    shear[:, 0, 1], shear[:, 1, 0] = extra.pop("shear_x"), extra.pop("shear_y")
    shift = torch.stack([extra.pop("translate_x"), extra.pop("translate_y")], 1)
    linear = rotation @ shear
    moved = torch.cat([linear, shift[:, :, None]], 2)
    whole = torch.cat([crop, torch.tensor([[[0.0, 0.0, 1.0]]]).expand(len(turn), 1, 3)], 1)
    return moved @ whole


def _draw_policy(spec: Augment, n: int, generator: torch.Generator) -> dict[str, Tensor]:
    """The policy's operations on each image; what was not drawn is the value that changes nothing."""
    chosen = torch.zeros(n, len(POLICY))
    for _ in range(spec.randaugment_num_ops):
        chosen.scatter_(1, torch.randint(len(POLICY), (n, 1), generator=generator), 1.0)
    sign = torch.where(torch.rand(n, len(POLICY), generator=generator) < 0.5, -1.0, 1.0)
    strength = spec.randaugment_magnitude / 10
    on = dict(zip(POLICY, chosen.unbind(1), strict=True))
    push = dict(zip(POLICY, (chosen * sign * strength).unbind(1), strict=True))
    return {
        "rotate": push["rotate"] * math.radians(30),
        "shear_x": push["shear_x"] * 0.3,
        "shear_y": push["shear_y"] * 0.3,
        "translate_x": push["translate_x"] * 0.6,
        "translate_y": push["translate_y"] * 0.6,
        "brightness": 1 + push["brightness"] * 0.9,
        "contrast": 1 + push["contrast"] * 0.9,
        "saturation": 1 + push["saturation"] * 0.9,
        "sharpness": 1 + push["sharpness"] * 0.9,
        "posterize_bits": 8 - on["posterize"] * round(4 * strength),
        "solarize_above": 1 - on["solarize"] * strength * 0.9 + (1 - on["solarize"]),
        "autocontrast": on["autocontrast"],
    }


def _draw_mix(spec: Augment, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mixup shares and cutmix rectangles, the same for both images of a pair (2i, 2i + 1)."""
    share, box = torch.ones(n), torch.zeros(n, 4)
    kinds = [name for name in ("mixup", "cutmix") if getattr(spec, name) > 0]
    for pair in range(n // 2) if kinds else ():
        if torch.rand(1, generator=generator) >= spec.mix_prob:
            continue
        kind = kinds[int(torch.randint(len(kinds), (1,), generator=generator))]
        own = _beta(getattr(spec, kind), generator)
        both = slice(2 * pair, 2 * pair + 2)
        if kind == "mixup":
            share[both] = own
        else:
            centre = torch.rand(2, generator=generator)
            box[both] = _rectangle(torch.tensor([1 - own]), torch.ones(1), centre[:1], centre[1:])
    return share, box


def _beta(alpha: float, generator: torch.Generator) -> float:
    """One draw of Beta(alpha, alpha), at least a half so that an image keeps most of itself."""
    gamma = torch._standard_gamma(torch.full((2,), float(alpha)), generator=generator)
    first = float(gamma[0] / gamma.sum().clamp(min=1e-12))
    return max(first, 1 - first)


def _rectangle(area: Tensor, aspect: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """[n, 4] top, bottom, left, right of boxes of this area in the unit square, at relative places x, y."""
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    left, top = x * (1 - width), y * (1 - height)
    return torch.stack([top, top + height, left, left + width], 1)


def apply(pixels_nhwc: Tensor, draws: Draws, *, height: int, width: int) -> Tensor:
    """uint8 [n, h, w, 3] -> changed float32 [n, 3, height, width] in [0, 1]; targets: `mix_targets`."""
    images = pixels_nhwc.permute(0, 3, 1, 2).float() / 255
    active, draws = draws.active(), draws.to(images.device)
    grid = functional.affine_grid(draws.affine, [len(images), 3, height, width], align_corners=False)
    images = functional.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    images = _photometric(images, draws, active)
    if "blur_sigma" in active:
        images = _blurred(images, draws.blur_sigma)
    if "erased" in active:
        images = _erased(images, draws)
    return _mixed(images, draws, active)


def _photometric(images: Tensor, draws: Draws, active: frozenset[str]) -> Tensor:
    """Colour changes; each is skipped when no image of the batch has it."""

    def column(values: Tensor) -> Tensor:
        return values[:, None, None, None]

    if "brightness" in active:
        images = images * column(draws.brightness)
    if "contrast" in active:
        mean = _grey(images).mean((2, 3), keepdim=True)
        images = mean + (images - mean) * column(draws.contrast)
    if "saturation" in active:
        flat = _grey(images)
        images = flat + (images - flat) * column(draws.saturation)
    if "hue" in active:
        images = _turned_hue(images, draws.hue)
    images = images.clamp(0, 1)
    if "sharpness" in active:
        soft = _blurred(images, torch.ones_like(draws.sharpness))
        images = (soft + (images - soft) * column(draws.sharpness)).clamp(0, 1)
    return _toned(images, draws, active, column)


def _toned(images: Tensor, draws: Draws, active: frozenset[str], column: Column) -> Tensor:
    """Posterize, solarize, autocontrast."""
    if "posterize_bits" in active:
        levels = column(2.0**draws.posterize_bits)
        images = torch.where(
            levels < 256, (images * levels).floor().clamp(max=levels - 1) / (levels - 1), images
        )
    if "solarize_above" in active:
        images = torch.where(images > column(draws.solarize_above), 1 - images, images)
    if "autocontrast" in active:
        low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
        stretched = (images - low) / (high - low).clamp(min=1 / 255)
        images = torch.where(column(draws.autocontrast) > 0, stretched, images)
    return images


def _grey(images: Tensor) -> Tensor:
    weights = torch.tensor(LUMA, device=images.device)[None, :, None, None]
    return (images * weights).sum(1, keepdim=True)


def _turned_hue(images: Tensor, radians: Tensor) -> Tensor:
    """Rotate the chroma plane; grey stays grey."""
    yiq = torch.tensor(YIQ, device=images.device)
    rotation = torch.eye(3, device=images.device).repeat(len(radians), 1, 1)
    rotation[:, 1, 1] = rotation[:, 2, 2] = radians.cos()
    rotation[:, 1, 2], rotation[:, 2, 1] = -radians.sin(), radians.sin()
    change = torch.linalg.inv(yiq) @ rotation @ yiq
    return torch.einsum("nij,njhw->nihw", change, images)


def _blurred(images: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur with a sigma of its own for each image, 0 leaving it as it is."""
    n, channels, height, width = images.shape
    offset = torch.arange(BLUR_TAPS, device=images.device) - BLUR_TAPS // 2
    taps = torch.exp(-0.5 * (offset / sigma.clamp(min=0.05)[:, None]) ** 2)
    taps = (taps / taps.sum(1, keepdim=True)).repeat_interleave(channels, 0)[:, None, None, :]
    reach = BLUR_TAPS // 2
    flat = images.reshape(1, n * channels, height, width)
    padded = functional.pad(flat, (reach, reach, reach, reach), mode="replicate")
    across = functional.conv2d(padded, taps, groups=n * channels)
    both = functional.conv2d(across, taps.transpose(2, 3), groups=n * channels)
    return both.reshape(n, channels, height, width)


def _inside(boxes: Tensor, height: int, width: int) -> Tensor:
    """[n, 1, height, width]: which pixels' centres are in each image's box."""
    y = ((torch.arange(height, device=boxes.device) + 0.5) / height)[None, :, None]
    x = ((torch.arange(width, device=boxes.device) + 0.5) / width)[None, None, :]
    top, bottom, left, right = (side[:, None, None] for side in boxes.unbind(1))
    return ((y >= top) & (y < bottom) & (x >= left) & (x < right))[:, None]


def _erased(images: Tensor, draws: Draws) -> Tensor:
    """A random colour instead of the drawn rectangles."""
    colour = draws.erased_colour[:, :, None, None]
    return torch.where(_inside(draws.erased, *images.shape[2:]), colour, images)


def _partner(batch: Tensor) -> Tensor:
    """Each image's neighbour in its pair (2i, 2i + 1); an odd last one is its own."""
    order = torch.arange(len(batch), device=batch.device)
    other = order ^ 1
    return batch[torch.where(other < len(batch), other, order)]


def _mixed(images: Tensor, draws: Draws, active: frozenset[str]) -> Tensor:
    """Mixup and cutmix with the partner."""
    if "mix_share" in active:
        share = draws.mix_share[:, None, None, None]
        images = images * share + _partner(images) * (1 - share)
    if "mix_box" in active:
        images = torch.where(_inside(draws.mix_box, *images.shape[2:]), _partner(images), images)
    return images


def mix_targets(targets_nc: Tensor, draws: Draws, *, height: int, width: int) -> Tensor:
    """Targets [n, classes] in the shares in which `apply` mixed the images, counted in pixels."""
    taken = _inside(draws.mix_box, height, width).float().mean((1, 2, 3))
    own = (draws.mix_share * (1 - taken)).to(targets_nc.device)[:, None]
    return targets_nc * own + _partner(targets_nc) * (1 - own)
