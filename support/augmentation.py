"""Augmentation of batches on their device, drawn per sample.

`draw` is what common.Loader hands out: draw(name) gives uniform numbers in [0, 1), float32 (B,). Letters in shapes:
B the batch, C channels, H and W pixels.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from common import constant


def random_flip(images: Tensor, u: Tensor) -> Tensor:
    """Mirror the images (B, C, H, W) whose u (B,) is below 0.5."""
    return torch.where((u < 0.5)[:, None, None, None], images.flip(-1), images)


def random_crop(images: Tensor, u: Tensor, v: Tensor, pad: int) -> Tensor:
    """Pad (B, C, H, W) with `pad` black pixels on each side; cut the old size out, at an offset by u and v (B,)."""
    h, w = images.shape[-2:]
    sample = torch.arange(len(images), device=images.device)
    y, x = ((place * (2 * pad + 1)).long() for place in (u, v))
    crops = F.pad(images, (pad, pad, pad, pad)).unfold(2, h, 1).unfold(3, w, 1)  # a view of all, (B, C, y, x, H, W)
    return crops[sample, :, y, x]


def grey_of(images: Tensor) -> Tensor:
    """Luma (B, 1, H, W) of images (B, C, H, W), C = 1 or 3: weights of ITU-R BT.601, as Pillow and torchvision."""
    if images.shape[1] == 1:
        return images
    return (images * constant((0.2989, 0.587, 0.114), images.device)).sum(1, keepdim=True)


def color_jitter(images: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor) -> Tensor:
    """Scale brightness, then contrast about the mean grey, then saturation; each factor (B,), 1 changes nothing.

    images: float (B, C, H, W) in [0, 255]; clamped there after each step. The operations are torchvision's; the order
    is fixed, where its ColorJitter draws one.
    """
    brightness, contrast, saturation = (factor[:, None, None, None] for factor in (brightness, contrast, saturation))
    images = (images * brightness).clamp(0, 255)
    mean = grey_of(images).mean((1, 2, 3), keepdim=True)
    images = torch.lerp(mean, images, contrast).clamp(0, 255)
    if images.shape[1] == 1:  # a grey image has no saturation
        return images
    return torch.lerp(grey_of(images), images, saturation).clamp(0, 255)


def augment(
    images: Tensor, draw, crop: int = 0, jitter: float = 0.0, rotate: float = 0.0, shift: float = 0.0, zoom: float = 0.0
) -> Tensor:
    """Flip, pad-and-crop by `crop` pixels, `random_affine`, jitter in [1 - jitter, 1 + jitter]; drawn per sample.

    images: uint8 (B, C, H, W). draw: see Loader. rotate: degrees; shift, zoom: see `random_affine`. Returns uint8; with
    jitter or `random_affine` float32 in [0, 255].
    """
    images = random_flip(images, draw("flip"))
    if crop:
        images = random_crop(images, draw("crop y"), draw("crop x"), crop)
    if rotate or shift or zoom:
        images = random_affine(images, draw, rotate, shift, zoom)
    if jitter:
        factors = (1 + jitter * (2 * draw(name) - 1) for name in ("brightness", "contrast", "saturation"))
        images = color_jitter(images.float(), *factors)
    return images


def random_affine(images: Tensor, draw, degrees: float, shift: float, zoom: float) -> Tensor:
    """Rotate, shift and zoom about the centre, drawn per sample: +- degrees, +- shift (share of the size), 1 +- zoom.

    images: (B, C, H, W) with H = W, bilinear, black outside. Returns float32.
    """
    angle, x, y, scale = (2 * draw(name) - 1 for name in ("rotation", "shift x", "shift y", "zoom"))
    angle, scale = torch.deg2rad(degrees * angle), 1 + zoom * scale
    cos, sin = angle.cos() / scale, angle.sin() / scale
    rows = [torch.stack([cos, -sin, 2 * shift * x], 1), torch.stack([sin, cos, 2 * shift * y], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), images.shape, align_corners=False)
    return F.grid_sample(images.float(), grid, align_corners=False)


# RandAugment's operations with torchvision's ranges, and inversion, which NCCTFER (Sec. 4.2) names.
OPERATIONS = (
    "identity",
    "shear x",
    "shear y",
    "translate x",
    "translate y",
    "rotate",
    "brightness",
    "color",
    "contrast",
    "sharpness",
    "posterize",
    "solarize",
    "autocontrast",
    "equalize",
    "invert",
)


def rand_augment(images: Tensor, draw, layers: int = 2, magnitude: int = 10) -> Tensor:
    """RandAugment (Cubuk et al., 2020): `layers` operations one after the other, drawn anew for every sample.

    images: uint8 (B, C, H, W). draw: see common.Loader. magnitude in [0, 30]. Returns uint8.
    """
    for layer in range(layers):
        operation = (draw(f"operation {layer}") * len(OPERATIONS)).long()
        sign = torch.where(draw(f"sign {layer}") < 0.5, -1.0, 1.0)
        images = apply_operations(images, operation, sign, magnitude)
    return images


def apply_operations(images: Tensor, operation: Tensor, sign: Tensor, magnitude: int = 10) -> Tensor:
    """One operation for each image, equal to torchvision's on that image alone.

    images: uint8 (B, C, H, W), or float in [0, 255], which is rounded first. operation: int64 (B,), indices into
    OPERATIONS. sign: (B,), -1 or 1, the direction of the operations that have one. magnitude in [0, 30]. Returns uint8.
    """
    images = images.round().to(torch.uint8) if images.is_floating_point() else images.clone()
    for change, numbers in KINDS.items():
        if takes_its_own_alone(images.device):
            rows = sum(operation == number for number in numbers).nonzero()[:, 0]
            if len(rows):
                images[rows] = change(images[rows], operation[rows], sign[rows], magnitude)
        else:
            images = change(images, operation, sign, magnitude)
    return images


def takes_its_own_alone(device: torch.device) -> bool:
    """Whether an image passes through the kind of step of its own operation alone, which is less to compute.

    On a GPU the host would have to wait for the places of these images: there each image passes through every kind of
    step, and those that are not its own leave it as it is.
    """
    return device.type == "cpu"


@functools.lru_cache
def bin_of(top: float, magnitude: int) -> float:
    """The magnitude-th of torchvision's 31 bins from 0 to `top`."""
    return torch.linspace(0, top, 31)[magnitude].item()


def chosen(operation: Tensor, name: str) -> Tensor:
    """bool (B,): the images that have this operation."""
    return operation == OPERATIONS.index(name)


def ratio_of(sign: Tensor, magnitude: int) -> Tensor:
    """The factor of brightness, color, contrast and sharpness, float64 (B,)."""
    return 1 + bin_of(0.9, magnitude) * sign.double()


def shear_translate_rotate(images: Tensor, operation: Tensor, sign: Tensor, magnitude: int) -> Tensor:
    """Sample each image at A (x, y, 1), in pixels from its centre, to the nearest pixel; black outside."""
    n, _, h, w = images.shape
    shear, angle = bin_of(0.3, magnitude) * sign, torch.deg2rad(bin_of(30, magnitude) * sign)  # (B,)
    zero, one = torch.zeros_like(shear), torch.ones_like(shear)

    def where(name, value, other):
        return torch.where(chosen(operation, name), value, other)

    cos, sin = where("rotate", angle.cos(), one), where("rotate", angle.sin(), zero)
    shear_x, shear_y = where("shear x", shear, zero), where("shear y", shear, zero)  # about the upper left corner
    shift_x = where("translate x", int(bin_of(150 / 331 * w, magnitude)) * sign, zero)
    shift_y = where("translate y", int(bin_of(150 / 331 * h, magnitude)) * sign, zero)
    rows = [
        torch.stack([cos, shear_x - sin, shear_x * h / 2 - shift_x], 1),
        torch.stack([shear_y + sin, cos, shear_y * w / 2 - shift_y], 1),
    ]
    x = torch.arange(w, device=images.device) + 0.5 - w / 2
    y = torch.arange(h, device=images.device) + 0.5 - h / 2
    place = torch.stack([x.expand(h, w), y[:, None].expand(h, w), torch.ones(h, w, device=images.device)], -1).view(
        -1, 3
    )  # (H W, 3)
    grid = torch.stack([place @ rows[0].T / (w / 2), place @ rows[1].T / (h / 2)], -1)  # (H W, B, 2), in [-1, 1] inside
    grid = grid.view(h, w, n, 2).permute(2, 0, 1, 3)
    return (
        F.grid_sample(images.float(), grid, mode="nearest", padding_mode="zeros", align_corners=False)
        .round()
        .to(torch.uint8)
    )


def apply_tables(images: Tensor, operation: Tensor, sign: Tensor, magnitude: int) -> Tensor:
    """The operations that map each value on its own: one table of 256 entries for each image and channel."""
    n, c, h, w = images.shape
    flat = images.view(n, c, h * w).long()
    value = torch.arange(256, device=images.device, dtype=torch.float32)
    hist = torch.zeros(n, c, 256, device=images.device).scatter_add_(
        2, flat, torch.ones(1, device=images.device).expand(flat.shape)
    )
    ratio = ratio_of(sign, magnitude)
    own, other = ratio.float()[:, None, None], (1 - ratio).float()[:, None, None]
    mean = grey_of(images.float()).floor().mean((1, 2, 3))[:, None, None]

    pixels = images.view(n, c, h * w)
    low, high = pixels.amin(2, keepdim=True).float(), pixels.amax(2, keepdim=True)
    top, high = high.long(), high.float()
    stretched = torch.where(high > low, (value - low) * (255 / (high - low).clamp(min=1)), value)
    # Equalize: the step is the count of all pixels but those of the largest value, over 255
    unit = ((h * w - hist.gather(2, top)) / 255).floor()
    before = hist.cumsum(2) - hist  # pixels of smaller values
    equal = torch.where(unit > 0, ((before + (unit / 2).floor()) / unit.clamp(min=1)).floor(), value)
    equal[:, :, 0] = torch.where(unit[:, :, 0] > 0, 0, value[0])

    bits = 8 - round(4 * magnitude / 30)
    tables = {
        "brightness": own * value,
        "contrast": own * value + other * mean,
        "posterize": (value / 2 ** (8 - bits)).floor() * 2 ** (8 - bits),
        "solarize": torch.where(value >= 255 - bin_of(255, magnitude), 255 - value, value),
        "autocontrast": stretched,
        "equalize": equal,
        "invert": 255 - value,
    }
    table = value.expand(n, c, 256)
    for name, entries in tables.items():
        table = torch.where(chosen(operation, name)[:, None, None], entries, table)
    return table.clamp(0, 255).to(torch.uint8).gather(2, flat).view(n, c, h, w)


def change_color(images: Tensor, operation: Tensor, sign: Tensor, magnitude: int) -> Tensor:
    """Blend each image with its luma."""
    if images.shape[1] == 1:  # a grey image has no colour to blend
        return images
    ratio = torch.where(chosen(operation, "color"), ratio_of(sign, magnitude), 1.0)
    return blend(images, grey_of(images.float()).floor(), ratio)


def change_sharpness(images: Tensor, operation: Tensor, sign: Tensor, magnitude: int) -> Tensor:
    """Blend each image with its blurred self."""
    ratio = torch.where(chosen(operation, "sharpness"), ratio_of(sign, magnitude), 1.0)
    return blend(images, blurred(images), ratio)


@functools.lru_cache
def sharpness_kernel(device: torch.device) -> Tensor:
    return torch.tensor([[1.0, 1, 1], [1, 5, 1], [1, 1, 1]], device=device)  # whole numbers: exact in TF32 too


def blurred(images: Tensor) -> Tensor:
    """float32 (B, C, H, W): the 3 x 3 mean with a centre of weight 5, rounded; the border as it is. For sharpness."""
    c, smooth = images.shape[1], images.float()
    inner = F.conv2d(smooth, sharpness_kernel(images.device).expand(c, 1, 3, 3), groups=c)
    smooth[:, :, 1:-1, 1:-1] = (inner / 13).round()
    return smooth


def blend(images: Tensor, other: Tensor, ratio: Tensor) -> Tensor:
    """uint8 of ratio * images + (1 - ratio) * other, clamped and truncated as in torchvision. ratio: (B,)."""
    ratio = ratio[:, None, None, None]
    return (ratio.float() * images + (1 - ratio).float() * other).clamp(0, 255).to(torch.uint8)


# Each kind of step, and the operations that it does. An image with another operation leaves it as it came.
KINDS = {
    shear_translate_rotate: range(1, 6),
    apply_tables: (6, 8, *range(10, 15)),
    change_color: (7,),
    change_sharpness: (9,),
}
