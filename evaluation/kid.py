"""Kernel distance (KID) between two sets of features."""

import torch

from utils import InputError

CHUNK = 512  # rows of the kernel matrix in memory at once


def kernel_distance(real: torch.Tensor, fake: torch.Tensor) -> tuple[float, float]:
    """Unbiased MMD² of all images with the kernel (x·y / D + 1)³, and its standard error.

    real: [M, D], fake: [N, D], any float type, on one device; both results are plain numbers
    without unit, and the first may lie below zero. The error is a jackknife over the images of both
    sets (Arvesen 1969); where the two distributions agree, it is too large by up to √2. Raises
    InputError for fewer than three images, other dimensions, NaN or infinite values.

    Not torch-fidelity's, with which it agrees: that one averages over random subsets, so that its
    value depends on them, as does its spread; and a machine with torch alone doesn't have it.

    Bińkowski et al. 2018, sec. 4.
    """
    real, fake = torch.as_tensor(real).double(), torch.as_tensor(fake).double()
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
        raise InputError(
            f"a kernel distance needs features [M, D] and [N, D] of one extractor, "
            f"got {list(real.shape)} and {list(fake.shape)}"
        )
    m, n = len(real), len(fake)
    if min(m, n) < 3:
        raise InputError(f"a kernel distance needs three images of each kind, got {m} and {n}")
    if not (real.isfinite().all() and fake.isfinite().all()):
        raise InputError("the features hold NaN or infinite values; look at the extractor")

    rows_real, rows_fake = _sums_within(real), _sums_within(fake)
    cross_real, cross_fake = _sums_between(real, fake)
    within_real, within_fake, cross = rows_real.sum(), rows_fake.sum(), cross_real.sum()

    mean_real = within_real / (m * (m - 1))
    mean_fake = within_fake / (n * (n - 1))
    value = mean_real + mean_fake - 2 * cross / (m * n)

    # The value without image i, for each i: its row leaves every sum that holds it.
    without_real = (
        (within_real - 2 * rows_real) / ((m - 1) * (m - 2))
        + mean_fake
        - 2 * (cross - cross_real) / ((m - 1) * n)
    )
    without_fake = (
        mean_real
        + (within_fake - 2 * rows_fake) / ((n - 1) * (n - 2))
        - 2 * (cross - cross_fake) / (m * (n - 1))
    )
    variance = sum(
        (len(part) - 1) * part.var(correction=0) for part in (without_real, without_fake)
    )
    return value.item(), variance.sqrt().item()


def _kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x @ y.T).div_(x.shape[1]).add_(1).pow_(3)


def _sums_within(x: torch.Tensor) -> torch.Tensor:
    """Row sums of the kernel matrix without its diagonal; only the upper half is computed."""
    sums = torch.zeros(len(x), dtype=x.dtype, device=x.device)
    for start in range(0, len(x), CHUNK):
        rows = slice(start, start + CHUNK)
        kernel = _kernel(x[rows], x[start:])
        kernel.diagonal().zero_()
        sums[rows] += kernel.sum(1)
        sums[start + CHUNK :] += kernel[:, CHUNK:].sum(0)
    return sums


def _sums_between(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Row sums and column sums of the kernel matrix."""
    rows, columns = [], torch.zeros(len(y), dtype=y.dtype, device=y.device)
    for part in x.split(CHUNK):
        kernel = _kernel(part, y)
        rows.append(kernel.sum(1))
        columns += kernel.sum(0)
    return torch.cat(rows), columns
