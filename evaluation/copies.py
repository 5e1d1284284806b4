"""Copies of training images: do generated cells lie nearer to the training cells than they should?

All questions are put in two spaces: the features of a network, and pixels, where each generated
image is compared in all eight flips and quarter turns.

The tests need no threshold that was found on some generator. Training and held-out cells are drawn
alike. To a generator that memorises nothing they are interchangeable, and the real cell that lies
nearest to one of its images is a training cell with the share of training cells among all cells.
Images that share their nearest cell say the same thing once, so they count as one draw.
"""

from dataclasses import dataclass

import numpy as np
import torch

from evaluation.agreement import wilson_interval
from evaluation.features import Extractor, extract
from evaluation.neighbours import k_nearest
from utils import InputError

# An image is close to a cell if that is nearer than this share of the distance to the fifth cell;
# fewer than 1 in 200 real cells are. Not to the second: a cell that is there twice would hide its
# copies.
CLOSE, FIFTH = 0.75, 5
# Of the verdict on a generator that memorises nothing; four tests share it.
FALSE_ALARMS = 0.001
# A share of images that equal a training cell this far above held-out cells' (10 of 5,133 for
# BloodMNIST (rebuilt)) means copies, however few the cells are.
IDENTICAL = 0.02
SUSPECTS = 12
TURNS = 8
LARGEST_SIDE = 32
AXES, CANDIDATES = 384, 64
CELLS_OF_PARTITION, FEWEST_IN_CELL = 10, 20
LLOYD_STEPS = 30


@dataclass(frozen=True)
class Suspects:
    """The generated images that lie nearest to a training cell, measured by the held-out ones.

    images: uint8 [N, 3, S, S]; train, held_out: uint8 [N, 3, S, S], the nearest cell of each kind,
    turned to match. rows, train_rows: where they stand in their sets; train_distances,
    held_out_distances: root mean squared difference, 0 … 255.
    """

    images: torch.Tensor
    train: torch.Tensor
    held_out: torch.Tensor
    rows: list[int]
    train_rows: list[int]
    train_distances: list[float]
    held_out_distances: list[float]


def find_copies(
    images: torch.Tensor, train: torch.Tensor, held_out: torch.Tensor, extractor: Extractor
) -> tuple[dict, Suspects]:
    """Look for copies of training images among generated ones; the images to look at first.

    images, train, held_out: uint8 [N, 3, S, S], generated and real ones; no held-out cell may be
    among `images`, so that a control takes one half of them as generated and the other as held out.
    Returns plain types: verdict ("copies", "nearer to train than chance", "no sign of copies"),
    n_images, n_train, n_held_out, `features` and `pixels` (`compare_neighbours`; pixels has, too,
    `identical`, the number of images that equal a training cell in some turn), authpct and ct with
    authpct_held_out, what the held-out cells get in the images' place. The verdict's false alarms
    are fewer than 1 in 1,000. It is "copies", too, where the share of identical images is more than
    2 % above that of the held-out cells.

    Copies of some twenty-five different cells are needed otherwise: fewer may be chance, since
    seven in ten nearest cells of BloodMNIST are training cells anyway; look at the suspects. Raises
    InputError for fewer than five real images of a kind, no generated ones, and for images of
    several sizes or not uint8.
    """
    images, train, held_out = images.cpu(), train.cpu(), held_out.cpu()
    _check(images, train, held_out)
    device = extractor.device
    features, train_features, held_out_features = (
        extract(part, extractor, f"features of {name} images").to(device)
        for part, name in ((images, "generated"), (train, "training"), (held_out, "held-out"))
    )
    sizes = len(train), len(held_out)
    by_features, by_pixels = (
        [[part.cpu() for part in found] for found in both]
        for both in (
            [k_nearest(features, part, FIFTH) for part in (train_features, held_out_features)],
            [
                nearest_over_turns(images.to(device), part.to(device), FIFTH)
                for part in (train, held_out)
            ],
        )
    )
    result = {
        "features": compare_neighbours(*by_features, *sizes),
        "pixels": compare_neighbours(*(found[:2] for found in by_pixels), *sizes),
    }
    identical = int((by_pixels[0][0][:, 0] == 0).sum())
    result["pixels"]["identical"] = identical
    spaces, level = (result["features"], result["pixels"]), FALSE_ALARMS / 4
    verdict = "no sign of copies"
    if any(space["p_value"] < level for space in spaces):
        verdict = "nearer to train than chance"
    # Real cells may equal each other, too.
    usual = _identical(held_out, train) / len(held_out)
    if identical > (IDENTICAL + usual) * len(images) or any(
        space["close"]["p_value"] < level for space in spaces
    ):
        verdict = "copies"
    result |= {
        "authpct": authpct(features, train_features),
        "authpct_held_out": authpct(held_out_features, train_features),
        "ct": ct(features, train_features, held_out_features),
        "verdict": verdict,
        "n_images": len(images),
        "n_train": len(train),
        "n_held_out": len(held_out),
    }
    return result, _suspects(images, train, held_out, *by_pixels)


def _identical(images: torch.Tensor, real: torch.Tensor) -> int:
    """How many of the images equal a real one in some turn, at the size of the search."""
    images, known = _shrunk(images), {cell.numpy().tobytes() for cell in _shrunk(real)}
    turns = zip(*(turned(images, turn).contiguous().numpy() for turn in range(TURNS)))
    return sum(any(one.tobytes() in known for one in eight) for eight in turns)


def _check(images: torch.Tensor, train: torch.Tensor, held_out: torch.Tensor) -> None:
    named = {"generated": images, "training": train, "held-out": held_out}
    for name, part in named.items():
        if part.dtype != torch.uint8 or part.ndim != 4 or part.shape[2] != part.shape[3]:
            raise InputError(
                f"copies are looked for among square uint8 images [N, 3, S, S], the {name} ones "
                f"are {str(part.dtype).removeprefix('torch.')} {list(part.shape)}; convert them"
            )
        fewest = 1 if part is images else FIFTH
        if len(part) < fewest:
            raise InputError(
                f"{len(part)} {name} images are too few to look for copies; give {fewest} or more"
            )
        if part.shape[1:] != images.shape[1:]:
            raise InputError(
                f"generated images {list(images.shape)} and {name} ones {list(part.shape)} differ "
                "in size; load the data at the generator's size"
            )


def _suspects(images, train, held_out, to_train, to_held_out) -> Suspects:
    ratios = to_train[0][:, 0] / to_held_out[0][:, 0].clamp(min=1e-6)
    rows = ratios.argsort(stable=True)[:SUSPECTS].tolist()

    def matching(real: torch.Tensor, found) -> torch.Tensor:
        _, cells, turns = found
        return _turned_to_match(real, cells[rows, 0], turns[rows, 0])

    def column(values: torch.Tensor) -> list:
        return values[rows, 0].tolist()

    return Suspects(
        images[rows],
        matching(train, to_train),
        matching(held_out, to_held_out),
        rows,
        column(to_train[1]),
        column(to_train[0]),
        column(to_held_out[0]),
    )


# ---------------------------------------------------------------------------------------------
# Are the nearest cells training cells more often than chance has it?
# ---------------------------------------------------------------------------------------------


def compare_neighbours(to_train, to_held_out, n_train: int, n_held_out: int) -> dict:
    """Share of images nearer to a training cell than to a held-out one, and the share of copies.

    to_train, to_held_out: distances [N, 5], ascending, and indices [N, 5] of each image's nearest
    cells among n_train and n_held_out. Plain numbers in the result:

    train_share: as if both sets were equally large, 0.5 for a generator that memorises nothing, 1
    for one that copies; train_share_interval: 95 %; p_value: of as many or more nearest training
    cells by chance. A handful of copies hardly moves these.
    close: the same question about the images that lie much nearer to one cell than to the fifth
    nearest, whatever its kind: `train` and `held_out` count them, p_value as above.
    copied_share: of all images, those close to a training cell beyond what the ones close to a
    held-out cell lead to expect; with copied_share_interval, 95 %. It misses copies that this space
    puts elsewhere: turned ones, for most extractors' features.

    An image as near to one set as to the other (a cell that lies in both) is left out.
    """
    (train_distances, train_cells), (held_out_distances, held_out_cells) = to_train, to_held_out
    first, second = train_distances[:, 0], held_out_distances[:, 0]
    fifth = torch.cat([train_distances, held_out_distances], 1).kthvalue(FIFTH, 1).values
    cells = torch.where(first < second, train_cells[:, 0], n_train + held_out_cells[:, 0])
    differs = first != second
    close = differs & (torch.minimum(first, second) < CLOSE * fifth)
    sizes = n_train, n_held_out
    in_all, in_close = (_images_by_cell(cells[chosen], *sizes) for chosen in (differs, close))
    share, share_interval = _train_share(*in_all)
    copied, copied_interval = _excess(*in_close, len(cells))
    return {
        "train_share": share,
        "train_share_interval": share_interval,
        "p_value": _p_value(*in_all),
        "copied_share": copied,
        "copied_share_interval": copied_interval,
        "close": {
            "train": int(in_close[0].sum()),
            "held_out": int(in_close[1].sum()),
            "p_value": _p_value(*in_close),
        },
    }


def _images_by_cell(cells: torch.Tensor, n_train: int, n_held_out: int) -> list[np.ndarray]:
    """For each training cell, and each held-out one, how many images have it as the nearest."""
    counts = torch.bincount(cells, minlength=n_train + n_held_out).numpy()
    return np.split(counts, [n_train])


def _p_value(train: np.ndarray, held_out: np.ndarray) -> float:
    """Probability that training cells get as many images as they did, or more, by chance.

    Every cell that has images is a training cell with the share of these among all cells, and
    takes its images along: a sum of independent variables, whose distribution is built up cell by
    cell. Drawing the cells' kinds without replacement would spread it less.
    """
    chance = len(train) / (len(train) + len(held_out))
    distribution = np.ones(1)
    for count in np.concatenate([train, held_out]):
        if count:
            longer = np.zeros(len(distribution) + count)
            longer[:-count] = (1 - chance) * distribution
            longer[count:] += chance * distribution
            distribution = longer
    return min(float(distribution[train.sum() :].sum()), 1.0)


def _train_share(train: np.ndarray, held_out: np.ndarray) -> tuple[float, list[float]]:
    """Share of the images that training cells have, as if both sets were equal, and its interval.

    Images that share their nearest cell come and go together: the score interval is that of the
    effective number of images (Kish 1965, sec. 8.2), so that for a generator that memorises nothing
    its width is that of random kinds of the cells.
    """
    total = train.sum() + held_out.sum()
    if not total:
        return 0.5, [0.0, 1.0]
    effective = total**2 / ((train**2).sum() + (held_out**2).sum())
    share = train.sum() / total

    def of_equal_sets(share: float) -> float:
        rates = share / len(train), (1 - share) / len(held_out)
        return float(rates[0] / sum(rates))

    interval = wilson_interval(share * effective, effective)
    return of_equal_sets(share), [of_equal_sets(end) for end in interval]


def _excess(train: np.ndarray, held_out: np.ndarray, n: int) -> tuple[float, list[float]]:
    """Share of n images that training cells have beyond their due, and its interval.

    Counts of cells are taken as Poisson clusters; one image more on the held-out side keeps the
    interval from being too short where it has none.
    """
    weight = len(train) / len(held_out)
    excess = train.sum() - weight * held_out.sum()
    spread = 1.96 * np.sqrt((train**2).sum() + weight**2 * ((held_out**2).sum() + 1))
    ends = np.clip([excess - spread, excess + spread], 0, n) / n
    return float(max(excess, 0) / n), ends.tolist()


# ---------------------------------------------------------------------------------------------
# Two published scores
# ---------------------------------------------------------------------------------------------


def authpct(features: torch.Tensor, train: torch.Tensor) -> float:
    """Share of images that are authentic, in %: 0 for copies, 100 far away from the data.

    features: [N, D], train: [M, D], M ≥ 2. An image is authentic if its nearest training cell has
    another training cell that is nearer to it still (Alaa et al. 2022, sec. 4).

    It is no test: held-out cells don't get 100 (79 on GoogLeNet-1024 features of BloodMNIST
    (rebuilt)), images of the usual kinds of cells alone get less than they (72 for the more typical
    half of the held-out cells), and poor images get more, which hides copies. Turned copies are
    caught only as far as the extractor doesn't mind turns.
    """
    if len(train) < 2:
        raise InputError(f"AuthPct needs two training cells or more, got {len(train)}")
    distances, nearest = k_nearest(features, train, 1)
    # The first column is the cell itself, or its double.
    own = k_nearest(train, train, 2)[0][:, 1]
    return 100 * (distances[:, 0] > own[nearest[:, 0]]).double().mean().item()


def ct(features: torch.Tensor, train: torch.Tensor, held_out: torch.Tensor) -> float | None:
    """C_T: below zero for images nearer to the training cells than held-out cells are, else above.

    features: [N, D], train: [M, D], held_out: [L, D]. Z-scored Mann-Whitney statistic of the
    distances to the nearest training cell, in each region of a k-means partition of the training
    cells, then the mean weighted by the regions' held-out cells (Meehan et al. 2020, sec. 2 and 3).
    Up to ten regions, fewer for small sets; those with fewer than 20 cells or images don't count,
    and None where that leaves none. Without copying and underfitting it is about normal with mean 0
    and an sd of 1 for one region, 0.3 for ten; it grows with the number of images.

    It can't see a few copies among many images that are merely poor, which lift it more than
    copies lower it, nor a generator's regions that have no held-out cells. With 8 to 12
    regions instead of ten, held-out cells of BloodMNIST (rebuilt) move by 0.1, generators' images
    by up to a quarter, or 0.6.
    """
    fewest = min(len(features), len(train), len(held_out))
    regions = max(1, min(CELLS_OF_PARTITION, fewest // 50))
    centres = _k_means(train, regions)
    homes = [torch.cdist(part.double(), centres).argmin(1) for part in (features, train, held_out)]
    scores, weights = [], []
    for region in range(len(centres)):
        images, cells, controls = (
            part[home == region] for part, home in zip((features, train, held_out), homes)
        )
        if min(len(images), len(cells), len(controls)) >= FEWEST_IN_CELL:
            distances = (k_nearest(part, cells, 1)[0][:, 0] for part in (images, controls))
            scores.append(_mann_whitney_z(*distances))
            weights.append(len(controls))
    return float(np.average(scores, weights=weights)) if scores else None


def _k_means(features: torch.Tensor, k: int) -> torch.Tensor:
    """Centres [≤ k, D], float64, of a k-means partition that the rows' order doesn't change.

    Lloyd's steps (1982) from centres that hold no draw: the region with the most scatter is cut
    through its mean, across its leading principal axis, until there are k (Su & Dy 2007, PCA-Part).
    Not scikit-learn's: a training on a bare GPU machine has torch, numpy and matplotlib alone.
    """
    features = features.double()
    homes = torch.zeros(len(features), dtype=torch.int64, device=features.device)
    scatter = [_scatter(features)]
    for new in range(1, k):
        widest = scatter.index(max(scatter))
        rows = (homes == widest).nonzero()[:, 0]
        cells = features[rows] - features[rows].mean(0)
        axis = torch.linalg.eigh(cells.mT @ cells).eigenvectors[:, -1]
        homes[rows[cells @ axis > 0]] = new
        scatter[widest] = _scatter(features[homes == widest])
        scatter.append(_scatter(features[homes == new]))
    for _ in range(LLOYD_STEPS):
        centres = torch.stack([features[homes == region].mean(0) for region in homes.unique()])
        before, homes = homes, torch.cdist(features, centres).argmin(1)
        if torch.equal(before, homes):
            break
    return centres


def _scatter(features: torch.Tensor) -> float:
    """Sum of squared distances to the mean; 0 for no rows."""
    return (features - features.mean(0)).square().sum().item() if len(features) else 0.0


def _mann_whitney_z(a: torch.Tensor, b: torch.Tensor) -> float:
    """How many standard deviations a's values lie above b's, by ranks; ties count half."""
    b = b.sort().values
    below = torch.searchsorted(b, a) + torch.searchsorted(b, a, right=True)
    m, n = len(a), len(b)
    return (below.sum().item() / 2 - m * n / 2) / (m * n * (m + n + 1) / 12) ** 0.5


# ---------------------------------------------------------------------------------------------
# Pixels
# ---------------------------------------------------------------------------------------------


def turned(images: torch.Tensor, turn: int) -> torch.Tensor:
    """Square images [N, C, S, S] in one of their eight flips and quarter turns, 0 … 7."""
    return (images.flip(3) if turn >= 4 else images).rot90(turn % 4, (2, 3))


def inverse_turn(turn: int) -> int:
    """The turn that takes `turned(images, turn)` back; a mirror image is its own way back."""
    return turn if turn >= 4 else -turn % 4


def nearest_over_turns(
    images: torch.Tensor, real: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The k nearest real images of each image, which may be flipped and turned to match best.

    images: uint8 [N, C, S, S]; real: uint8 [M, C, S, S], M ≥ k; on one device. Returns distances,
    float32 [N, k], ascending: root mean squared difference of channel values, 0 … 255; indices into
    `real`, int64 [N, k], each once; turns, int64 [N, k], that bring the image onto the real one
    (`turned`).
    Images above 32 pixels are averaged down to 32 first, so that time and memory stay bounded.

    The result is exact. Distances between the coordinates on the leading principal axes, with the
    length of the rest as one more coordinate, are never larger than the true ones. Candidates are
    taken by them, then measured; where they don't prove that nothing nearer was missed, all real
    images are measured.
    """
    images, real = _shrunk(images), _shrunk(real)
    turns = torch.stack([turned(images, turn).flatten(1) for turn in range(TURNS)], 1)
    real = real.flatten(1)
    mean = real.float().mean(0)
    some = real[:: -(-len(real) // 1000)].float() - mean
    axes = torch.linalg.svd(some, full_matrices=False).Vh[:AXES].T

    def bounding(pixels: torch.Tensor) -> torch.Tensor:
        parts = []
        for part in pixels.split(2048):
            centred = part.float() - mean
            inside = centred @ axes
            rest = centred.square().sum(1) - inside.square().sum(1)
            parts.append(torch.cat([inside, rest.clamp(min=0).sqrt()[:, None]], 1))
        return torch.cat(parts)

    n, candidates = len(images), min(CANDIDATES, len(real))
    base = bounding(real)
    bounds, cells = k_nearest(bounding(turns.flatten(0, 1)), base, candidates)
    bounds, places = bounds.view(n, -1).topk(candidates, largest=False)
    cells = cells.view(n, -1).gather(1, places)
    result = _measured(turns, real, cells, places // candidates, k)

    # Squared lengths in float32 are off by their last digits.
    slack = 1e-5 * base.square().sum(1).max()
    length = real.shape[1]
    proven = result[0][:, -1].square() * length <= bounds[:, -1].square() - slack
    rows = torch.nonzero(~proven).flatten()
    if len(rows):
        pixels = turns[rows].flatten(0, 1).half()  # holds 0 … 255 exactly
        cells = k_nearest(pixels, real.half(), k)[1].view(len(rows), -1)
        which = torch.arange(TURNS, device=cells.device).repeat_interleave(k).expand_as(cells)
        for kept, found in zip(result, _measured(turns[rows], real, cells, which, k)):
            kept[rows] = found
    return result


def nearest_real(
    images: torch.Tensor, real: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k nearest real images of each image, in pixels, turned to match it.

    images: uint8 [N, C, S, S]; real: uint8 [M, C, S, S]. Returns distances, float32 [N, k] (root
    mean squared difference, 0 … 255), ascending, and the real images, uint8 [N, k, C, S, S].
    """
    distances, rows, turns = nearest_over_turns(images, real, k)
    matched = _turned_to_match(real, rows.flatten(), turns.flatten())
    return distances, matched.view(len(images), k, *images.shape[1:])


def _turned_to_match(real: torch.Tensor, rows: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """These rows of the real images, as the images lie that `nearest_over_turns` found them for."""
    pairs = zip(rows.tolist(), turns.tolist(), strict=True)
    return torch.cat([turned(real[row, None], inverse_turn(turn)) for row, turn in pairs])


def _shrunk(images: torch.Tensor) -> torch.Tensor:
    if images.shape[-1] <= LARGEST_SIDE:
        return images
    parts = [
        torch.nn.functional.adaptive_avg_pool2d(part.float(), LARGEST_SIDE).round()
        for part in images.split(1024)
    ]
    return torch.cat([part.to(torch.uint8) for part in parts])


def _measured(turns, real, cells, which, k: int):
    """The k best of each image's candidates, measured, each real image once.

    turns: uint8 [N, 8, D]; real: uint8 [M, D]; cells, which: int64 [N, candidates], rows of `real`
    and turns. Returns distances, indices, turns, [N, k] each.
    """
    parts = []
    for rows in torch.arange(len(turns), device=turns.device).split(64):
        pairs = turns[rows[:, None], which[rows]].float().sub_(real[cells[rows]])
        parts.append(pairs.square_().mean(2).sqrt_())
    distances, best = torch.cat(parts), []
    for _ in range(k):
        values, places = distances.min(1, keepdim=True)
        found = cells.gather(1, places)
        best.append((values, found, which.gather(1, places)))
        distances = distances.masked_fill(cells == found, torch.inf)
    return tuple(torch.cat(column, 1) for column in zip(*best))
