"""Layers, initial values and the update that more than one model uses."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from custom_models.config import ModelConfig

# Annex K of the JPEG standard (ITU-T T.81), for luminance and chrominance at quality 50.
LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMINANCE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 8,) * 4,
)
# Y, Cb, Cr from R, G, B (JFIF 1.02).
TO_YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))


def init_dcgan(module: nn.Module) -> None:
    """Weights N(0, 0.02) (Radford et al. 2016, section 4), batch norm scales N(1, 0.02)."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


def update(
    optimizer: torch.optim.Optimizer, loss: Tensor, largest_norm: float | None = None
) -> None:
    """One step of the optimizer down the gradient of the loss, a tensor without dimensions.

    largest_norm: to which longer gradients are shortened. Outside autocast, which would round the
    second derivative of a gradient penalty.
    """
    with torch.autocast(loss.device.type, enabled=False):
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if largest_norm is not None:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(parameters, largest_norm)
        optimizer.step()


LOWEST_RATE = 0.02  # of the learning rate, where its decay ends


def cosine_decay(done: float) -> float:
    """What is left of a learning rate after this share of its decay: from 1 to `LOWEST_RATE`.

    Loshchilov and Hutter 2017, "SGDR", equation (5), without restarts.
    """
    return LOWEST_RATE + (1 - LOWEST_RATE) * (1 + math.cos(math.pi * min(1.0, done))) / 2


def warmed_cosine_decay(images_seen: int, warmup_images: int, decay_images: float) -> float:
    """What a learning rate is multiplied by: a linear warm-up, and a cosine down to a fiftieth."""
    return min(1.0, images_seen / max(1, warmup_images)) * cosine_decay(images_seen / decay_images)


def sides_down_to_four(image_size: int) -> list[int]:
    """Sides in pixels from the image down to 4 or 3: 28, 14, 7, 4 or 64, 32, 16, 8, 4."""
    sides = [image_size]
    while sides[-1] > 4:
        sides.append((sides[-1] + 1) // 2)
    return sides


def transposed_convolutions(
    inputs: int, base_channels: int, image_channels: int, image_size: int
) -> nn.Sequential:
    """The generator of DCGAN for any side: [N, inputs, 1, 1] → images in [-1, 1], [N, C, S, S].

    base_channels: at half the side, doubled at each further halving (Radford et al. 2016,
    section 3).
    """
    sides = sides_down_to_four(image_size)
    widths = [base_channels * 2**level for level in range(len(sides) - 1)]
    layers = [nn.ConvTranspose2d(inputs, widths[-1], sides[-1], bias=False)]
    for level in range(len(widths) - 1, -1, -1):
        outputs = widths[level - 1] if level else image_channels
        # Doubles the side; a kernel of 3 reaches an odd one (4 → 7) that 4 would overshoot.
        kernel = 3 if sides[level] % 2 else 4
        layers += [nn.BatchNorm2d(widths[level]), nn.ReLU()]
        layers.append(nn.ConvTranspose2d(widths[level], outputs, kernel, 2, 1, bias=False))
    return nn.Sequential(*layers, nn.Tanh())


class ResidualBlock(nn.Module):
    """x + two 3×3 convolutions, without normalisation; [N, width, S, S] in and out.

    The second begins at zero and the block as the identity (Zhang et al. 2019, "Fixup
    Initialization").
    """

    def __init__(self, width: int):
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.leaky_relu(self.first(F.leaky_relu(x, 0.2)), 0.2))


CHROMA = ("mean", "dct")  # the two ways in which libjpegs halve colours


class JPEG(nn.Module):
    """What storing an image as JPEG does to it, with a gradient: [-1, 1] → [-1, 1], [N, 3, S, S].

    The images of BloodMNIST were stored so before they became arrays. A generator that ends in this
    layer draws the cell and leaves the traces of the file format to the format, as a known
    measurement is treated in AmbientGAN (Bora et al. 2018). Baseline JPEG with chroma at half the
    resolution (ITU-T T.81; JFIF 1.02). Roundings pass their gradient on as if they were not there.
    quality: 1 to 100, of libjpeg's scale. chroma: how colours are halved, and doubled in reading:
    "mean", as Pillow's libjpeg-turbo does, or "dct", within the cosine transform, as the IJG's
    libjpeg does from version 7 on, and as was done to BloodMNIST. Always float32.
    """

    def __init__(self, quality: int, chroma: str):
        super().__init__()
        scale = 5000 // quality if quality < 50 else 200 - 2 * quality
        tables = torch.tensor([LUMINANCE, CHROMINANCE])
        tables = ((tables * scale + 50) // 100).clamp(1, 255).float()
        self.chroma = chroma
        to_ycbcr = torch.tensor(TO_YCBCR)
        for name, value in {
            "tables": tables,
            "cosines": _cosines(8),
            "cosines_16": _cosines(16),
            "to_ycbcr": to_ycbcr,
            "to_rgb": torch.linalg.inv(to_ycbcr.double()).float(),
        }.items():
            self.register_buffer(name, value, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        luma, chroma = self.encode(images)
        return self.decode(_round(luma), _round(chroma), images.shape[2:])

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficients in units of the tables' steps; rounded, they are the numbers in the file.

        Luma [N, 64, H, W] and chroma [N, 128, H / 2, W / 2] (Cb's 64, then Cr's) for H × W blocks
        of 8 × 8 pixels; the 64 in rows, from low to high frequencies.
        """
        with torch.autocast(images.device.type, enabled=False):
            height, width = images.shape[2:]
            pixels = _round(((images.float() + 1) * 127.5).clamp(0, 255))
            # Whole blocks of 16 × 16 pixels, the last column and row repeated.
            pixels = repeat_last(pixels, -height % 16, -width % 16)
            ycbcr = _round(torch.einsum("dc,nchw->ndhw", self.to_ycbcr, pixels))
            luma = _transform(ycbcr[:, :1] - 128, self.cosines)
            if self.chroma == "mean":
                # libjpeg-turbo repeats the last row of what it has halved.
                halved = _halve(ycbcr[:, 1:, : height + height % 2])
                halved = repeat_last(halved, -halved.shape[2] % 8, 0)
                chroma = _transform(halved, self.cosines)
            else:
                # The low half of a block's frequencies is the block at half its size, doubled.
                chroma = _transform(ycbcr[:, 1:], self.cosines_16)[..., :8, :8] / 2
            return self._in_rows(luma, self.tables[0]), self._in_rows(chroma, self.tables[1])

    def _in_rows(self, coefficients: Tensor, table: Tensor) -> Tensor:
        """[N, C, H, W, 8, 8] → [N, 64 C, H, W], in steps of the table."""
        return (coefficients / table).flatten(4).permute(0, 1, 4, 2, 3).flatten(1, 2)

    def decode(self, luma: Tensor, chroma: Tensor, size: tuple[int, int]) -> Tensor:
        """Coefficients as of `encode` → images in [-1, 1], [N, 3, *size]."""
        with torch.autocast(luma.device.type, enabled=False):
            height, width = size
            luma = _invert(self._in_blocks(luma, self.tables[0]), self.cosines) + 128
            chroma = self._in_blocks(chroma, self.tables[1])
            if self.chroma == "mean":
                # The decoder knows the true size, and enlarges no more of the chroma than that.
                halved = _invert(chroma, self.cosines)
                chroma = _enlarge(halved[:, :, : (height + 1) // 2, : (width + 1) // 2])
            else:
                chroma = _invert(F.pad(2 * chroma, (0, 8, 0, 8)), self.cosines_16)
            luma, chroma = luma[:, :, :height, :width], chroma[:, :, :height, :width]
            ycbcr = torch.cat([luma, chroma], dim=1)
            pixels = _round(torch.einsum("dc,nchw->ndhw", self.to_rgb, ycbcr))
            return pixels.clamp(0, 255) / 127.5 - 1

    def _in_blocks(self, rows: Tensor, table: Tensor) -> Tensor:
        """[N, 64 C, H, W] in steps of the table → [N, C, H, W, 8, 8]."""
        return rows.unflatten(1, (-1, 8, 8)).permute(0, 1, 4, 5, 2, 3) * table


def require_jpeg(config: ModelConfig) -> None:
    """Raise InputError for a config whose jpeg_quality and jpeg_chroma no `jpeg_layer` has."""
    config.require(config.jpeg_chroma in CHROMA, "jpeg_chroma", " or ".join(CHROMA))
    config.require(0 <= config.jpeg_quality <= 100, "jpeg_quality", "from 0 to 100")
    colours = config.image_channels == 3
    config.require(config.jpeg_quality == 0 or colours, "jpeg_quality", "0 without colours")


def jpeg_layer(config: ModelConfig) -> nn.Module:
    """What stores images as the config says: `JPEG`, or nothing for a jpeg_quality of 0."""
    if config.jpeg_quality == 0:
        return nn.Identity()
    return JPEG(config.jpeg_quality, config.jpeg_chroma)


def _cosines(side: int) -> Tensor:
    """The orthonormal DCT-II C of blocks of this side: coefficients = C block Cᵀ."""
    position = torch.arange(side)
    cosines = torch.cos((2 * position + 1) * position[:, None] * math.pi / (2 * side))
    cosines *= math.sqrt(2 / side)
    cosines[0] /= math.sqrt(2)
    return cosines


def _transform(planes: Tensor, cosines: Tensor) -> Tensor:
    """The DCT of every block of planes [N, C, H B, W B]: [N, C, H, W, B, B]."""
    side = len(cosines)
    blocks = planes.unflatten(3, (-1, side)).unflatten(2, (-1, side)).permute(0, 1, 2, 4, 3, 5)
    return cosines @ blocks @ cosines.T


def _invert(coefficients: Tensor, cosines: Tensor) -> Tensor:
    """Planes [N, C, H B, W B] of their blocks' DCT, rounded."""
    planes = cosines.T @ coefficients @ cosines
    return _round(planes.permute(0, 1, 2, 4, 3, 5).flatten(4).flatten(2, 3))


def _round(values: Tensor) -> Tensor:
    """Rounded values; the gradient passes as if they were not."""
    return values + (values.round() - values).detach()


def repeat_last(planes: Tensor, rows: int, columns: int) -> Tensor:
    """Planes with the last row repeated so often, and then the last column.

    Not F.pad, whose gradient torch.compile can't lay out for images in channels-last order.
    """
    planes = torch.cat([planes, planes[:, :, -1:].expand(-1, -1, rows, -1)], dim=2)
    return torch.cat([planes, planes[:, :, :, -1:].expand(-1, -1, -1, columns)], dim=3)


def _halve(planes: Tensor) -> Tensor:
    """Means of 2 × 2 pixels; libjpeg rounds a half down in even columns and up in odd ones."""
    means = F.avg_pool2d(planes, 2)
    odd = torch.arange(means.shape[3], device=planes.device) % 2
    return means + (torch.floor(means + 0.25 * (1 + odd)) - means).detach()


def _enlarge(planes: Tensor) -> Tensor:
    """Double both sides by libjpeg's triangle filter: 3/4 of the nearer pixel, 1/4 of the other."""
    return F.interpolate(planes, scale_factor=2, mode="bilinear", align_corners=False)
