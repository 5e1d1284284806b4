"""GoogLeNet from a TensorFlow graph: its layers, the reading of the graph, the check, the file."""

import copy
import hashlib
import os
import subprocess
import sys
import urllib.error
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.compat.proto.graph_pb2 import GraphDef
from tensorboard.compat.proto.tensor_pb2 import TensorProto

from evaluation import make_googlenet_extractor as script
from evaluation.features import GOOGLENET_1024, load_extractor
from evaluation.make_googlenet_extractor import Convolution, GoogLeNet, build, make, read_graph
from utils import load_dataset


def packed(array: np.ndarray) -> TensorProto:
    """Kernels as raw bytes, vectors as a list of numbers: the two forms that a graph may use."""
    tensor = TensorProto(dtype=1)
    for size in array.shape:
        tensor.tensor_shape.dim.add(size=size)
    if array.ndim == 1:
        tensor.float_val.extend(array.tolist())
    else:
        tensor.tensor_content = array.astype("<f4").tobytes()
    return tensor


def write_graph(path: Path, tensors: dict[str, TensorProto]) -> Path:
    graph = GraphDef()
    graph.node.add(name="input", op="Placeholder")
    for name, tensor in tensors.items():
        graph.node.add(name=name, op="Const").attr["value"].tensor.CopyFrom(tensor)
    path.write_bytes(graph.SerializeToString())
    return path


@pytest.fixture(scope="module")
def random_arrays() -> dict[str, np.ndarray]:
    """Random weights in TensorFlow's order, at the scale of He et al. 2015."""
    rng = np.random.default_rng(0)
    arrays = {}
    for layer in GoogLeNet().modules():
        if isinstance(layer, Convolution):
            outputs, inputs, size, _ = layer.weight.shape
            shape = (size, size, inputs, outputs)
            scale = np.float32((2 / (size * size * inputs)) ** 0.5)
            arrays[f"{layer.name}_w"] = rng.standard_normal(shape, np.float32) * scale
            arrays[f"{layer.name}_b"] = rng.standard_normal(outputs, np.float32) / 10
    return arrays


@pytest.fixture(scope="module")
def random_tensors(random_arrays) -> dict[str, TensorProto]:
    return {name: packed(array) for name, array in random_arrays.items()}


@pytest.fixture(scope="module")
def random_graph(random_tensors, tmp_path_factory) -> Path:
    return write_graph(tmp_path_factory.mktemp("graph") / "graph.pb", random_tensors)


@pytest.fixture(scope="module")
def random_model(random_graph) -> GoogLeNet:
    return build(random_graph)


def run_outside(*arguments: str | Path, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "evaluation.make_googlenet_extractor", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        cwd=Path(__file__).parents[1],
    )


# ---------------------------------------------------------------------------------------------
# Layers
# ---------------------------------------------------------------------------------------------


def same_windows(size: int, window: int, stride: int) -> list[range]:
    """What each output of TensorFlow's "SAME" sees along one axis; the odd pixel goes last."""
    outputs = -(-size // stride)
    before = max((outputs - 1) * stride + window - size, 0) // 2
    starts = [i * stride - before for i in range(outputs)]
    return [range(max(start, 0), min(start + window, size)) for start in starts]


@pytest.mark.parametrize("size", [4, 14, 112])
def test_halving_takes_the_maximum_of_the_windows_of_same_padding(size):
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 2, size, size)))
    windows = same_windows(size, 3, 2)
    expected = [[x[:, :, list(r)][..., list(c)].amax((2, 3)) for c in windows] for r in windows]
    expected = torch.stack([torch.stack(row, -1) for row in expected], -2)
    assert torch.equal(script.halve()(x), expected)


def test_first_convolution_sums_the_windows_of_same_padding():
    pad, convolution = GoogLeNet().layers[:2]
    with torch.no_grad():
        convolution.weight.fill_(1)
    x = torch.randint(0, 9, (1, 3, 224, 224)).float()
    windows = same_windows(224, 7, 2)
    found = convolution(pad(x)).detach()
    assert found.shape == (1, 64, 112, 112)
    for i, j in [(0, 0), (0, 57), (1, 111), (110, 1), (111, 111)]:
        expected = x[0, :, list(windows[i])][:, :, list(windows[j])].sum()
        assert (found[0, :, i, j] == expected).all()


@pytest.mark.parametrize("size", [1, 3, 5])
def test_convolution_adds_its_bias_and_cuts_at_zero_with_its_size_kept(size):
    layer = Convolution("name", 1, 2, size)
    with torch.no_grad():
        layer.weight[:, 0, size // 2, size // 2] = torch.tensor([1, -2])
        layer.bias[:] = torch.tensor([0.5, 3])
    x = torch.arange(-6.0, 6).reshape(1, 1, 3, 4)
    assert torch.equal(layer(x), torch.cat([x + 0.5, 3 - 2 * x], 1).clamp(min=0))


def test_normalisation_follows_its_formula():
    x = np.random.default_rng(0).normal(0, 40, (2, 30, 3, 3))
    squares = np.stack([(x[:, max(c - 5, 0) : c + 6] ** 2).sum(1) for c in range(30)], 1)
    found = script.normalise()(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(found, x / np.sqrt(2 + 1e-4 * squares), rtol=1e-12)


def test_inception_joins_its_branches_in_the_order_of_the_paper():
    block = script.Inception("block", 2, (1, 4, 2, 5, 3, 4))
    x = torch.zeros(1, 2, 6, 6)
    with torch.no_grad():
        for value, branch in enumerate((block.one, block.three, block.five, block.pool), 1):
            last = branch if isinstance(branch, Convolution) else branch[1]
            last.bias.fill_(value)
    values = torch.tensor([1, 2, 2, 3, 3, 3, 4, 4, 4, 4.0])
    assert torch.equal(block(x), values[None, :, None, None].expand(1, 10, 6, 6))


def test_grey_of_117_becomes_zero_and_has_no_features(random_arrays, tmp_path):
    no_bias = {
        name: packed(array * (0 if name.endswith("_b") else 1))
        for name, array in random_arrays.items()
    }
    model = build(write_graph(tmp_path / "graph.pb", no_bias))
    images = torch.full((1, 3, 28, 28), 117, dtype=torch.uint8)
    assert torch.equal(model(images), torch.zeros(1, 1024))
    assert model(images + 1).abs().max() > 0


def test_large_images_are_averaged_before_they_shrink():
    # Every fourth column is white: a resize that isn't antialiased sees only black ones.
    images = torch.zeros(1, 3, 896, 896, dtype=torch.uint8)
    images[..., ::4] = 255
    model = GoogLeNet()
    model.layers = torch.nn.ZeroPad2d((-2, -2, 0, 0))  # nothing but the cut of two border columns
    torch.testing.assert_close(model(images), torch.full((1, 3), 255 / 4 - 117))


@pytest.mark.parametrize("shape", [(2, 3, 28, 28), (1, 3, 230, 40)])
def test_features_have_the_form_of_an_extractor(random_model, shape):
    features = random_model(torch.randint(256, shape, dtype=torch.uint8))
    assert features.shape == (shape[0], 1024) and features.dtype == torch.float32
    assert features.isfinite().all()


def test_only_uint8_is_taken(random_model):
    with pytest.raises(ValueError, match="uint8"):
        random_model(torch.zeros(1, 3, 28, 28))


# ---------------------------------------------------------------------------------------------
# The graph
# ---------------------------------------------------------------------------------------------


def test_weights_arrive_in_torch_order_rounded_to_float16(random_arrays, random_model):
    layers = [layer for layer in random_model.modules() if isinstance(layer, Convolution)]
    # Two before the inception blocks' six each, and the 7×7 one.
    assert len(layers) == 3 + 9 * 6
    for layer in layers:
        kernel = random_arrays[f"{layer.name}_w"].astype(np.float16)
        assert np.array_equal(layer.weight.numpy(), kernel.transpose(3, 2, 0, 1))
        assert np.array_equal(
            layer.bias.numpy(), random_arrays[f"{layer.name}_b"].astype(np.float16)
        )


def test_a_zip_and_the_graph_in_it_read_the_same(tmp_path):
    tensors = {"a_w": packed(np.ones((2, 3), np.float32)), "a_b": packed(np.zeros(3, np.float32))}
    graph = write_graph(tmp_path / "graph.pb", tensors)
    archive = tmp_path / "inception5h.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.write(graph, script.GRAPH)
    assert read_graph(graph) == read_graph(archive) == tensors


def test_a_file_cut_anywhere_is_refused_or_lacks_whole_tensors(tmp_path):
    tensors = {"a_w": packed(np.ones((2, 3), np.float32)), "a_b": packed(np.zeros(3, np.float32))}
    whole = write_graph(tmp_path / "graph.pb", tensors).read_bytes()
    cut = tmp_path / "cut.pb"
    refused = 0
    for length in range(len(whole)):
        cut.write_bytes(whole[:length])
        try:
            found = read_graph(cut)
        except script.InputError as error:
            assert str(cut) in str(error) and script.URL in str(error)
            refused += 1
        else:
            assert found.items() < tensors.items() and all(found[n] == tensors[n] for n in found)
    # The cuts that remain lie between the three nodes.
    assert refused == len(whole) - 3


def test_broken_files_are_refused_by_name(tmp_path, bad_input):
    archive = tmp_path / "inception5h.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("LICENSE", "text")
    with bad_input(str(archive), script.GRAPH, script.URL):
        read_graph(archive)

    with zipfile.ZipFile(archive, "w") as file:
        file.writestr(script.GRAPH, b"a" * 1000)
    data = archive.read_bytes()
    archive.write_bytes(data.replace(b"aaaa", b"aaab", 1))  # its checksum is wrong now
    with bad_input(str(archive), script.URL):
        read_graph(archive)
    archive.write_bytes(data[:500])
    with bad_input(str(archive), script.URL):
        read_graph(archive)
    with bad_input(str(tmp_path / "nowhere.pb"), script.URL):
        read_graph(tmp_path / "nowhere.pb")


def test_a_graph_of_other_tensors_is_refused_by_the_tensor(random_tensors, tmp_path, bad_input):
    path = tmp_path / "graph.pb"

    def expect(tensors: dict[str, TensorProto], *words: str) -> None:
        write_graph(path, tensors)
        with bad_input(str(path), script.URL, *words):
            build(path)

    expect({}, "conv2d0_w")
    expect({n: t for n, t in random_tensors.items() if n != "conv2d1_b"}, "no tensor conv2d1_b")

    wide = packed(np.zeros((7, 7, 3, 65), np.float32))
    expect({**random_tensors, "conv2d0_w": wide}, "conv2d0_w", "[7, 7, 3, 65]", "[7, 7, 3, 64]")

    short = copy.deepcopy(random_tensors["conv2d0_w"])
    short.tensor_content = short.tensor_content[:-4]
    expect({**random_tensors, "conv2d0_w": short}, "conv2d0_w cannot be read")

    strange = copy.deepcopy(random_tensors["conv2d0_w"])
    strange.dtype = 999
    expect({**random_tensors, "conv2d0_w": strange}, "conv2d0_w cannot be read")


# ---------------------------------------------------------------------------------------------
# The file
# ---------------------------------------------------------------------------------------------


def test_a_file_is_kept_only_with_the_known_features(
    random_graph, random_model, tmp_path, monkeypatch, bad_input
):
    out = tmp_path / "made" / "googlenet-1024.pt"
    with bad_input("not those of googlenet-1024", script.URL):
        make(random_graph, out)
    assert not list(out.parent.iterdir())

    with torch.inference_mode():
        known = random_model(load_dataset("demo").images[:3]).unflatten(1, (8, 128)).mean(2)
    monkeypatch.setattr(script, "KNOWN", tuple(map(tuple, known.tolist())))
    assert make(random_graph, out) == hashlib.sha256(out.read_bytes()).hexdigest()
    assert [path.name for path in out.parent.iterdir()] == ["googlenet-1024.pt"]
    assert out.stat().st_size < 1.1 * 2 * sum(p.numel() for p in random_model.parameters())

    extractor = load_extractor(out)
    assert (extractor.name, extractor.dim) == ("googlenet-1024", 1024)
    images = torch.randint(256, (2, 3, 50, 60), dtype=torch.uint8)
    with torch.inference_mode():
        torch.testing.assert_close(
            extractor.module(images), random_model(images), rtol=1e-4, atol=1e-5
        )
    with pytest.raises(torch.jit.Error, match="uint8"):
        extractor.module(images.float())

    known = known.clone()
    known[2, 5] *= 1 + 2 * script.TOLERANCE
    monkeypatch.setattr(script, "KNOWN", tuple(map(tuple, known.tolist())))
    with bad_input("not those of googlenet-1024"):
        script.check(out)


def test_weights_are_downloaded_once(tmp_path, monkeypatch, bad_input):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub" / "checkpoints" / "inception5h.zip"

    def refuse(*_):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with bad_input(script.URL, "no network", str(path), "--weights"):
        script.download()

    calls = []

    def fetch(url, target, sha256):
        calls.append((url, sha256))
        Path(target).write_bytes(b"weights")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    assert script.download() == script.download() == path
    assert calls == [(script.URL, script.SHA256)] and len(script.SHA256) == 64


def test_command_line_says_one_sentence_and_writes_nothing(tmp_path):
    graph = write_graph(tmp_path / "graph.pb", {})
    out = tmp_path / "googlenet-1024.pt"
    done = run_outside("--weights", graph, "--out", out)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "conv2d0_w" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["graph.pb"]


def original_tensors(path: Path) -> dict[str, np.ndarray]:
    """The weights of the measured extractor, in TensorFlow's order under the graph's names."""
    parts = {
        "b1": "1x1",
        "b3a": "3x3_bottleneck",
        "b3": "3x3",
        "b5a": "5x5_bottleneck",
        "b5": "5x5",
        "bp": "pool_reduce",
    }
    arrays = {}
    for key, value in load_extractor(path).module.state_dict().items():
        *place, kind = key.split(".")  # c0.weight, or m3.0.b3a.weight
        if len(place) == 1:
            name = f"conv2d{place[0][1:]}"
        else:
            name = f"mixed{place[0][1:]}{'abcde'[int(place[1])]}_{parts[place[2]]}"
        array = value.float().numpy()
        if kind == "weight":
            arrays[f"{name}_w"] = array.transpose(2, 3, 1, 0)
        else:
            arrays[f"{name}_b"] = array
    return arrays


def test_made_extractor_has_the_features_of_the_measured_one(tmp_path):
    given = os.environ.get("EXTRACTOR")
    if not given or not Path(given).is_file():
        pytest.skip("set EXTRACTOR to the googlenet-1024.pt that measured the results")
    if hashlib.sha256(Path(given).read_bytes()).hexdigest() != GOOGLENET_1024:
        pytest.skip(f"EXTRACTOR is not the file with the sha256 {GOOGLENET_1024[:8]}…")
    tensors = {name: packed(array) for name, array in original_tensors(Path(given)).items()}
    assert len(tensors) == 2 * 57
    graph = write_graph(tmp_path / "graph.pb", tensors)

    made = [tmp_path / seed / "googlenet-1024.pt" for seed in "12"]
    for out in made:
        done = run_outside("--weights", graph, "--out", out, PYTHONHASHSEED=out.parent.name)
        assert (done.returncode, done.stderr) == (0, "")
        assert hashlib.sha256(out.read_bytes()).hexdigest() in done.stdout
    assert made[0].read_bytes() == made[1].read_bytes()

    loaded = [load_extractor(path) for path in (given, made[0])]
    assert loaded[0].sha256 == loaded[1].sha256  # so that the shipped reference takes either
    extractors = [extractor.module for extractor in loaded]
    generator = torch.Generator().manual_seed(0)
    for shape in [(2, 3, 28, 28), (1, 3, 128, 128), (1, 3, 300, 250)]:
        images = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        with torch.inference_mode():
            known, found = (extractor(images) for extractor in extractors)
        torch.testing.assert_close(found, known, rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        known, found = (extractor(load_dataset("demo").images[3:11]) for extractor in extractors)
    torch.testing.assert_close(found, known, rtol=1e-4, atol=1e-5)
