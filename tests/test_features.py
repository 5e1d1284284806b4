"""Extractors, the guard on images, and the feature cache."""

import os
import warnings
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from evaluation import features
from evaluation.features import extract, load_extractor
from utils import InputError


class Small(torch.nn.Module):
    """A 4-d extractor with batch normalisation, whose statistics are not those of any batch."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3)
        self.norm = torch.nn.BatchNorm2d(4)
        self.norm.running_var *= 0.01

    def forward(self, images):
        return self.norm(self.conv(images.float() / 255)).tanh().mean([2, 3])


class Returns(torch.nn.Module):
    """The mean of each channel, changed by `change`."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, images):
        return self.change(images.float().mean([2, 3]))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("CACHE_ROOT", str(tmp_path / "cache"))
    return tmp_path / "cache" / "features"


@pytest.fixture
def small(tmp_path) -> Path:
    torch.manual_seed(0)
    return script(Small(), tmp_path / "small.pt")


def script(module: torch.nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(module).save(path)
    return path


def trace(module: torch.nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        example = torch.randint(256, (3, 3, 28, 28), dtype=torch.uint8)
        torch.jit.trace(module, example, check_trace=False).save(path)
    return path


def images(n: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, 3, 28, 28), generator=generator, dtype=torch.uint8)


def test_extractor_of_a_file(small):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        extractor = load_extractor(small)
    assert (extractor.name, extractor.dim) == ("small", 4)
    assert extractor.distance_name == "FD (small)"
    assert len(extractor.sha256) == 64
    result = extract(images(20), extractor)
    assert (result.dtype, result.shape) == (torch.float32, (20, 4))
    torch.manual_seed(0)
    with torch.no_grad():
        expected = Small().eval()(images(20))
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


def test_a_known_network_has_its_name_whatever_its_file_is_called(tmp_path, small, monkeypatch):
    copies = [tmp_path / f"{stem}.pt" for stem in ("ext", "inception-2048")]
    for copy in copies:
        copy.write_bytes(small.read_bytes())
        extractor = load_extractor(copy)
        assert (extractor.name, extractor.distance_name) == (copy.stem, f"FD ({copy.stem})")
    monkeypatch.setattr(features, "GOOGLENET_1024", extractor.sha256)
    for copy in copies:
        extractor = load_extractor(copy)
        assert extractor.name == "googlenet-1024"
        assert extractor.distance_name == "FD (GoogLeNet-1024)"


@pytest.mark.parametrize(("spec", "dim"), [("demo", 64), ("domain", 128)])
def test_shipped_extractors(spec, dim):
    extractor = load_extractor(spec)
    assert (extractor.name, extractor.dim) == (f"{spec}-{dim}", dim)
    assert extractor.distance_name == f"FD ({spec})"
    assert extract(images(3), extractor).shape == (3, dim)


def test_result_does_not_depend_on_batches_or_order(small, cache, monkeypatch):
    extractor = load_extractor(small)
    expected = extract(images(21), extractor)
    assert expected.std(0).min() > 1e-3
    for batch in (1, 5, 64):
        (cached,) = cache.iterdir()
        cached.unlink()
        monkeypatch.setattr(features, "CPU_BATCH", batch)
        torch.testing.assert_close(extract(images(21), extractor), expected, rtol=1e-5, atol=1e-6)
    backwards = extract(images(21).flip(0), extractor)
    torch.testing.assert_close(backwards.flip(0), expected, rtol=1e-5, atol=1e-6)


def test_grey_images_are_shown_as_three_equal_channels(small):
    grey, extractor = images(9)[:, :1], load_extractor(small)
    assert torch.equal(extract(grey, extractor), extract(grey.repeat(1, 3, 1, 1), extractor))


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (images(4).float() / 127.5 - 1, r"float32 \[4, 3, 28, 28\] in \[-1, 1\]"),
        (images(4).float() / 255, r"float32 .* in \[0, 1\]"),
        (images(4).long(), r"int64 .* in \[0, 255\]"),
        (images(4)[:, :2], r"uint8 \[4, 2, 28, 28\]"),
        (images(4)[0], r"uint8 \[3, 28, 28\]"),
        (images(4).permute(0, 2, 3, 1), r"uint8 \[4, 28, 28, 3\]"),
        (images(4)[:0], r"no images"),
    ],
)
def test_anything_but_uint8_images_is_refused(small, bad, words):
    with pytest.raises(InputError, match=words):
        extract(bad, load_extractor(small))


def test_cache_saves_the_second_pass(small, cache):
    extractor = load_extractor(small)
    first = extract(images(10), extractor)
    (cached,) = cache.iterdir()
    torch.save(first + 1, cached)
    assert torch.equal(extract(images(10), extractor), first + 1)
    extract(images(10, seed=1), extractor)
    assert len(list(cache.iterdir())) == 2


def test_without_the_cache_nothing_is_written_or_read(small, cache):
    extractor = load_extractor(small)
    first = extract(images(10), extractor, cache=False)
    assert not cache.exists()
    extract(images(10), extractor)
    (cached,) = cache.iterdir()
    torch.save(first + 1, cached)
    assert torch.equal(extract(images(10), extractor, cache=False), first)


def test_cache_tells_shapes_and_extractors_apart(tmp_path, small, cache):
    extractor = load_extractor(small)
    wide = images(10).reshape(10, 3, 14, 56)
    assert not torch.allclose(extract(images(10), extractor), extract(wide, extractor))
    torch.manual_seed(1)
    other = load_extractor(script(Small(), tmp_path / "other.pt"))
    assert not torch.allclose(extract(images(10), extractor), extract(images(10), other))
    assert len(list(cache.iterdir())) == 3


def test_layout_in_memory_does_not_matter(small, cache):
    extractor = load_extractor(small)
    expected = extract(images(10), extractor)
    turned = images(10).contiguous(memory_format=torch.channels_last)
    assert torch.equal(extract(turned, extractor), expected)
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "shape", "nan", "type"])
def test_broken_cache_is_computed_anew(small, cache, damage):
    extractor = load_extractor(small)
    expected = extract(images(10), extractor)
    (cached,) = cache.iterdir()
    content = cached.read_bytes()
    if damage in ("empty", "cut", "text"):
        broken = {"empty": b"", "cut": content[: len(content) // 2], "text": b"not a file"}
        cached.write_bytes(broken[damage])
    else:
        things = {"shape": expected[:5] + 1, "nan": expected * float("nan"), "type": {"a": 1}}
        torch.save(things[damage], cached)
    assert torch.equal(extract(images(10), extractor), expected)
    assert torch.equal(torch.load(cached, weights_only=True), expected)
    assert list(cache.iterdir()) == [cached]


def test_missing_and_unknown_extractors(tmp_path):
    with pytest.raises(
        InputError, match=r"nowhere\.pt does not exist; give inception, domain, demo"
    ):
        load_extractor(tmp_path / "nowhere.pt")
    with pytest.raises(InputError, match="inceptoin does not exist"):
        load_extractor("inceptoin")


def test_files_that_are_no_torchscript(tmp_path, small):
    whole = small.read_bytes()
    state = tmp_path / "state.pt"
    torch.save(Small().state_dict(), state)
    for name, content in [
        ("cut.pt", whole[: len(whole) // 2]),
        ("empty.pt", b""),
        ("text.pt", b"hello" * 100),
        ("state.pt", state.read_bytes()),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=rf"can't read .*{name} as TorchScript"):
            load_extractor(tmp_path / name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x.double(), r"must return float32 \[3, D\].*got float64 \[3, 3\]"),
        (lambda x: x[:, :, None], r"got float32 \[3, 3, 1\]"),
        (lambda x: x[:1], r"got float32 \[1, 3\]"),
        (lambda x: x.sum(), r"got float32 \[\]"),
        (lambda x: (x, x), r"returns tuple"),
        (lambda x: x / (x - x), r"NaN or infinite"),
        (lambda x: x - x.mean(0), r"change with the others in its batch"),
    ],
)
def test_extractors_with_wrong_output(tmp_path, change, words):
    path = trace(Returns(change), tmp_path / "wrong.pt")
    with pytest.raises(InputError, match=words) as error:
        load_extractor(path)
    assert "wrong.pt" in str(error.value)


class Refuses(torch.nn.Module):
    def forward(self, images):
        if images.dtype == torch.uint8:
            raise ValueError("float images only")
        return images.mean([2, 3])


@pytest.mark.parametrize("module", [torch.nn.Linear(3, 4), Refuses()])
def test_extractor_that_fails_on_images(tmp_path, module):
    path = script(module, tmp_path / "other.pt")
    with pytest.raises(InputError, match=r"other\.pt fails on uint8 .* images: .*\w"):
        load_extractor(path)


def test_extractor_traced_in_training_mode_is_refused(tmp_path):
    path = trace(Small().train(), tmp_path / "training.pt")
    with pytest.raises(InputError, match=r"export the module after eval\(\)"):
        load_extractor(path)


def test_scripted_extractor_in_training_mode_is_put_into_evaluation(tmp_path, small):
    torch.manual_seed(0)
    training = load_extractor(script(Small().train(), tmp_path / "training.pt"))
    assert torch.equal(extract(images(9), training), extract(images(9), load_extractor(small)))


class Neighbours(torch.nn.Module):
    """Twelve channels normalised by their neighbours, then averaged as one volume."""

    def __init__(self, window: int, average: torch.nn.Module):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 12, 3)
        self.normalise = torch.nn.LocalResponseNorm(window, alpha=0.1)
        self.average = average

    def forward(self, images):
        x = self.normalise(self.conv(images.float() / 255))
        return self.average(x.unsqueeze(1)).squeeze(1).mean([2, 3])


@pytest.mark.parametrize("window", [1, 4, 11])
def test_normalisation_does_not_take_the_slow_kernel(tmp_path, window):
    module = Neighbours(window, torch.nn.Identity()).eval()
    extractor = load_extractor(script(module, tmp_path / "neighbours.pt"))
    names = set()

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.add(func.overloadpacket)
            return func(*args, **(kwargs or {}))

    with Record():
        extract(images(10), extractor, cache=False)
    assert torch.ops.aten.convolution in names or torch.ops.aten.conv2d in names
    assert torch.ops.aten.avg_pool3d not in names


@pytest.mark.parametrize("window", [1, 4, 11])
@pytest.mark.parametrize(
    ("volume", "stride", "padding"),
    [((3, 1, 1), 1, 0), ((3, 1, 1), 3, 0), ((2, 3, 3), 1, 0), ((3, 1, 1), 1, (1, 0, 0))],
)
def test_faster_averages_have_the_same_bits(tmp_path, window, volume, stride, padding):
    torch.manual_seed(0)
    module = Neighbours(window, torch.nn.AvgPool3d(volume, stride, padding)).eval()
    extractor = load_extractor(script(module, tmp_path / "neighbours.pt"))
    batch = images(8).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        expected = extractor.module(batch)
    assert torch.equal(extract(batch, extractor, cache=False), expected)


@pytest.fixture
def inception_path(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    path = tmp_path / "torch" / "hub" / "checkpoints" / os.path.basename(features.INCEPTION_URL)
    path.parent.mkdir(parents=True)
    return path


def test_foreign_inception_file_is_named(inception_path):
    inception_path.write_bytes(b"another file")
    with pytest.raises(InputError, match=r"sha256 begins with [0-9a-f]{8}, not 6726825d") as error:
        load_extractor("inception")
    assert str(inception_path) in str(error.value)


def test_inception_that_cannot_be_downloaded(inception_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(InputError, match="no network") as error:
        load_extractor("inception")
    assert features.INCEPTION_URL in str(error.value)
    assert f"put the file at {inception_path}" in str(error.value)
    assert "--extractor FILE" in str(error.value)


def test_inception_gives_2048_features(inception_path, monkeypatch):
    inception = pytest.importorskip("pytorch_fid.inception")
    with monkeypatch.context() as patch:
        patch.setattr(inception, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(torch.nn.Module, "load_state_dict", lambda *args, **kwargs: None)
        torch.manual_seed(0)
        net = inception.fid_inception_v3()
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)  # or the features would all be near zero
    torch.save(net.state_dict(), inception_path)
    monkeypatch.setattr(features, "INCEPTION_SHA256_PREFIX", features._sha256(inception_path)[:8])
    extractor = load_extractor("inception")
    assert (extractor.name, extractor.distance_name) == ("inception-2048", "FID")
    result = extract(images(2), extractor)
    net = inception.InceptionV3([3]).eval()
    with torch.no_grad():
        expected = net(images(2).float() / 255)[0].flatten(1)
    assert result.shape == (2, 2048)
    assert expected.abs().mean() > 1e-3
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-5)
