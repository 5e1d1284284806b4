"""Data sets beyond BloodMNIST and the demo: folders and zips, PBC by its own path, BCCD, MNIST,
CelebA; and that grey images go through what all data sets go through."""

import csv
import gzip
import hashlib
import io
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import utils
from evaluation.features import extract, load_extractor
from utils import (
    BLOOD_CLASSES,
    LOADERS,
    PATIENTS,
    PBC_CLASSES,
    PBC_FOLDER,
    SPLITS,
    USUAL_SIZE,
    ImageSet,
    InputError,
    bccd_counts,
    find_duplicates,
    image_sizes,
    load_dataset,
    make_grid,
    recognise_data_dir,
    resize_images,
    save_png,
    split_by_class,
    split_by_patient,
    split_folder,
    split_list,
    to_rgb,
    usual_size,
)


@pytest.fixture(autouse=True)
def own_cache(empty_cache):
    return empty_cache


def load_all(name, root, size):
    return {split: load_dataset(name, root, size, split) for split in SPLITS}


def cached_files(cache):
    return [path for path in cache.rglob("*") if path.is_file()]


def not_again(*_args, **_keywords):
    raise AssertionError("this was not to be called")


# ---------------------------------------------------------------------------------------------
# Splits and modes
# ---------------------------------------------------------------------------------------------


def test_every_data_set_has_a_usual_size(bad_input):
    assert USUAL_SIZE.keys() == LOADERS.keys()
    assert (usual_size("pbc"), usual_size("celeba:Eyeglasses")) == (128, 64)
    for name in ("cells", "pbc:Eyeglasses"):
        with bad_input(f"unknown data set '{name}'", "known are bloodmnist"):
            usual_size(name)


@given(st.lists(st.integers(4, 60), min_size=1, max_size=5), st.integers(0, 99))
def test_every_class_is_split_7_1_2_and_every_image_used_once(counts, seed):
    labels = np.repeat(np.arange(len(counts)), counts)
    labels = np.random.default_rng(seed).permutation(labels)
    classes = tuple(str(label) for label in range(len(counts)))
    parts = split_by_class(Path("x"), labels, classes)
    rows = [row for part in parts.values() for row in part]
    assert sorted(rows) == list(range(len(labels)))
    for split, share in zip(SPLITS, (0.7, 0.1, 0.2), strict=True):
        got = np.bincount(labels[parts[split]], minlength=len(counts))
        assert (got >= 1).all() and (abs(got - share * np.array(counts)) <= 1).all()
    assert parts == split_by_class(Path("x"), labels, classes)


def test_a_class_too_small_for_three_splits_is_bad_input(bad_input):
    with bad_input("some folder", "class b", "3 images", "at least 4"):
        split_by_class(Path("some folder"), np.array([0] * 4 + [1] * 3), ("a", "b"))


def owners(rng: np.random.Generator, labels: np.ndarray, n: int) -> list[str]:
    """n patients, some with many images, some with few, of any class."""
    shares = rng.dirichlet(np.full(n, 2.0))
    return [f"P{owner}" for owner in rng.choice(n, len(labels), p=shares)]


@given(
    st.lists(st.integers(30, 80), min_size=1, max_size=4), st.integers(12, 30), st.integers(0, 99)
)
def test_no_patient_is_in_two_splits(counts, n, seed):
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    classes, patients = tuple(str(label) for label in range(len(counts))), owners(rng, labels, n)
    parts = split_by_patient(Path("x"), labels, classes, patients)
    assert sorted(row for part in parts.values() for row in part) == list(range(len(labels)))
    sets = [{patients[row] for row in parts[split]} for split in SPLITS]
    assert sum(map(len, sets)) == len(set.union(*sets)) == len(set(patients))
    for split, share in zip(SPLITS, (0.7, 0.1, 0.2), strict=True):
        assert (np.bincount(labels[parts[split]], minlength=len(counts)) >= 1).all()
        assert abs(len(parts[split]) / len(labels) - share) < 0.15
    assert parts == split_by_patient(Path("x"), labels, classes, patients)


def dealt(counts: list[list[int]]) -> list[list[int]]:
    """Images of each class in each split. counts: those of each patient."""
    labels = [label for row in counts for label, n in enumerate(row) for _ in range(n)]
    patients = [f"P{patient}" for patient, row in enumerate(counts) for _ in range(sum(row))]
    classes = tuple("abcd"[: len(counts[0])])
    parts = split_by_patient(Path("x"), np.array(labels), classes, patients)
    rows = [np.array(labels)[parts[split]] for split in SPLITS]
    return [np.bincount(some, minlength=len(classes)).tolist() for some in rows]


def test_patients_are_dealt_as_near_to_7_1_2_as_can_be():
    assert dealt([[7], [1], [2]]) == dealt([[2], [7], [1]]) == [[7], [1], [2]]
    assert dealt([[30], [25], *[[5]] * 9]) == [[70], [10], [20]]
    many = dealt([[60], [30], *[[1]] * 110])
    assert many == [[140], [20], [40]]
    # Only one dealing leaves both classes in every split.
    assert dealt([[11, 11], [11, 2], [0, 6], [2, 2]]) == [[11, 17], [2, 2], [11, 2]]


@pytest.mark.parametrize("several", [(3, 7), (4, 6), (5, 5), (7, 20), (3,) * 8])
def test_classes_of_few_patients_each_are_in_every_split(several):
    """Patients with one class alone, ten images each."""
    counts = [
        [10 * (label == own) for label in range(len(several))]
        for own, n in enumerate(several)
        for _ in range(n)
    ]
    labels = np.repeat([row.index(10) for row in counts], 10)
    patients = [f"P{patient}" for patient in range(len(counts)) for _ in range(10)]
    parts = split_by_patient(Path("x"), labels, tuple("abcdefgh"[: len(several)]), patients)
    for rows in parts.values():
        assert (np.bincount(labels[rows], minlength=len(several)) > 0).all()


def test_a_class_of_too_few_patients_is_bad_input(bad_input):
    labels, patients = np.array([0] * 9 + [1] * 9), [*"abcabcabc", *"abababbbb"]
    with bad_input("some folder", "dog has 2 patients", "add some or leave the class out"):
        split_by_patient(Path("some folder"), labels, ("cat", "dog"), patients)


def solid(mode: str, colour, **info) -> Image.Image:
    image = Image.new(mode, (6, 6), colour)
    image.info.update(info)
    return image


def palette(transparency: int | None) -> Image.Image:
    image = solid("P", 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    return image if transparency is None else solid_with(image, transparency)


def solid_with(image: Image.Image, transparency: int) -> Image.Image:
    image.info["transparency"] = transparency
    return image


# Mode → image, file format, the colour it must have on screen.
MODES = {
    "RGB": (solid("RGB", (1, 2, 3)), "PNG", (1, 2, 3)),
    "black and white": (solid("1", 1), "PNG", (255, 255, 255)),
    "grey": (solid("L", 100), "BMP", (100, 100, 100)),
    "grey, opaque": (solid("LA", (100, 255)), "PNG", (100, 100, 100)),
    "grey, transparent": (solid("LA", (100, 0)), "PNG", (255, 255, 255)),
    "transparent": (solid("RGBA", (9, 9, 9, 0)), "PNG", (255, 255, 255)),
    "a fifth of red": (solid("RGBA", (255, 0, 0, 51)), "PNG", (255, 204, 204)),
    "palette": (palette(None), "GIF", (10, 20, 30)),
    "palette, transparent": (palette(1), "PNG", (255, 255, 255)),
    "palette, another transparent": (palette(0), "PNG", (10, 20, 30)),
    "CMYK": (solid("CMYK", (0, 255, 255, 0)), "TIFF", (255, 0, 0)),
    "16 bits": (solid("I;16", 257 * 77), "PNG", (77, 77, 77)),
    "16 bits, lightest": (solid("I;16", 65535), "TIFF", (255, 255, 255)),
    "16 bits as 32": (solid("I", 257 * 77), "TIFF", (77, 77, 77)),
    "YCbCr": (solid("YCbCr", (128, 128, 128)), "TIFF", (128, 128, 128)),
}


@pytest.mark.parametrize("image, form, colour", MODES.values(), ids=MODES)
def test_every_mode_becomes_rgb(image, form, colour):
    buffer = io.BytesIO()
    image.save(buffer, form)
    result = to_rgb(Image.open(buffer))
    assert result.mode == "RGB" and result.size == (6, 6)
    assert (np.asarray(result) == colour).all(), np.asarray(result)[0, 0]


@pytest.mark.parametrize("mode, colour", [("F", 0.5), ("I", 70000), ("I", -1)])
def test_pixels_without_a_range_are_refused(mode, colour, tmp_path, bad_input):
    solid(mode, colour).save(tmp_path / "a.tif")
    with bad_input("a.tif", "no stated range"):
        resize_images(tmp_path, ["a.tif"], 4)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright(orientation):
    """The corners that a camera stored, turned as the tag says, are where they were seen."""
    seen = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3) * 40)
    turn = Image.Transpose
    stored = {
        2: turn.FLIP_LEFT_RIGHT,
        3: turn.ROTATE_180,
        4: turn.FLIP_TOP_BOTTOM,
        5: turn.TRANSPOSE,
        6: turn.ROTATE_90,
        7: turn.TRANSVERSE,
        8: turn.ROTATE_270,
    }
    image = seen.transpose(stored[orientation]) if orientation > 1 else seen
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif)
    assert np.array_equal(to_rgb(Image.open(buffer)), seen.convert("RGB"))


def test_the_middle_is_cropped_and_the_resize_is_antialiased(tmp_path):
    wide = np.zeros((8, 20, 3), np.uint8)
    wide[:, 6:14] = 200 * (np.indices((8, 8)).sum(0) % 2)[..., None]  # a chessboard
    Image.fromarray(wide).save(tmp_path / "wide.png")
    Image.fromarray(wide.transpose(1, 0, 2)).save(tmp_path / "high.png")
    whole = resize_images(tmp_path, ["wide.png", "high.png"], 8)
    assert np.array_equal(whole[0], wide[:, 6:14])
    assert np.array_equal(whole[1], wide[:, 6:14].transpose(1, 0, 2))
    # Without antialiasing, each pixel would take a field's 0 or 200, or a corner of them.
    small = resize_images(tmp_path, ["wide.png"], 2)
    assert abs(small.astype(int) - 100).max() <= 5


# ---------------------------------------------------------------------------------------------
# Folders and zips
# ---------------------------------------------------------------------------------------------


def png(colour) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (9, 7), colour).save(buffer, "PNG")
    return buffer.getvalue()


# Ten and four images, each of a colour of its own; a name that is no English word.
FILES = {f"Größe 2/{n}.png": png((10 * n, 50, 0)) for n in range(10)} | {
    f"a/{n}.PNG": png((10 * n, 0, 50)) for n in range(4)
}
HIDDEN = {"a/.DS_Store": b"x", ".git/config": b"x", "README.txt": b"x", "paper.pdf": b"x"}


def write_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_folder(tmp_path / "my cells", FILES | HIDDEN)


def test_a_folder_of_classes(folder):
    parts = load_all("folder", folder, 5)
    assert [len(part) for part in parts.values()] == [9, 2, 3]
    seen = set()
    for part in parts.values():
        assert part.name == "folder my cells" and part.classes == ("Größe 2", "a")
        assert part.images.dtype == torch.uint8 and part.images.shape[1:] == (3, 5, 5)
        for image, label in zip(part.images, part.labels.tolist(), strict=True):
            red, green, blue = image[:, 0, 0].tolist()
            assert (image == image[:, :1, :1]).all()
            assert (green, blue) == ((50, 0), (0, 50))[label]
            seen.add((red, label))
    assert seen == {(10 * n, 0) for n in range(10)} | {(10 * n, 1) for n in range(4)}


def pets() -> dict[str, bytes]:
    """Twelve images of each of two classes, each of a colour of its own."""
    kinds = {"cat": 9, "dog": 99}
    return {f"{k}/{n}.png": png((20 * n, own, 9)) for k, own in kinds.items() for n in range(12)}


@pytest.mark.parametrize("around", ["", "pack/", "./"])
def test_patients_of_a_folder_or_zip_stay_together(around, tmp_path):
    files = pets()
    lines = [f"{name},P{n % 12 // 2}" for n, name in enumerate(files)]  # six patients, four images
    table = {PATIENTS: "\r\n".join(["\ufefffile,patient", *lines]).encode()}
    folder = write_folder(tmp_path / "cells", files | table)
    packed = write_zip(tmp_path / "z.zip", {around + k: v for k, v in (files | table).items()})
    (names, labels, classes, parts), other = split_folder(folder), split_folder(packed)
    assert names == other[0] and parts == other[3] and classes == ("cat", "dog")
    patient_of = dict(line.split(",") for line in lines)
    sets = [{patient_of[names[row]] for row in parts[split]} for split in SPLITS]
    assert sum(map(len, sets)) == 6 == len(set.union(*sets))
    for split in SPLITS:
        part = load_dataset("folder", folder, 9, split)
        assert part.labels.tolist() == labels[parts[split]].tolist()
    listed = [(names[i], classes[labels[i]], split) for split in SPLITS for i in parts[split]]
    for source in (folder, packed):
        lines = csv.reader(io.StringIO(split_list("folder", source)))
        assert list(map(tuple, lines)) == [("file", "class", "split"), *listed]


@pytest.mark.parametrize("packed", [False, True])
def test_copies_of_one_file_share_a_split(packed, tmp_path):
    """Else a test image may be one that the generator has learned from."""
    files = pets()
    copies = {name.replace(".png", " copy.png"): data for name, data in files.items()}
    both = files | copies
    root = write_zip(tmp_path / "x.zip", both) if packed else write_folder(tmp_path / "x", both)
    names, _, _, parts = split_folder(root)
    assert sorted(row for rows in parts.values() for row in rows) == list(range(48))
    for rows in parts.values():
        own = {names[row] for row in rows}
        assert own == {n.replace(" copy", "") for n in own} | {
            n.replace(" copy", "").replace(".png", " copy.png") for n in own
        }
    alone = split_folder(write_folder(tmp_path / "alone", files))[3]
    assert {split: len(rows) for split, rows in parts.items()} == {
        split: 2 * len(rows) for split, rows in alone.items()
    }


def test_copies_of_one_file_with_two_patients_are_bad_input(tmp_path, bad_input):
    files = pets()
    files["dog/12.png"] = files["dog/0.png"]
    lines = [f"{name},P{n % 13 // 2}" for n, name in enumerate(files)]
    table = {PATIENTS: "\n".join(["file,patient", *lines]).encode()}
    with bad_input("dog/0.png and dog/12.png are one file of two patients"):
        split_folder(write_folder(tmp_path / "x", files | table))


def test_a_list_of_patients_is_found_whatever_its_capitals_and_slashes(tmp_path):
    files = pets()
    lines = [f"{name},P{n % 12 // 2}" for n, name in enumerate(files)]
    text = "\n".join(["file,patient", *lines])
    plain = write_folder(tmp_path / "a", files | {PATIENTS: text.encode()})
    other = {"Patients.CSV": text.replace("/", "\\").encode()}
    hidden = {"__MACOSX/patients.csv": b"x", ".old/patients.csv": b"x", "cat/.patients.csv": b"x"}
    hidden["./"] = b""  # the folder itself, as some programs store it
    expected = split_folder(plain)[3]
    assert split_folder(write_folder(tmp_path / "b", files | other))[3] == expected
    assert split_folder(write_zip(tmp_path / "c.zip", hidden | files | other))[3] == expected
    without = split_folder(write_zip(tmp_path / "d.zip", hidden | files))[3]
    assert without == split_folder(write_folder(tmp_path / "d", files))[3] != expected


def test_a_damaged_list_of_patients_in_a_zip_is_bad_input(tmp_path, bad_input):
    path = write_zip(tmp_path / "z.zip", FILES)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(PATIENTS, b"file,patient\na/0.PNG,P1\n")
    path.write_bytes(path.read_bytes().replace(b"a/0.PNG,P1", b"a/0.PNG,P2"))
    with bad_input("z.zip", PATIENTS, "can't be read"):
        split_folder(path)


@pytest.mark.parametrize(
    "data, words",
    [
        (b"file,patient\na/0.PNG,P1\n", "names no patient for"),
        (b"image,patient\na/0.PNG,P1\n", "columns file and patient"),
        (b"file,patient\na/0.PNG\n", "columns file and patient"),
        (b"file,patient\n\xff,P1\n", "in UTF-8"),
        (b"", "columns file and patient"),
        (b"file,patient\na/0.PNG,P1\na\\0.PNG,P2\n", "names two patients for a/0.PNG"),
    ],
)
def test_patients_that_cannot_be_read_are_bad_input(data, words, folder, bad_input):
    (folder / PATIENTS).write_bytes(data)
    with bad_input("my cells", PATIENTS, words):
        load_dataset("folder", folder, 5)


@pytest.mark.parametrize("around", ["", "pack/", "./", "./pack/"])
def test_a_zip_is_read_as_its_folder(around, folder, tmp_path):
    files = {around + name: data for name, data in (FILES | HIDDEN).items()}
    path = write_zip(tmp_path / "my cells.zip", files | {"__MACOSX/a/._1.png": b"x"})
    for split in SPLITS:
        one, other = (load_dataset("folder", root, 5, split) for root in (folder, path))
        assert one.sha256() == other.sha256()
        assert (one.name, one.classes) == (other.name, other.classes)


def test_resized_images_are_cached_until_a_file_changes(folder, own_cache, monkeypatch):
    first = load_all("folder", folder, 5)
    with monkeypatch.context() as patch:
        patch.setattr(utils, "resize_images", not_again)
        second = load_all("folder", folder, 5)
    assert all(torch.equal(first[s].images, second[s].images) for s in SPLITS)
    assert len(cached_files(own_cache)) == 1
    path = folder / "a" / "0.PNG"
    before = path.stat()
    data = png((0, 0, 51))
    assert len(data) == before.st_size  # so that only the time of change tells
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    third = load_all("folder", folder, 5)
    assert any(not torch.equal(first[s].images, third[s].images) for s in SPLITS)


def test_a_folder_of_equal_names_sizes_and_times_is_another_one(tmp_path):
    """As copying with times, or an archive that can be made again, leaves them."""
    for name, shade in (("one", 0), ("two", 255)):
        for kind in "ab":
            for number in range(4):
                path = tmp_path / name / kind / f"{number}.bmp"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (5, 5), (shade, number, ord(kind))).save(path)
                os.utime(path, (0, 0))
    one, two = (load_dataset("folder", tmp_path / name, 5, "train") for name in ("one", "two"))
    assert (one.images[:, 0] == 0).all() and (two.images[:, 0] == 255).all()


def test_a_changed_zip_is_read_anew(tmp_path):
    first = load_dataset("folder", write_zip(tmp_path / "x.zip", FILES), 5)
    changed = {name: png((7, 7, 40 + n)) for n, name in enumerate(FILES)}
    second = load_dataset("folder", write_zip(tmp_path / "x.zip", changed), 5)
    assert first.sha256() != second.sha256() and (second.images[:, :2] == 7).all()


@pytest.mark.parametrize(
    "data, words",
    [(b"text", "no image"), (FILES["a/1.PNG"][:45], "truncated")],
    ids=["text", "cut short"],
)
@pytest.mark.parametrize("packed", [False, True])
def test_a_file_that_is_no_whole_image_is_bad_input(
    packed, data, words, tmp_path, own_cache, bad_input
):
    files = FILES | {"a/notes.png": data}
    root = write_zip(tmp_path / "x.zip", files) if packed else write_folder(tmp_path / "x", files)
    with bad_input(str(root), "a/notes.png", "cannot be read", words):
        load_dataset("folder", root, 5)
    assert not cached_files(own_cache)


def tiff(pages: int) -> bytes:
    buffer, page = io.BytesIO(), Image.new("L", (9, 7), 200)
    page.save(buffer, "TIFF", save_all=True, append_images=[page] * (pages - 1))
    return buffer.getvalue()


def test_a_file_of_several_pages_is_bad_input(tmp_path, bad_input):
    one = write_folder(tmp_path / "one", FILES | {"a/9.tif": tiff(1)})
    assert sum(map(len, load_all("folder", one, 5).values())) == 15
    stack = write_folder(tmp_path / "stack", FILES | {"a/9.tif": tiff(3)})
    with bad_input(str(stack), "a/9.tif", "holds 3 pages"):
        load_dataset("folder", stack, 5)


@pytest.mark.parametrize("brightest", [15, 16])
def test_colours_of_a_camera_of_12_bits_are_bad_input(brightest, tmp_path, bad_input):
    """Pillow reads 16-bit colours as their upper halves, which are then 15 at most."""
    colours = [(brightest, n, k) for k in range(2) for n in range(4)]
    files = {f"{'ab'[k]}/{n}.png": png((top, n, k)) for top, n, k in colours}
    root = write_folder(tmp_path / "x", files)
    if brightest == 16:
        assert load_dataset("folder", root, 5).images.max() == 16
        return
    with bad_input(str(root), "nearly black, 15 of 255", "convert them to 8 bits"):
        load_dataset("folder", root, 5)


@pytest.mark.parametrize("packed", [False, True])
def test_one_image_in_two_classes_is_bad_input(packed, tmp_path, own_cache, bad_input):
    files = FILES | {"a/twin.png": FILES["Größe 2/3.png"]}
    root = write_zip(tmp_path / "x.zip", files) if packed else write_folder(tmp_path / "x", files)
    with bad_input(str(root), "Größe 2/3.png and a/twin.png are one image in two classes"):
        load_dataset("folder", root, 5)
    assert not cached_files(own_cache)


def test_what_was_generated_is_not_split_as_if_it_were_real(tmp_path, bad_input):
    root = write_folder(tmp_path / "x", FILES | {"a/synthetic_a_0000.png": png((1, 2, 3))})
    with bad_input(str(root), "a/synthetic_a_0000.png was generated", "training images alone"):
        load_dataset("folder", root, 5)


FAULTS = {
    "no sub-folders": ({"notes.txt": b"x"}, ["has no sub-folders"]),
    "images in no class": (FILES | {"9.png": png(0)}, ["9.png", "no class sub-folder"]),
    "nested folders": (FILES | {"a/more/9.png": png(0)}, ["a holds the folder more"]),
    "an empty class": (FILES | {"b/.DS_Store": b"x"}, ["sub-folder b is empty"]),
    "a name of two lines": (FILES | {"a\nb/1.png": png(0)}, [r"'a\nb", "rename"]),
    "a small class": (FILES | {"b/1.png": png(0)}, ["class b has 1 images", "at least 4"]),
}


@pytest.mark.parametrize("files, words", FAULTS.values(), ids=FAULTS)
def test_a_wrong_folder_is_bad_input(files, words, tmp_path, bad_input):
    with bad_input(str(tmp_path), *words):
        load_dataset("folder", write_folder(tmp_path / "x", files), 5)


ZIP_FAULTS = {**FAULTS, "an empty class": (FILES | {"b/": b""}, ["sub-folder b is empty"])}


@pytest.mark.parametrize("files, words", ZIP_FAULTS.values(), ids=ZIP_FAULTS)
def test_a_wrong_zip_is_bad_input(files, words, tmp_path, bad_input):
    path = write_zip(tmp_path / "x.zip", files)
    with bad_input(str(path), *words):
        load_dataset("folder", path, 5)


@pytest.mark.parametrize(
    "name", ["/a/9.png", "../a/9.png", "a/../../9.png", "C:/a/9.png", "..\\a\\9.png", "\\a\\9.png"]
)
def test_a_zip_that_leads_outside_is_bad_input(name, tmp_path, bad_input):
    path = write_zip(tmp_path / "x.zip", FILES | {name: png(0)})
    for dataset in ("folder", "pbc"):
        with bad_input(str(path), repr(name), "leads outside"):
            load_dataset(dataset, path, 5)
    assert sorted(os.listdir(tmp_path)) == ["x.zip"]


def test_a_zip_of_absurd_size_is_bad_input(tmp_path, monkeypatch, bad_input):
    path = write_zip(tmp_path / "x.zip", FILES | {"a/zeros.png": bytes(10**6)})
    monkeypatch.setattr(utils, "LARGEST_MEMBER", 10**5)  # however little it was packed
    with bad_input(str(path), "a/zeros.png", "too much for one image"):
        load_dataset("folder", path, 5)
    monkeypatch.setattr(utils, "LARGEST_MEMBER", 10**9)
    monkeypatch.setattr(utils, "LARGEST_DENSE_MEMBER", 10**5)
    with bad_input(str(path), "a/zeros.png", "200 times"):
        load_dataset("folder", path, 5)
    monkeypatch.setattr(utils, "LARGEST_RATIO", 10**6)
    monkeypatch.setattr(utils, "LARGEST_ZIP", 10**6)
    with bad_input(str(path), "unpack it"):
        load_dataset("folder", path, 5)


@pytest.mark.parametrize("limit", [50, 20])  # Pillow warns above its limit, raises above twice
def test_an_image_of_absurd_size_is_bad_input(limit, folder, monkeypatch, bad_input):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with bad_input(str(folder), "Größe 2/0.png", f"over {limit} pixels"):
        load_dataset("folder", folder, 5)


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=20))
@settings(max_examples=60)
def test_a_damaged_zip_is_bad_input_or_read(tmp_path_factory, damages):
    root = tmp_path_factory.mktemp("damaged")
    data = bytearray(write_zip(root / "whole.zip", FILES).read_bytes())
    for place, value in damages:
        data[int(place * (len(data) - 1))] = value
    (root / "x.zip").write_bytes(data)
    try:
        load_dataset("folder", root / "x.zip", 5)
    except InputError as error:
        assert str(root) in str(error) and "\n" not in str(error)


# ---------------------------------------------------------------------------------------------
# PBC by its own path, and what a user points to
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("renamed", [PBC_FOLDER, "cells"])
@pytest.mark.parametrize("split_file", [True, False])
def test_pbc_may_be_the_folder_or_zip_itself(renamed, split_file, pbc_folder, pbc_zip, pbc_split):
    expected = load_all("pbc", pbc_folder, 28)
    (pbc_folder / PBC_FOLDER).rename(pbc_folder / renamed)
    (pbc_zip / f"{PBC_FOLDER}.zip").rename(pbc_zip / f"{renamed}.zip")
    for root, path in ((pbc_folder, renamed), (pbc_zip, f"{renamed}.zip")):
        if not split_file:
            (root / "pbc_split.csv").unlink()
        for split in SPLITS:
            part = load_dataset("pbc", root / path, 28, split)
            assert part.classes == BLOOD_CLASSES and part.name == "PBC"
            same = part.sha256() == expected[split].sha256()
            assert same == split_file


def test_data_dirs_are_recognised(pbc_folder, pbc_zip, folder, tmp_path):
    inner, packed = pbc_folder / PBC_FOLDER, pbc_zip / f"{PBC_FOLDER}.zip"
    for path in (pbc_folder, pbc_zip, inner, packed):
        assert recognise_data_dir(path) == ("pbc", path)
    any_zip = write_zip(tmp_path / "x.zip", FILES)
    for path in (folder, any_zip):
        assert recognise_data_dir(str(path)) == ("folder", path)
    own = {f"{name}/IMG_{i}.jpg": png(i) for name in PBC_CLASSES for i in range(4)}
    camera = write_folder(tmp_path / "camera", own)  # PBC's classes, but a camera's names
    assert recognise_data_dir(camera) == ("folder", camera)
    # One strange file among PBC's own must not change size and split without a word.
    (inner / "neutrophil" / "mine.png").write_bytes(png("red"))
    assert recognise_data_dir(inner) == ("pbc", inner)
    shutil.rmtree(inner / "platelet")  # no longer PBC's classes
    assert recognise_data_dir(inner) == ("folder", inner)
    for path in (pbc_zip, packed, folder, any_zip):
        load_dataset(*recognise_data_dir(path), 9)


def test_another_image_among_pbc_s_is_bad_input(pbc_folder, bad_input):
    (pbc_folder / PBC_FOLDER / "neutrophil" / "mine.png").write_bytes(png("red"))
    with bad_input("neutrophil/mine.png is none of PBC's images", "--dataset folder"):
        load_dataset("pbc", pbc_folder, 9, "train")


def test_an_empty_class_of_pbc_is_named(pbc_folder, bad_input):
    for path in (pbc_folder / PBC_FOLDER / "ig").iterdir():
        path.unlink()
    with bad_input("class sub-folder ig has no images"):
        load_dataset("pbc", pbc_folder, 9, "train")


@pytest.mark.parametrize(
    "data, words",
    [
        (b"\xff\xfe\x00", "can't be read"),
        (b"split,index,file\n", "lists no file of train, val, test"),
        (b'split,index,file\n"' + b"x" * 200_000, "is no table"),
    ],
)
def test_a_broken_split_file_is_bad_input(data, words, pbc_folder, bad_input):
    path = pbc_folder / "pbc_split.csv"
    path.write_bytes(data)
    with bad_input(str(path), words):
        load_dataset("pbc", pbc_folder, 9, "train")


def test_a_zip_with_the_slashes_of_windows_is_read(tmp_path, monkeypatch):
    expected = load_dataset("folder", write_zip(tmp_path / "x.zip", FILES), 5, "train")
    turned = {name.replace("/", "\\"): data for name, data in FILES.items()}
    # As older packers there write it; this one would turn them back on Windows.
    found = load_dataset("folder", write_zip(tmp_path / "y.zip", turned), 5, "train")
    assert torch.equal(found.images, expected.images) and found.classes == expected.classes
    names = ["a/0.PNG", "Größe 2/0.png"]
    sizes = [Image.open(io.BytesIO(FILES[name])).size for name in names]
    assert image_sizes(tmp_path / "y.zip", names) == sizes


def test_names_in_a_zip_of_macos_are_read_as_utf_8(tmp_path):
    """Its UTF-8 names lack the flag that says so."""
    path = write_zip(tmp_path / "cells.zip", FILES)
    data = path.read_bytes()
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = data.find(signature)
        while place >= 0:
            flags = data[place + offset + 1] & ~0x08  # bit 11 of two bytes
            data = data[: place + offset + 1] + bytes([flags]) + data[place + offset + 2 :]
            place = data.find(signature, place + 4)
    path.write_bytes(data)
    with zipfile.ZipFile(path) as archive:
        assert not any(name.startswith("Größe") for name in archive.namelist())
    assert load_dataset("folder", path, 5, "train").classes == ("Größe 2", "a")


def test_hidden_doubles_in_a_zip_are_not_read(tmp_path):
    files = {"pack/" + name: data for name, data in FILES.items()}
    hidden = {"pack/.old/" + name: png("red") for name in FILES}
    path = write_zip(tmp_path / "cells.zip", files | hidden)
    train = load_dataset("folder", path, 5, "train")
    assert not (train.images[:, 0] == 255).any()


def grey_png(highest: int) -> bytes:
    values = np.linspace(0, highest, 63).astype(np.uint16).reshape(7, 9)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


def test_12_bits_in_16_are_told(tmp_path, bad_input):
    tops = {"a": 4095, "b": 2000}
    dark = {f"{kind}/{n}.png": grey_png(tops[kind] - n) for kind in "ab" for n in range(4)}
    with bad_input("0 to 4095 of 65,535", "convert them to 8 bits"):
        load_dataset("folder", write_folder(tmp_path / "dark", dark), 5, "train")
    full = write_folder(tmp_path / "full", dark | {"a/4.png": grey_png(60000)})
    assert load_dataset("folder", full, 5, "train").images.max() > 100


def test_a_data_dir_without_classes_is_bad_input(tmp_path, bad_input):
    with bad_input(str(tmp_path), "has no sub-folders"):
        recognise_data_dir(tmp_path)
    with bad_input(str(tmp_path / "none"), "does not exist"):
        recognise_data_dir(tmp_path / "none")
    (tmp_path / "cells.npz.txt").write_bytes(b"no zip")
    with bad_input("cells.npz.txt", "cannot be read"):
        recognise_data_dir(tmp_path / "cells.npz.txt")


# ---------------------------------------------------------------------------------------------
# BCCD
# ---------------------------------------------------------------------------------------------

BOX = (11, 21, 30, 40)  # 20×20 pixels, counted from 1


def annotation(boxes, size=(64, 48)) -> str:
    sides = ("xmin", "ymin", "xmax", "ymax")
    items = [
        f"<object><name>{kind}</name><bndbox>"
        + "".join(f"<{side}>{value}</{side}>" for side, value in zip(sides, box, strict=True))
        + "</bndbox></object>"
        for kind, *box in boxes
    ]
    width, height = size
    shape = f"<size><width>{width}</width><height>{height}</height></size>"
    return f"<annotation>{shape}{''.join(items)}</annotation>"


def write_bccd(root: Path, rows: list, without=(), header=("", "Image", "Category")) -> Path:
    """rows: (category, WBC boxes), the boxes None where there is no annotation; without: numbers
    of the smears that are missing. A smear is grey with its number as red in the boxes."""
    folder = root / "BCCD"
    for name in ("JPEGImages", "Annotations"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    with open(folder / "labels.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(["", number, category] for number, (category, _) in enumerate(rows))
    for number, (_, boxes) in enumerate(rows):
        name = f"BloodImage_{number:05d}"
        smear = np.full((48, 64, 3), 100, np.uint8)
        for left, top, right, bottom in boxes or []:
            smear[top - 1 : bottom, left - 1 : right] = (5 * number, 100, 100)
        if number not in without:
            Image.fromarray(smear).save(
                folder / "JPEGImages" / f"{name}.jpg", quality=100, subsampling=0
            )
        if boxes is not None:
            text = annotation([("RBC", 1, 1, 64, 48), *(("WBC", *box) for box in boxes)])
            (folder / "Annotations" / f"{name}.xml").write_text(text)
    return root


KINDS = ("EOSINOPHIL", "LYMPHOCYTE", "MONOCYTE", "NEUTROPHIL")
GOOD = [(kind, [BOX]) for kind in KINDS for _ in range(5)]
LEFT_OUT = [
    ("", None),
    ("", [BOX]),
    ("NEUTROPHIL, EOSINOPHIL", [BOX, (40, 10, 50, 20)]),
    ("NEUTROPHIL,NEUTROPHIL", [BOX]),
    ("BASOPHIL", [BOX]),
    ("MONOCYTE", None),
    ("NEUTROPHIL", None),
    ("EOSINOPHIL", []),
    ("NEUTROPHIL", [BOX, (40, 10, 50, 20)]),
]


def test_bccd_counts_what_is_used_and_what_is_not(tmp_path):
    counts = bccd_counts(write_bccd(tmp_path, GOOD + LEFT_OUT, without=(20, 25)))
    assert counts["used"] == dict.fromkeys(map(str.lower, KINDS), 5)
    assert counts["left_out"] == {
        "no class": 2,
        "several cells": 2,
        "basophil": 1,
        "no image": 1,
        "no box": 2,
        "several boxes": 1,
    }
    assert counts["published"]["neutrophil"] == 215


def test_bccd_gives_the_cell_in_its_box(tmp_path):
    write_bccd(tmp_path, GOOD + LEFT_OUT, without=(20, 25))
    parts = load_all("bccd", tmp_path, 22)  # 1.1 · 20 pixels, so that nothing is resized
    assert [len(part) for part in parts.values()] == [12, 4, 4]
    seen = []
    for part in parts.values():
        assert part.name == "BCCD" and part.classes == tuple(map(str.lower, KINDS))
        for image, label in zip(part.images.float(), part.labels.tolist(), strict=True):
            inside = image[0, 1:21, 1:21]
            number = round(inside.mean().item() / 5)
            seen.append(number)
            assert number // 5 == label and (inside - 5 * number).abs().max() < 20
            edge = torch.cat([image[0, [0, -1]].flatten(), image[0, :, [0, -1]].flatten()])
            assert (edge - 100).abs().max() < 20
    assert sorted(seen) == list(range(20))


@given(st.integers(1, 50), st.integers(1, 40), st.integers(1, 14), st.integers(1, 8))
def test_the_square_lies_in_the_smear_and_holds_the_box(left, top, width, height):
    size = (64, 48)
    box = (left, top, left + width, top + height)
    with pytest.MonkeyPatch.context() as patch:
        text = io.StringIO(annotation([("WBC", *box)], size))
        parse = utils.ElementTree.parse
        patch.setattr(utils.ElementTree, "parse", lambda _path: parse(text))
        ((x0, y0, x1, y1),) = utils._bccd_boxes(Path("x.xml"))
    side = x1 - x0
    assert side == y1 - y0 == round(1.1 * max(width + 1, height + 1))
    assert 0 <= x0 <= left - 1 and left + width <= x1 <= 64
    assert 0 <= y0 <= top - 1 and top + height <= y1 <= 48


def test_a_box_as_large_as_the_smear_gives_the_largest_square(tmp_path):
    write_bccd(tmp_path, [*GOOD, ("NEUTROPHIL", [(1, 1, 64, 48)])])
    assert bccd_counts(tmp_path)["used"]["neutrophil"] == 6
    (square,) = utils._bccd_boxes(tmp_path / "BCCD" / "Annotations" / "BloodImage_00020.xml")
    assert square == (8, 0, 56, 48)


BCCD_FAULTS = {
    "no labels.csv": (lambda f: (f / "labels.csv").unlink(), ["labels.csv does not exist"]),
    "no columns": (
        lambda f: (f / "labels.csv").write_text("a,b\n1,2\n"),
        ["labels.csv", "no number"],
    ),
    "unknown class": (
        lambda f: (f / "labels.csv").write_text(",Image,Category\n,0,CAT\n"),
        ["labels.csv", "CAT"],
    ),
    "no class at all": (
        lambda f: (f / "labels.csv").write_text(
            ",Image,Category\n" + "".join(f",{number},\n" for number in range(20))
        ),
        ["class eosinophil has 0 images"],
    ),
    "a number twice": (
        lambda f: (f / "labels.csv").open("a").write(",3,MONOCYTE\n"),
        ["labels.csv", "'3'"],
    ),
    "an image without row": (
        lambda f: shutil.copy(
            f / "JPEGImages/BloodImage_00001.jpg", f / "JPEGImages/BloodImage_9.jpg"
        ),
        ["no row for BloodImage_9.jpg"],
    ),
    "an annotation without image": (
        lambda f: (f / "JPEGImages/BloodImage_00001.jpg").unlink(),
        ["BloodImage_00001.jpg is missing"],
    ),
    "a box outside": (
        lambda f: (f / "Annotations/BloodImage_00002.xml").write_text(
            annotation([("WBC", 50, 10, 65, 20)])
        ),
        ["BloodImage_00002.xml", "50, 10, 65, 20", "64×48"],
    ),
    "a box upside down": (
        lambda f: (f / "Annotations/BloodImage_00002.xml").write_text(
            annotation([("WBC", 20, 10, 10, 20)])
        ),
        ["BloodImage_00002.xml", "20, 10, 10, 20"],
    ),
    "a smaller smear": (
        lambda f: Image.new("RGB", (20, 20)).save(f / "JPEGImages/BloodImage_00003.jpg"),
        ["BloodImage_00003.jpg", "smaller than its annotation says"],
    ),
    "no XML": (
        lambda f: (f / "Annotations/BloodImage_00004.xml").write_text("<annotation>"),
        ["BloodImage_00004.xml", "no whole annotation"],
    ),
    "no size": (
        lambda f: (f / "Annotations/BloodImage_00004.xml").write_text("<annotation/>"),
        ["BloodImage_00004.xml", "no whole annotation"],
    ),
}


@pytest.mark.parametrize("change, words", BCCD_FAULTS.values(), ids=BCCD_FAULTS)
def test_a_broken_bccd_is_bad_input(change, words, tmp_path, own_cache, bad_input):
    change(write_bccd(tmp_path, GOOD) / "BCCD")
    with bad_input(str(tmp_path), *words):
        load_dataset("bccd", tmp_path, 22)
    assert not cached_files(own_cache)


def test_the_real_bccd_counts(real_data_root):
    if not (real_data_root / "BCCD").is_dir():
        pytest.skip("BCCD is not in DATA_ROOT")
    counts = bccd_counts(real_data_root)
    assert list(counts["used"].values()) == [84, 33, 20, 202]
    assert list(counts["left_out"].values()) == [44, 15, 3, 1, 8, 1]


# ---------------------------------------------------------------------------------------------
# MNIST
# ---------------------------------------------------------------------------------------------


def write_digits(root: Path, part: str, n: int, packed: bool) -> tuple[np.ndarray, np.ndarray]:
    """Random images in MNIST's own files; returns what they hold."""
    rng = np.random.default_rng(n)
    arrays = rng.integers(0, 256, (n, 28, 28), np.uint8), np.arange(n, dtype=np.uint8) % 10
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True, exist_ok=True)
    for kind, array in zip(("images-idx3", "labels-idx1"), arrays, strict=True):
        header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
        data, name = header + array.tobytes(), f"{part}-{kind}-ubyte"
        if packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(data))
        else:
            (folder / name).write_bytes(data)
    return arrays


@pytest.mark.parametrize("packed", [True, False])
def test_mnist_is_its_files(packed, tmp_path):
    train = write_digits(tmp_path, "train", 100, packed)
    test = write_digits(tmp_path, "t10k", 30, packed)
    expected = {
        "train": [array[:90] for array in train],
        "val": [array[90:] for array in train],
        "test": test,
    }
    for split, part in load_all("mnist", tmp_path, 28).items():
        images, labels = expected[split]
        assert part.name == "MNIST" and part.classes == tuple("0123456789")
        assert part.images.shape == (len(labels), 1, 28, 28)
        assert np.array_equal(part.images[:, 0].numpy(), images)
        assert np.array_equal(part.labels.numpy(), labels)


def test_test_digits_alone_are_split_and_nothing_is_downloaded(tmp_path, monkeypatch):
    images, labels = write_digits(tmp_path, "t10k", 200, packed=True)
    monkeypatch.setattr(utils, "_download_mnist", not_again)
    parts = load_all("mnist", tmp_path, 28)
    assert [len(part) for part in parts.values()] == [140, 20, 40]
    rows = {image.tobytes(): row for row, image in enumerate(images)}
    found = []
    for part in parts.values():
        assert part.name == "MNIST (test digits)"
        assert len(part.labels.bincount().unique()) == 1
        own = [rows[image.numpy().tobytes()] for image in part.images]
        assert part.labels.tolist() == labels[own].tolist()
        found += own
    assert sorted(found) == list(range(200))


def test_digits_are_resized_as_every_other_image(tmp_path):
    images, _ = write_digits(tmp_path, "t10k", 40, packed=True)
    write_digits(tmp_path, "train", 100, packed=True)
    for size in (14, 64):
        part = load_dataset("mnist", tmp_path, size, "test")
        assert part.images.shape == (40, 1, size, size)
        small = Image.fromarray(images[3]).resize((size, size), Image.Resampling.BILINEAR)
        assert np.array_equal(part.images[3, 0].numpy(), small)


def change_bytes(path: Path, change) -> None:
    path.write_bytes(change(path.read_bytes()))


MNIST_FAULTS = {
    "cut short": ("t10k-images-idx3-ubyte", lambda data: data[:1000]),
    "only a header": ("t10k-images-idx3-ubyte", lambda data: data[:3]),
    "another kind": ("t10k-labels-idx1-ubyte", lambda data: b"\x89PNG" + data[4:]),
    "labels cut short": (
        "t10k-labels-idx1-ubyte",
        lambda data: data[:4] + np.array([39], ">u4").tobytes() + data[8:-1],
    ),
    "label too large": ("t10k-labels-idx1-ubyte", lambda data: data[:-1] + b"\x0a"),
}


@pytest.mark.parametrize("name, change", MNIST_FAULTS.values(), ids=MNIST_FAULTS)
@pytest.mark.parametrize("packed", [True, False])
def test_a_broken_mnist_is_bad_input(packed, name, change, tmp_path, bad_input):
    write_digits(tmp_path, "train", 100, packed)
    write_digits(tmp_path, "t10k", 40, packed)
    path = tmp_path / "MNIST" / "raw" / (name + ".gz" * packed)
    whole = gzip.decompress(path.read_bytes()) if packed else path.read_bytes()
    path.write_bytes(gzip.compress(change(whole)) if packed else change(whole))
    with bad_input(str(tmp_path)):
        load_dataset("mnist", tmp_path, 28, "test")


def test_wrong_labels_of_the_test_digits_alone_are_bad_input(tmp_path, bad_input):
    write_digits(tmp_path, "t10k", 40, packed=False)
    change_bytes(
        tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte", lambda data: data[:-1] + b"\x0a"
    )
    with bad_input("labels 0 to 9"):
        load_dataset("mnist", tmp_path)


def test_a_truncated_gzip_is_bad_input(tmp_path, bad_input):
    write_digits(tmp_path, "t10k", 40, packed=True)
    path = tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:5000])
    with bad_input(str(path), "cannot be read"):
        load_dataset("mnist", tmp_path)


def test_a_missing_file_of_mnist_is_bad_input(tmp_path, monkeypatch, bad_input):
    monkeypatch.setattr(utils, "_download_mnist", not_again)
    write_digits(tmp_path, "train", 100, packed=True)
    with bad_input(str(tmp_path / "MNIST"), "t10k-images-idx3-ubyte"):
        load_dataset("mnist", tmp_path)
    write_digits(tmp_path, "t10k", 40, packed=True)
    (tmp_path / "MNIST" / "raw" / "train-labels-idx1-ubyte.gz").unlink()
    with bad_input("lacks train-labels-idx1-ubyte"):
        load_dataset("mnist", tmp_path)


def test_mnist_is_downloaded_whole_or_not_at_all(tmp_path, monkeypatch, bad_input):
    mnist = pytest.importorskip("torchvision").datasets.MNIST

    def download(self):
        """As torchvision leaves its folder: packed and unpacked files."""
        for packed in (True, False):
            write_digits(Path(self.root), "train", 100, packed)
            write_digits(Path(self.root), "t10k", 40, packed)

    def broken(self):
        write_digits(Path(self.root), "t10k", 40, True)
        raise RuntimeError("the connection broke off\nand more lines")

    root = tmp_path / "data"
    monkeypatch.setattr(mnist, "download", broken)
    with bad_input(str(root / "MNIST"), "download failed", "broke off", "DATA_ROOT"):
        load_dataset("mnist", root)
    assert not root.exists()
    monkeypatch.setattr(mnist, "download", download)
    assert len(load_dataset("mnist", root)) == 90
    assert len(list((root / "MNIST" / "raw").iterdir())) == 4
    monkeypatch.setattr(mnist, "download", not_again)
    assert len(load_dataset("mnist", root, split="test")) == 40


def test_the_real_test_digits(real_data_root):
    if not (real_data_root / "MNIST").is_dir():
        pytest.skip("MNIST is not in DATA_ROOT")
    images, labels = (
        utils._read_idx(utils._mnist_files(real_data_root / "MNIST" / "raw")[name])
        for name in utils.MNIST_TEST
    )
    assert images.shape == (10000, 28, 28)
    assert np.bincount(labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


# ---------------------------------------------------------------------------------------------
# CelebA
# ---------------------------------------------------------------------------------------------

FACES = {"train": 4, "val": 2, "test": 3}


def write_celeba(root: Path) -> dict[str, list]:
    """A tiny CelebA: returns, for each split, rows of (image as float, Smiling, Eyeglasses)."""
    folder = root / "celeba"
    (folder / "img_align_celeba").mkdir(parents=True)
    tables = {name: [] for name in ("attr", "eval_partition", "identity", "bbox", "landmarks")}
    rng, expected, number = np.random.default_rng(0), {}, 0
    for partition, (split, n) in enumerate(FACES.items()):
        expected[split] = []
        for _ in range(n):
            number += 1
            name, smiling, glasses = f"{number:06d}.jpg", number % 2, int(number > 3)
            face = Image.fromarray(rng.integers(0, 256, (7, 6, 3), np.uint8)).resize((178, 218))
            face.save(folder / "img_align_celeba" / name, quality=95)
            expected[split].append((face, smiling, glasses))
            tables["attr"].append(f"{name} {2 * glasses - 1:2d} {2 * smiling - 1:2d}")
            tables["eval_partition"].append(f"{name} {partition}")
            tables["identity"].append(f"{name} 1")
            tables["bbox"].append(f"{name}    1  2  3  4")
            tables["landmarks"].append(f"{name} {' '.join('12')} 3 4 5 6 7 8 9 10")
    heads = {
        "attr": [str(number), "Eyeglasses Smiling "],  # the real file ends its names with a blank
        "bbox": [str(number), "image_id x_1 y_1 width height"],
        "landmarks": [str(number), "lefteye_x lefteye_y"],
    }
    names = {"identity": "identity_CelebA", "landmarks": "list_landmarks_align_celeba"}
    names |= {"attr": "list_attr_celeba", "bbox": "list_bbox_celeba"}
    for table, lines in tables.items():
        path = folder / f"{names.get(table, f'list_{table}')}.txt"
        path.write_text("\n".join(heads.get(table, []) + lines) + "\n")
    return expected


@pytest.fixture
def celeba(tmp_path, monkeypatch):
    """A data root with a tiny CelebA, whose checksums torchvision takes for the real ones."""
    datasets = pytest.importorskip("torchvision").datasets
    root = tmp_path / "data"
    expected = write_celeba(root)
    sums = [
        (number, hashlib.md5((root / "celeba" / name).read_bytes()).hexdigest(), name)
        for number, _, name in datasets.CelebA.file_list
        if name.endswith(".txt")
    ]
    assert len(sums) == 5
    monkeypatch.setattr(datasets.CelebA, "file_list", sums)
    return root, expected


@pytest.mark.parametrize("attribute", ["Smiling", "Eyeglasses"])
def test_celeba_by_an_attribute(attribute, celeba):
    root, expected = celeba
    name = "celeba" if attribute == "Smiling" else f"celeba:{attribute}"
    for split, part in load_all(name, root, 16).items():
        assert part.name == f"CelebA ({attribute})"
        assert part.classes == (f"not {attribute}", attribute)
        column = 1 if attribute == "Smiling" else 2
        assert part.labels.tolist() == [row[column] for row in expected[split]]
        for image, (face, *_) in zip(part.images, expected[split], strict=True):
            small = face.crop((0, 20, 178, 198)).resize((16, 16), Image.Resampling.BILINEAR)
            assert (image.permute(1, 2, 0).float() - torch.tensor(np.array(small))).abs().mean() < 2
    held_out = load_dataset(name, root, 16, "held_out")
    assert len(held_out) == 5


def test_another_attribute_reads_the_cached_faces(celeba, own_cache, monkeypatch):
    first = load_dataset("celeba", celeba[0], 16)
    monkeypatch.setattr(utils, "resize_images", not_again)
    second = load_dataset("celeba:Eyeglasses", celeba[0], 16)
    assert torch.equal(first.images, second.images)
    assert len(cached_files(own_cache)) == 1


def test_unknown_attributes_are_bad_input(celeba, bad_input):
    for attribute in ("Beard", ""):
        with bad_input(repr(attribute), "Eyeglasses, Smiling"):
            load_dataset(f"celeba:{attribute}", celeba[0], 16)
    with bad_input("'pbc:Smiling'", "celeba:ATTRIBUTE"):
        load_dataset("pbc:Smiling", celeba[0], 16)


CELEBA_FAULTS = {
    "another table": lambda f: change_bytes(f / "list_attr_celeba.txt", lambda d: d + b"x"),
    "no table": lambda f: (f / "list_eval_partition.txt").unlink(),
    "no images": lambda f: shutil.rmtree(f / "img_align_celeba"),
    "an image is missing": lambda f: (f / "img_align_celeba" / "000002.jpg").unlink(),
    "an image is cut short": lambda f: change_bytes(
        f / "img_align_celeba" / "000002.jpg", lambda d: d[:900]
    ),
    "an image is small": lambda f: Image.new("RGB", (178, 170)).save(
        f / "img_align_celeba" / "000002.jpg"
    ),
}


@pytest.mark.parametrize("change", CELEBA_FAULTS.values(), ids=CELEBA_FAULTS)
def test_a_broken_celeba_is_bad_input(change, celeba, own_cache, bad_input):
    root, _ = celeba
    change(root / "celeba")
    with bad_input(str(root / "celeba")):
        load_dataset("celeba", root, 16)
    assert not cached_files(own_cache)


def test_celeba_is_downloaded_whole_or_not_at_all(celeba, tmp_path, monkeypatch, bad_input):
    from torchvision.datasets import CelebA

    source, root = celeba[0], tmp_path / "new"

    def broken(self):
        (Path(self.root) / "celeba").mkdir()
        raise RuntimeError("too many have asked for it\nand more lines")

    monkeypatch.setattr(CelebA, "download", broken)
    with bad_input(str(root / "celeba"), "download failed", "too many", "list_attr_celeba.txt"):
        load_dataset("celeba", root, 16)
    assert os.listdir(root) == []
    monkeypatch.setattr(
        CelebA,
        "download",
        lambda self: shutil.copytree(source / "celeba", Path(self.root) / "celeba"),
    )
    assert len(load_dataset("celeba", root, 16)) == 4
    assert os.listdir(root) == ["celeba"]


# ---------------------------------------------------------------------------------------------
# Grey images
# ---------------------------------------------------------------------------------------------


def grey(n: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, 1, 28, 28), generator=generator, dtype=torch.uint8)


def test_an_extractor_sees_grey_as_three_equal_channels(tiny_extractor):
    extractor = load_extractor(tiny_extractor)
    features = extract(grey(20), extractor)
    assert features.std(0).min() > 1e-4
    assert torch.equal(features, extract(grey(20).repeat(1, 3, 1, 1), extractor))


def test_two_channels_are_bad_input(tiny_extractor, bad_input):
    with bad_input("[4, 2, 28, 28]"):
        extract(grey(8).view(4, 2, 28, 28), load_extractor(tiny_extractor))


def test_grey_sets_have_duplicates_sums_and_pictures(tmp_path):
    images, labels = grey(6), torch.zeros(6, dtype=torch.int64)
    train = ImageSet("x", "train", images, labels, ("a",))
    test = ImageSet(
        "x", "test", grey(6, 1).index_copy(0, torch.tensor([4]), images[2:3]), labels, ("a",)
    )
    assert find_duplicates([train, test]) == [("train", 2, "test", 4)]
    assert train.sha256() != test.sha256()
    save_png(make_grid(images, columns=3), tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as picture:
        read = np.asarray(picture.convert("L"))
    assert np.array_equal(read[1:29, 30:58], images[1, 0].numpy())
