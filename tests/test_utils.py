"""Image ranges, flips and turns, files, data sets, duplicates and grids."""

import csv
import errno
import io
import json
import os
import resource
import shutil
import sys
import zipfile

import numpy as np
import pytest
import torch
from conftest import write_split
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import utils
from utils import (
    BLOOD_CLASSES,
    PBC_CLASSES,
    PBC_FOLDER,
    ImageSet,
    InputError,
    class_balanced_labels,
    exit_on_bad_input,
    find_duplicates,
    load_dataset,
    make_grid,
    pick_device,
    random_flips_and_turns,
    save_png,
    seed_torch,
    to_model_range,
    to_uint8,
    write_atomically,
)

SPLITS = ("train", "val", "test")


@pytest.fixture(autouse=True)
def own_cache(empty_cache):
    return empty_cache


# ---------------------------------------------------------------------------------------------
# Image ranges
# ---------------------------------------------------------------------------------------------


def test_every_uint8_value_survives_the_round_trip():
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    scaled = to_model_range(values)
    assert scaled.dtype == torch.float32
    assert (scaled.min(), scaled.max()) == (-1, 1)
    assert torch.equal(to_uint8(scaled), values)


@given(st.floats(-5, 5, width=32))
def test_to_uint8_rounds_to_the_nearest_and_clips(value):
    result = to_uint8(torch.tensor([value]))
    assert result.dtype == torch.uint8
    exact = min(max((value + 1) * 127.5, 0), 255)
    assert abs(result.item() - exact) <= 0.5 + 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_to_model_range_takes_uint8_alone(dtype, bad_input):
    with bad_input("uint8", str(dtype)):
        to_model_range(torch.zeros(1, 3, 4, 4, dtype=dtype))


# ---------------------------------------------------------------------------------------------
# Flips and turns
# ---------------------------------------------------------------------------------------------


def symmetries(image: torch.Tensor) -> list[torch.Tensor]:
    """The four turns of [C, S, S] and of its mirror image."""
    turns = [image.rot90(k, (1, 2)) for k in range(4)]
    return turns + [turn.flip(2) for turn in turns]


def test_all_eight_symmetries_about_equally_often_within_one_batch():
    torch.manual_seed(0)
    image = torch.arange(27).view(3, 3, 3)
    results = random_flips_and_turns(image.expand(8000, -1, -1, -1))
    counts = [(results == one).all((1, 2, 3)).sum().item() for one in symmetries(image)]
    assert sum(counts) == 8000
    # Five standard deviations of a binomial with p = 1/8.
    assert max(abs(count - 1000) for count in counts) < 5 * (8000 * 7 / 64) ** 0.5


@given(st.integers(1, 6), st.integers(1, 3), st.integers(1, 9), st.integers(0, 2**32))
def test_each_image_becomes_one_of_its_own_symmetries(n, channels, size, seed):
    torch.manual_seed(seed)
    images = torch.randn(n, channels, size, size)
    for before, after in zip(images, random_flips_and_turns(images), strict=True):
        assert any(torch.equal(after, one) for one in symmetries(before))


# ---------------------------------------------------------------------------------------------
# Device and files
# ---------------------------------------------------------------------------------------------


def test_cuda_without_a_gpu_is_bad_input(monkeypatch, bad_input):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    for name in ("cuda", "cuda:0"):
        with bad_input(name, "no CUDA GPU", "cpu"):
            pick_device(name)


@pytest.mark.parametrize("name", ["gpu", "", "cuda:x", "cudax", "meta", "mps"])
def test_unknown_devices_are_bad_input(name, bad_input):
    with bad_input(repr(name), "auto, cpu or cuda"):
        pick_device(name)


def test_a_gpu_that_is_not_there_is_bad_input(monkeypatch, bad_input):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert pick_device("auto").type == pick_device("cuda:0").type == "cuda"
    with bad_input("cuda:3"):
        pick_device("cuda:3")


def test_a_gpu_that_torch_can_t_use_is_bad_input(monkeypatch, bad_input):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name in ("auto", "cuda", "cuda:0"):
        with bad_input("can't use it", "driver", "--device cpu"):
            pick_device(name)
    assert pick_device("cpu").type == "cpu"


def test_no_matrix_product_on_a_gpu_is_tf32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True  # as NVIDIA's containers have it
    try:
        pick_device("cuda")
        assert not torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@given(st.integers(0, 2**63 - 1))
def test_seeding_torch_is_its_own_on_the_cpu(seed):
    seed_torch(seed, torch.device("cpu"))
    ours = torch.rand(3)
    torch.manual_seed(seed)
    assert torch.equal(ours, torch.rand(3))


def fill(path, data: bytes = b"new"):
    path.write_bytes(data)


def test_a_file_is_written_whole_with_its_folders(tmp_path):
    write_atomically(tmp_path / "a" / "b" / "file", fill)
    assert (tmp_path / "a" / "b" / "file").read_bytes() == b"new"
    assert os.listdir(tmp_path / "a" / "b") == ["file"]


def no_room(*_args, **_keywords):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("failing", ["half-way", "at the rename"])
def test_a_full_disk_keeps_the_old_file_and_no_partial_one(
    failing, tmp_path, monkeypatch, bad_input
):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write(partial):
        fill(partial, b"ne")
        if failing == "half-way":
            no_room()

    if failing == "at the rename":
        monkeypatch.setattr(os, "replace", no_room)
    with bad_input(str(path), "no space left"):
        write_atomically(path, write)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("size", [30_000, 300_000])
def test_torch_save_that_fails_midway_keeps_the_old_file(size, tmp_path, bad_input):
    """A limit on a file's size stops the write as a full disk does, inside torch's own code."""
    path = tmp_path / "file.pt"
    torch.save({"old": 1}, path)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with bad_input(str(path), "make room"):
            write_atomically(path, lambda partial: torch.save(torch.zeros(size // 4), partial))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["file.pt"]


def test_a_folder_that_is_a_file_is_bad_input(tmp_path, bad_input):
    (tmp_path / "file").write_bytes(b"old")
    with bad_input(str(tmp_path / "file" / "new"), "cannot write"):
        write_atomically(tmp_path / "file" / "new", fill)
    assert (tmp_path / "file").read_bytes() == b"old"


@pytest.mark.parametrize("error", [RuntimeError("a defect"), KeyboardInterrupt()])
def test_other_errors_pass_and_leave_no_partial_file(error, tmp_path):
    def write(partial):
        fill(partial)
        raise error

    with pytest.raises(type(error)):
        write_atomically(tmp_path / "file", write)
    assert os.listdir(tmp_path) == []


def test_bad_input_ends_with_code_2_and_one_line(capsys):
    with pytest.raises(SystemExit) as caught, exit_on_bad_input():
        raise InputError("this is wrong")
    assert caught.value.code == 2
    assert capsys.readouterr() == ("", "error: this is wrong\n")
    with pytest.raises(SystemExit) as caught, exit_on_bad_input():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB. And more.")
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("error: the GPU's memory is full; run fewer")


# ---------------------------------------------------------------------------------------------
# BloodMNIST
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
def test_bloodmnist_gives_the_files_images_and_labels(split, data_root, tiny_arrays):
    part = load_dataset("bloodmnist", data_root, 28, split)
    assert (part.name, part.split, part.classes) == ("BloodMNIST", split, BLOOD_CLASSES)
    assert part.images.dtype == torch.uint8 and part.labels.dtype == torch.int64
    assert part.images.is_contiguous()
    images = tiny_arrays[f"{split}_images"]
    assert np.array_equal(part.images.numpy(), images.transpose(0, 3, 1, 2))
    assert np.array_equal(part.labels.numpy(), tiny_arrays[f"{split}_labels"][:, 0])
    assert len(part) == len(images)


def test_held_out_is_validation_then_test(data_root):
    val, test, both = (
        load_dataset("bloodmnist", data_root, 28, s) for s in (*SPLITS[1:], "held_out")
    )
    assert torch.equal(both.images, torch.cat([val.images, test.images]))
    assert torch.equal(both.labels, torch.cat([val.labels, test.labels]))
    assert both.split == "held_out"


def test_data_root_comes_from_the_environment(data_root, monkeypatch):
    monkeypatch.setenv("DATA_ROOT", str(data_root))
    assert len(load_dataset("bloodmnist")) == 160


def test_sha256_changes_with_one_pixel_and_one_label(data_root):
    part = load_dataset("bloodmnist", data_root)
    again = load_dataset("bloodmnist", data_root)
    assert part.sha256() == again.sha256()
    again.images[3, 1, 4, 5] ^= 1
    other = load_dataset("bloodmnist", data_root)
    other.labels[7] = (other.labels[7] + 1) % 8
    assert len({part.sha256(), again.sha256(), other.sha256()}) == 3


def without(arrays, name):
    return {key: value for key, value in arrays.items() if key != name}


FOREIGN = {
    "images missing": (lambda a: without(a, "train_images"), "train_images"),
    "labels missing": (lambda a: without(a, "train_labels"), "train_labels"),
    "other arrays": (lambda a: {"x": a["train_images"]}, "not a MedMNIST file"),
    "float images": (lambda a: {**a, "train_images": a["train_images"] / 255}, "uint8"),
    "int64 images": (lambda a: {**a, "train_images": a["train_images"].astype(int)}, "uint8"),
    "other size": (lambda a: {**a, "train_images": a["train_images"][:, :24, :24]}, "(24, 24)"),
    "grey images": (lambda a: {**a, "train_images": a["train_images"][..., 0]}, "uint8"),
    "one image": (lambda a: {**a, "train_images": a["train_images"][0]}, "28"),
    "label too large": (lambda a: {**a, "train_labels": a["train_labels"] + 1}, "8 classes"),
    "label negative": (
        lambda a: {**a, "train_labels": a["train_labels"].astype(int) - 1},
        "8 classes",
    ),
    "labels too few": (lambda a: {**a, "train_labels": a["train_labels"][:-1]}, "159 labels"),
    "no images": (
        lambda a: {
            **a,
            "train_images": a["train_images"][:0],
            "train_labels": a["train_labels"][:0],
        },
        "0 labels",
    ),
    "float labels": (lambda a: {**a, "train_labels": a["train_labels"] + 0.5}, "float"),
    "word labels": (lambda a: {**a, "train_labels": np.array(["platelet"] * 160)}, "integers"),
    "objects": (
        lambda a: {**a, "train_labels": a["train_labels"].astype(object)},
        "bloodmnist.npz cannot be read",
    ),
}


@pytest.mark.parametrize("change, words", FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_npz_is_bad_input(change, words, tiny_arrays, tmp_path, bad_input):
    np.savez(tmp_path / "bloodmnist.npz", **change(tiny_arrays))
    before = (tmp_path / "bloodmnist.npz").read_bytes()
    with bad_input(str(tmp_path), words):
        load_dataset("bloodmnist", tmp_path)
    assert (tmp_path / "bloodmnist.npz").read_bytes() == before
    assert os.listdir(tmp_path) == ["bloodmnist.npz"]


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.999])
def test_a_truncated_npz_is_bad_input(share, data_root, tmp_path, bad_input):
    whole = (data_root / "bloodmnist.npz").read_bytes()
    path = tmp_path / "bloodmnist.npz"
    path.write_bytes(whole[: int(share * len(whole))])
    with bad_input(str(path), "cannot be read", "get it anew"):
        load_dataset("bloodmnist", tmp_path)


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=20))
def test_a_damaged_npz_is_bad_input_or_whole(data_root, tmp_path_factory, damages):
    """Bytes changed anywhere never give another exception, and never other pixels."""
    data = bytearray((data_root / "bloodmnist.npz").read_bytes())
    for place, value in damages:
        data[int(place * (len(data) - 1))] = value
    root = tmp_path_factory.mktemp("damaged")
    (root / "bloodmnist.npz").write_bytes(data)
    try:
        part = load_dataset("bloodmnist", root)
    except InputError as error:
        assert str(root) in str(error) and "\n" not in str(error)
    else:
        assert part.sha256() == load_dataset("bloodmnist", data_root).sha256()


@pytest.mark.parametrize("kind", ["npy", "text", "folder"])
def test_another_kind_of_file_is_bad_input(kind, tmp_path, bad_input):
    path = tmp_path / "bloodmnist.npz"
    if kind == "npy":
        with open(path, "wb") as file:
            np.save(file, np.zeros(3))
    elif kind == "text":
        path.write_text("<html>404 Not Found</html>")
    else:
        path.mkdir()
    with bad_input(str(path), "cannot be read"):
        load_dataset("bloodmnist", tmp_path)


@pytest.fixture
def medmnist():
    return pytest.importorskip("medmnist")


def test_a_failed_download_is_bad_input_and_leaves_nothing(
    medmnist, tmp_path, monkeypatch, bad_input
):
    def download(self):
        with open(os.path.join(self.root, "bloodmnist.npz"), "wb") as file:
            file.write(b"the first bytes")
        raise RuntimeError("the connection broke off\nand more lines")

    monkeypatch.setattr(medmnist.BloodMNIST, "download", download)
    root = tmp_path / "data"
    with bad_input(
        str(root / "bloodmnist.npz"), "download failed", "the connection broke off", "DATA_ROOT"
    ):
        load_dataset("bloodmnist", root)
    assert not root.exists() or os.listdir(root) == []


def test_a_download_is_kept(medmnist, data_root, tmp_path, monkeypatch):
    def download(self):
        shutil.copy(data_root / "bloodmnist.npz", self.root)

    monkeypatch.setattr(medmnist.BloodMNIST, "download", download)
    assert len(load_dataset("bloodmnist", tmp_path / "data")) == 160
    assert os.listdir(tmp_path / "data") == ["bloodmnist.npz"]


def test_a_size_that_is_not_published_is_bad_input(medmnist, tmp_path, bad_input):
    with bad_input("50 pixels", "28, 64"):
        load_dataset("bloodmnist", tmp_path, 50)


def test_no_file_and_no_medmnist_is_bad_input(tmp_path, monkeypatch, bad_input):
    monkeypatch.setitem(sys.modules, "medmnist", None)
    with bad_input(str(tmp_path / "bloodmnist.npz"), "medmnist is not installed", "DATA_ROOT"):
        load_dataset("bloodmnist", tmp_path)


def test_unknown_names_are_bad_input(data_root, bad_input):
    with bad_input("'cats'", "bloodmnist, pbc"):
        load_dataset("cats", data_root)
    with bad_input("'all'", "train, val, test, held_out"):
        load_dataset("bloodmnist", data_root, 28, "all")


def test_the_real_bloodmnist_has_its_published_counts(real_data_root):
    counts = {split: load_dataset("bloodmnist", real_data_root, 28, split) for split in SPLITS}
    assert [len(part) for part in counts.values()] == [11959, 1712, 3421]
    by_class = sum(part.labels.bincount() for part in counts.values())
    assert by_class.tolist() == [1218, 3117, 1551, 2895, 1214, 1420, 3329, 2348]


# ---------------------------------------------------------------------------------------------
# PBC
# ---------------------------------------------------------------------------------------------


def load_pbc(root, size=28):
    return {split: load_dataset("pbc", root, size, split) for split in SPLITS}


def test_folder_and_zip_give_the_same_images(pbc_folder, pbc_zip, own_cache):
    from_folder = load_pbc(pbc_folder)
    shutil.rmtree(own_cache)  # the folder's cached images would serve the zip too
    from_zip = load_pbc(pbc_zip)
    assert [len(part) for part in from_folder.values()] == [16, 8, 8]
    for split in SPLITS:
        assert torch.equal(from_folder[split].images, from_zip[split].images)
        assert torch.equal(from_folder[split].labels, from_zip[split].labels)
        assert from_folder[split].classes == BLOOD_CLASSES


def test_rows_follow_the_split_file(pbc_folder, pbc_files, pbc_split):
    for split, part in load_pbc(pbc_folder).items():
        lines = [line for line in pbc_split if line["split"] == split]
        lines.sort(key=lambda line: int(line["index"]))
        labels = [PBC_CLASSES.index(line["file"].split("/")[0]) for line in lines]
        assert part.labels.tolist() == labels
        for line, image in zip(lines, part.images, strict=True):
            path = pbc_folder / PBC_FOLDER / line["file"]
            with Image.open(path) as whole:
                left, top = (0, 2) if whole.width == 200 else (80, 82)
                crop = whole.convert("RGB").crop((left, top, left + 200, top + 200))
            small = crop.resize((28, 28), Image.Resampling.BILINEAR)
            assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(small))


@pytest.mark.parametrize("split_file", [True, False])
def test_every_size_has_the_same_split_in_the_same_order(split_file, pbc_zip):
    if not split_file:
        (pbc_zip / "pbc_split.csv").unlink()
    small, large = load_pbc(pbc_zip, 28), load_pbc(pbc_zip, 64)
    for split in SPLITS:
        assert large[split].images.shape[1:] == (3, 64, 64)
        assert torch.equal(small[split].labels, large[split].labels)
        # Every image has a colour of its own, which tells it from the others at any size.
        colours = [part[split].images.float().mean((2, 3)) for part in (small, large)]
        assert torch.cdist(*colours).argmin(1).tolist() == list(range(len(small[split])))


def test_without_a_split_file_every_image_is_in_one_split_of_its_class(pbc_folder):
    (pbc_folder / "pbc_split.csv").unlink()
    parts = load_pbc(pbc_folder)
    assert [len(part) for part in parts.values()] == [16, 8, 8]
    images = torch.cat([part.images for part in parts.values()])
    assert len(images.unique(dim=0)) == 32
    for part in parts.values():
        assert len(part.labels.bincount(minlength=8).unique()) == 1


def test_the_second_load_reads_the_cached_images(pbc_zip, own_cache, monkeypatch):
    first = load_pbc(pbc_zip)
    (cached,) = own_cache.rglob("*.npy")

    def decode(*_args):
        raise AssertionError("an image was decoded again")

    monkeypatch.setattr(utils, "resize_pbc", decode)
    second = load_pbc(pbc_zip)
    assert all(torch.equal(first[s].images, second[s].images) for s in SPLITS)
    with pytest.raises(AssertionError):
        load_pbc(pbc_zip, 32)
    assert list(own_cache.rglob("*.*")) == [cached]


@pytest.mark.parametrize("size", [0, 100])
def test_a_broken_cached_file_is_made_anew(size, pbc_zip, own_cache):
    first = load_pbc(pbc_zip)
    (cached,) = own_cache.rglob("*.npy")
    whole = cached.read_bytes()
    cached.write_bytes(whole[:size])
    second = load_pbc(pbc_zip)
    assert all(torch.equal(first[s].images, second[s].images) for s in SPLITS)
    assert cached.read_bytes() == whole


def test_where_the_cache_can_t_be_written_all_goes_on(pbc_zip, own_cache, monkeypatch):
    whole = load_pbc(pbc_zip)
    shutil.rmtree(own_cache)
    monkeypatch.setattr(np, "save", no_room)
    again = load_pbc(pbc_zip)
    assert all(torch.equal(whole[s].images, again[s].images) for s in SPLITS)
    assert [path for path in own_cache.rglob("*") if path.is_file()] == []


def cached_files(cache):
    return [path for path in cache.rglob("*") if path.is_file()]


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.999])
def test_a_truncated_zip_is_bad_input(share, pbc_zip, own_cache, bad_input):
    path = pbc_zip / f"{PBC_FOLDER}.zip"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with bad_input(str(path), "cannot be read", "get it anew"):
        load_pbc(pbc_zip)
    assert not cached_files(own_cache)


def test_a_damaged_zip_is_bad_input(pbc_zip, own_cache, bad_input):
    path = pbc_zip / f"{PBC_FOLDER}.zip"
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        info = archive.infolist()[7]
    start = info.header_offset + len(info.filename) + 30
    data[start + 20 : start + 400] = b"\xff" * 380
    path.write_bytes(data)
    with bad_input(str(path), info.filename.split("/", 1)[1]):
        load_pbc(pbc_zip)
    assert not cached_files(own_cache)


@pytest.mark.parametrize(
    "data, words",
    [(b"no image at all", "no image"), (b"", "no image"), (None, "truncated")],
    ids=["text", "empty", "cut short"],
)
def test_a_file_that_is_no_image_is_bad_input(data, words, pbc_folder, own_cache, bad_input):
    path = pbc_folder / PBC_FOLDER / "monocyte" / "MO_1.jpg"
    path.write_bytes(path.read_bytes()[:2000] if data is None else data)
    with bad_input(PBC_FOLDER, "monocyte/MO_1.jpg", words):
        load_pbc(pbc_folder)
    assert not cached_files(own_cache)


@pytest.mark.parametrize("size", [(199, 300), (300, 199), (50, 50)])
def test_an_image_below_200_pixels_is_bad_input(size, pbc_folder, own_cache, bad_input):
    Image.new("RGB", size).save(pbc_folder / PBC_FOLDER / "ig" / "IG_2.jpg")
    with bad_input("ig/IG_2.jpg", "smaller than 200"):
        load_pbc(pbc_folder)
    assert not cached_files(own_cache)


def test_other_class_folders_are_bad_input(pbc_folder, bad_input):
    folder = pbc_folder / PBC_FOLDER
    shutil.rmtree(folder / "platelet")
    (folder / "cats").mkdir()
    shutil.copy(folder / "ig" / "IG_1.jpg", folder / "cats" / "cat.jpg")
    with bad_input(str(folder), "'platelet'", "'cats'"):
        load_pbc(pbc_folder)


def test_no_pbc_at_all_is_bad_input(tmp_path, bad_input):
    with bad_input(PBC_FOLDER, str(tmp_path), "DATA_ROOT"):
        load_pbc(tmp_path)


def test_a_size_of_no_pixels_is_bad_input(pbc_folder, bad_input):
    with bad_input("image size 0"):
        load_pbc(pbc_folder, 0)


@pytest.mark.parametrize(
    "change",
    [{"split": "holdout"}, {"file": "ig/none.jpg"}, {"index": "first"}, {"index": ""}],
    ids=["split", "file", "index", "no index"],
)
def test_a_wrong_line_of_the_split_file_is_bad_input(change, pbc_folder, pbc_split, bad_input):
    write_split(pbc_folder, [*pbc_split[:-1], {**pbc_split[-1], **change}])
    with bad_input("pbc_split.csv", *change.values()):
        load_pbc(pbc_folder)


def test_a_file_in_two_splits_is_bad_input(pbc_folder, pbc_split, bad_input):
    again = next(line for line in pbc_split if line["split"] == "train")
    write_split(pbc_folder, [*pbc_split, {**again, "split": "test", "index": "99"}])
    with bad_input("pbc_split.csv", "twice"):
        load_pbc(pbc_folder)


@pytest.fixture(scope="session")
def real_pbc(real_data_root):
    """The zip and the lines of the split file."""
    path = real_data_root / f"{PBC_FOLDER}.zip"
    if not (path.is_file() and (real_data_root / "pbc_split.csv").is_file()):
        pytest.skip("the real PBC zip and pbc_split.csv are not in DATA_ROOT")
    with open(real_data_root / "pbc_split.csv", newline="") as file:
        return path, list(csv.DictReader(file))


def test_real_pbc_at_28_pixels_is_bloodmnist_up_to_jpeg_error(real_data_root, real_pbc):
    """A crop one pixel off gives 3.9 grey values on average, the right one about 1.5."""
    path, lines = real_pbc
    chosen = np.random.default_rng(0).choice(len(lines), 200, replace=False)
    lines = [lines[row] for row in chosen]
    ours = utils.resize_pbc(path, [line["file"] for line in lines], 28)
    parts = {s: load_dataset("bloodmnist", real_data_root, 28, s) for s in SPLITS}
    differences = []
    for image, line in zip(ours, lines, strict=True):
        part, row = parts[line["split"]], int(line["index"])
        assert PBC_CLASSES.index(line["file"].split("/")[0]) == part.labels[row]
        published = part.images[row].permute(1, 2, 0).numpy()
        differences.append(np.abs(jpeg_coded(image).astype(int) - published).mean())
    assert np.mean(differences) < 2 and max(differences) < 4


def jpeg_coded(image: np.ndarray) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=75)
    return np.asarray(Image.open(buffer))


def test_real_duplicates_are_those_of_the_files(real_data_root, real_pbc):
    path, lines = real_pbc
    with zipfile.ZipFile(path) as archive:
        keys = {
            "/".join(info.filename.split("/")[-2:]): (info.CRC, info.file_size)
            for info in archive.infolist()
        }
    groups = {}
    for line in lines:
        groups.setdefault(keys[line["file"]], []).append(line)
    groups = [group for group in groups.values() if len(group) > 1]
    assert len(groups) == 17
    across = [group for group in groups if len({line["split"] for line in group}) > 1]
    found = find_duplicates(
        [load_dataset("bloodmnist", real_data_root, 28, split) for split in SPLITS]
    )
    pairs = {frozenset([(a, i), (b, j)]) for a, i, b, j in found}
    expected = {frozenset((g["split"], int(g["index"])) for g in group) for group in across}
    assert pairs == expected


# ---------------------------------------------------------------------------------------------
# Demo cells
# ---------------------------------------------------------------------------------------------


def test_demo_cells_have_disjoint_splits_with_all_classes():
    parts = {split: load_dataset("demo", None, 28, split) for split in SPLITS}
    assert [len(part) for part in parts.values()] == [1400, 200, 400]
    assert torch.cat([part.labels for part in parts.values()]).bincount().tolist() == [250] * 8
    for part in parts.values():
        assert part.images.shape[1:] == (3, 28, 28) and part.images.dtype == torch.uint8
        assert part.labels.bincount(minlength=8).min() > 0
    assert find_duplicates(list(parts.values())) == []


def test_demo_cells_are_those_of_their_record_and_no_copies():
    record = json.loads(utils.DEMO_FILE.with_suffix(".json").read_text())
    images = torch.cat([load_dataset("demo", split=split).images for split in SPLITS])
    assert record["file"] == utils.DEMO_FILE.name and record["sha256"] == utils.sha256_of(images)
    assert utils.DEMO_FILE.stat().st_size <= 5e6
    found = record["copies"]
    assert (found["n_images"], found["n_train"], found["n_held_out"]) == (2000, 11959, 5133)
    assert found["verdict"].startswith("no sign of copies")
    assert found["pixels"]["identical"] == 0


def test_no_demo_cell_is_a_real_one(real_data_root):
    real = [load_dataset("bloodmnist", real_data_root, 28, split) for split in SPLITS]
    demo = [load_dataset("demo", split=split) for split in SPLITS]
    known = {image.numpy().tobytes() for part in real for image in part.images}
    assert not any(image.numpy().tobytes() in known for part in demo for image in part.images)


@pytest.mark.parametrize("damage", ["missing", "cut short"])
def test_a_damaged_file_of_demo_cells(damage, tmp_path, monkeypatch, bad_input):
    path = tmp_path / "demo_cells.npz"
    if damage == "cut short":
        path.write_bytes(utils.DEMO_FILE.read_bytes()[:1000])
    monkeypatch.setattr(utils, "DEMO_FILE", path)
    with bad_input("demo_cells.npz", "get it anew"):
        load_dataset("demo")


def test_demo_cells_have_one_size(bad_input):
    with bad_input("28 pixels", "64"):
        load_dataset("demo", None, 64)


# ---------------------------------------------------------------------------------------------
# Duplicates and grids
# ---------------------------------------------------------------------------------------------


def image_set(split: str, images: torch.Tensor) -> ImageSet:
    return ImageSet("x", split, images, torch.zeros(len(images), dtype=torch.int64), ("a",))


def test_duplicates_are_found_across_splits_alone():
    images = torch.randint(256, (9, 3, 5, 5), dtype=torch.uint8, generator=torch.manual_seed(0))
    train = image_set("train", images[[0, 1, 2, 1]])
    val = image_set("val", images[[3, 2, 3]])
    test = image_set("test", images[[1, 4, 2]])
    assert find_duplicates([train, val, test]) == [
        ("train", 2, "val", 1),
        ("train", 1, "test", 0),
        ("train", 2, "test", 2),
    ]
    almost = images[:1].clone()
    almost[0, 0, 0, 0] ^= 1
    assert find_duplicates([train, image_set("val", almost)]) == []


@given(
    st.integers(1, 7), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5),
    st.integers(0, 3), st.integers(1, 3), st.sampled_from([1, 3]),
)  # fmt: skip
def test_a_grid_holds_the_images_row_by_row(n, columns, height, width, pad, zoom, channels):
    images = torch.randint(250, (n, channels, height, width), dtype=torch.uint8)
    grid = make_grid(images, columns, pad, zoom)
    rows = -(-n // columns)
    shape = (zoom * (rows * (height + pad) + pad), zoom * (columns * (width + pad) + pad), 3)
    assert grid.shape == shape and grid.dtype == np.uint8
    left = np.ones(shape, bool)
    for i in range(n):
        top = pad + i // columns * (height + pad)
        side = pad + i % columns * (width + pad)
        place = np.s_[zoom * top : zoom * (top + height), zoom * side : zoom * (side + width)]
        one = images[i].permute(1, 2, 0).numpy().repeat(zoom, 0).repeat(zoom, 1)
        assert (grid[place] == one).all()
        left[place] = False
    assert (grid[left] == 255).all()


def test_class_balanced_labels_have_one_row_a_class():
    assert class_balanced_labels(3, 2).tolist() == [0, 0, 1, 1, 2, 2]


def test_a_png_is_read_back_as_written(tmp_path):
    grid = make_grid(torch.randint(256, (4, 3, 5, 5), dtype=torch.uint8), 2)
    save_png(grid, tmp_path / "grid.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "grid.png")), grid)
    assert os.listdir(tmp_path) == ["grid.png"]
