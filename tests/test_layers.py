"""The JPEG layer against Pillow's files and the data set's, and the residual block."""

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from custom_models.layers import CHROMA, JPEG, ResidualBlock
from utils import to_model_range, to_uint8


def stored(images: torch.Tensor, quality: int) -> torch.Tensor:
    """uint8 images written as JPEG by Pillow and read again."""
    read = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality)
        read.append(torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1))
    return torch.stack(read)


def smooth(n: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """uint8 images with detail at every scale, as photographs have it."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.zeros(n, 3, height, width)
    for side in (2, 4, 8, 16):
        coarse = torch.rand(n, 3, side, side, generator=generator) - 0.5
        images += F.interpolate(coarse, size=(height, width), mode="bicubic") * 2 / side
    return ((images + 0.5) * 255).clamp(0, 255).to(torch.uint8)


chroma = pytest.mark.parametrize("chroma", CHROMA)


@pytest.mark.parametrize("quality", [10, 50, 75, 95])
def test_quantisation_tables_are_those_of_the_files(quality):
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG", quality=quality)
    written = Image.open(file).quantization
    for table, ours in zip((written[0], written[1]), JPEG(quality, "mean").tables, strict=True):
        assert torch.equal(torch.tensor(table).view(8, 8).float(), ours)


@pytest.mark.parametrize("quality", [30, 75, 95])
@pytest.mark.parametrize("size", [(28, 28), (64, 64), (29, 37)])
def test_images_come_out_as_pillow_reads_them(quality, size):
    images = smooth(40, *size)
    expected = stored(images, quality).int()
    found = to_uint8(JPEG(quality, "mean")(to_model_range(images))).int()
    difference = (found - expected).abs()
    changed = (images.int() - expected).abs()
    # What is left are halves that libjpeg's whole numbers round to the other side.
    assert difference.float().mean() < 0.8
    assert (difference <= 1).float().mean() > 0.88
    assert difference.float().mean() < 0.6 * changed.float().mean()


@chroma
def test_an_image_of_one_colour_keeps_it(chroma):
    grey = torch.full((1, 3, 28, 28), 128, dtype=torch.uint8)
    assert torch.equal(to_uint8(JPEG(75, chroma)(to_model_range(grey))), grey)


@chroma
def test_colours_come_out_alike_whichever_way_they_were_halved(chroma):
    """Half a wave in 16 pixels, which half the resolution carries."""
    wave = torch.cos((2 * torch.arange(32) + 1) * torch.pi / 32)
    ycbcr = torch.stack([torch.zeros(32, 32), 60 * wave.expand(32, 32), torch.zeros(32, 32)])
    jpeg = JPEG(100, chroma)
    rgb = torch.einsum("dc,chw->dhw", jpeg.to_rgb, ycbcr)[None] / 127.5
    assert (jpeg(rgb) - rgb).abs().mean() * 127.5 < 1.5


def test_halving_within_the_cosine_transform_keeps_low_frequencies_and_drops_high_ones():
    jpeg, position = JPEG(100, "dct"), torch.arange(16)
    for frequency in range(1, 16):
        wave = torch.cos((2 * position + 1) * frequency * torch.pi / 32).expand(16, 16)
        ycbcr = torch.stack([torch.zeros(16, 16), 60 * wave, torch.zeros(16, 16)])
        rgb = torch.einsum("dc,chw->dhw", jpeg.to_rgb, ycbcr)[None] / 127.5
        _, chroma = jpeg.encode(rgb)
        blue = chroma[0, :64, 0, 0].view(8, 8) * jpeg.tables[1]
        expected = torch.zeros(8, 8)
        if frequency < 8:  # a cosine's coefficient is 16 / √2 of its height, here halved
            expected[0, frequency] = 60 * 16 / 2**0.5 / 2
        torch.testing.assert_close(blue, expected, atol=5, rtol=0)


@chroma
def test_coefficients_are_whole_numbers_that_give_the_image_back(chroma):
    jpeg, images = JPEG(75, chroma), to_model_range(smooth(8, 28, 28))
    luma, chroma = (coefficients.round() for coefficients in jpeg.encode(images))
    assert luma.shape == (8, 64, 4, 4) and chroma.shape == (8, 128, 2, 2)
    assert torch.equal(jpeg.decode(luma, chroma, (28, 28)), jpeg(images))


def test_a_coefficient_is_a_wave_in_its_own_block():
    jpeg = JPEG(75, "mean")
    luma, chroma = torch.zeros(1, 64, 4, 4), torch.zeros(1, 128, 2, 2)
    luma[0, 1, 1, 2] = 5  # the first horizontal frequency of the block in row 1, column 2
    image = jpeg.decode(luma, chroma, (32, 32))[0, 0] * 127.5 + 127.5
    block = image[8:16, 16:24] - 128
    position = torch.arange(8)
    wave = 5 * jpeg.tables[0, 0, 1] * torch.cos((2 * position + 1) * torch.pi / 16) / 32**0.5
    torch.testing.assert_close(block, wave.round().expand(8, 8), atol=0.01, rtol=0)
    outside = image.clone()
    outside[8:16, 16:24] = 128
    torch.testing.assert_close(outside, torch.full((32, 32), 128.0), atol=0.01, rtol=0)


@chroma
def test_the_gradient_passes_the_roundings(chroma):
    images = to_model_range(smooth(2, 32, 32)).requires_grad_(True)
    JPEG(95, chroma)(images).sum().backward()
    # The sum of an image is its lowest frequency, which storing keeps: each pixel counts once.
    inside = images.detach().abs() < 0.99
    assert images.grad[inside].mean() == pytest.approx(1, abs=0.02)


@chroma
def test_compiled_it_stores_images_in_channels_last_order_alike(chroma):
    jpeg, results = JPEG(75, chroma), []
    for layer in (jpeg, torch.compile(jpeg)):
        images = to_model_range(smooth(2, 28, 28)).contiguous(memory_format=torch.channels_last)
        convolution = torch.ones(3, 3, 1, 1, requires_grad=True)
        stored = layer(torch.nn.functional.conv2d(images, convolution) / 3)
        stored.square().sum().backward()
        results.append((stored.detach(), convolution.grad))
    torch.testing.assert_close(*results)


def test_float16_weights_of_a_model_leave_the_tables_alone():
    assert not JPEG(75, "dct").state_dict()


def test_a_residual_block_begins_as_the_identity_and_learns():
    torch.manual_seed(0)
    block, x = ResidualBlock(4), torch.randn(2, 4, 5, 5)
    assert torch.equal(block(x), x)
    block(x).square().sum().backward()
    assert block.second.weight.grad.abs().sum() > 0
