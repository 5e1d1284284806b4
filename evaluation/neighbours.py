"""Euclidean distances between sets of features, and nearest neighbours by them."""

from collections.abc import Iterator

import torch

from utils import InputError, progress

CHUNK = 256  # rows of the distance matrix in memory at once
LONG = 1e11  # multiplications, a few seconds of one CPU core: from here on a bar is shown
# Squared distances below this share of the squared norms are rounding: the two rows are one.
IDENTICAL = 1e-12


def k_nearest(
    queries: torch.Tensor, base: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k nearest rows of a base for each query, nearest first.

    queries: [N, D], base: [M, D], any float type, on one device. Returns distances, float32
    [N, k], Euclidean, and indices into the base, int64 [N, k]. A query that is itself a row of the
    base finds itself, at distance 0; which of several equally near rows comes first is not
    defined. Raises InputError for fewer than k rows in the base, other dimensions, NaN or infinite
    values.
    """
    if not 1 <= k <= len(base):
        raise InputError(
            f"{k} nearest neighbours can't be found among {len(base)} images; "
            f"use a k from 1 to {len(base)}, or more images"
        )
    # Filled in place: small results kept between large blocks would keep memory from being reused.
    found = torch.empty(len(queries), k, device=queries.device)
    indices = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
    for part, start in zip(distances(queries, base), range(0, len(queries), CHUNK)):
        rows = slice(start, start + CHUNK)
        found[rows], indices[rows] = part.topk(k, largest=False)
    return found, indices


def distances(queries: torch.Tensor, base: torch.Tensor) -> Iterator[torch.Tensor]:
    """Euclidean distances from all queries to all rows of the base, float32 [≤ 256, M] at a time.

    queries: [N, D], base: [M, D], any float type, on one device. Rows that agree up to rounding
    have distance 0. Raises InputError for no queries, other dimensions, NaN or infinite values.
    """
    if queries.ndim != 2 or base.ndim != 2 or queries.shape[1] != base.shape[1] or not len(queries):
        raise InputError(
            "distances need features [N ≥ 1, D] and [M, D] of one extractor, "
            f"got {list(queries.shape)} and {list(base.shape)}"
        )
    if not (queries.isfinite().all() and base.isfinite().all()):
        raise InputError("the features hold NaN or infinite values; look at the extractor")
    # |x - y|² = |x|² + |y|² - 2x·y cancels for near rows: double precision, and a centred base.
    base = base.double()
    centre = base.mean(0)
    base = base - centre
    base_norms = torch.linalg.vector_norm(base, dim=1).square()
    parts = queries.split(CHUNK)
    if queries.numel() * len(base) > LONG:
        parts = progress(parts, total=len(parts), desc="distances")
    for part in parts:
        part = part.double() - centre
        norms = part.square().sum(1, keepdim=True) + base_norms
        squared = torch.addmm(norms, part, base.T, alpha=-2)
        squared[squared < IDENTICAL * norms] = 0
        # In float32 distances that are equal but for rounding become equal.
        yield squared.sqrt_().float()
