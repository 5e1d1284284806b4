"""The classifiers: layers, shapes, what a row of the LSTM is, and pretrained weights."""

import hashlib
import math

import pytest
import torch
from torch import nn

from custom_models.classifiers import CLASSIFIERS, make_classifier


def build(name: str, n_classes: int = 4, size: int = 28, **options) -> nn.Module:
    torch.manual_seed(0)
    return make_classifier(name, n_classes, size, **options)


def sequence(module: nn.Module) -> list:
    """What each layer does, in order."""
    describe = {
        nn.Conv2d: lambda m: (m.in_channels, m.out_channels, *m.kernel_size, *m.stride),
        nn.MaxPool2d: lambda m: f"pool {m.kernel_size}",
        nn.Dropout: lambda m: m.p,
        nn.Linear: lambda m: (m.in_features, m.out_features),
        nn.ReLU: lambda m: "relu",
        nn.Flatten: lambda m: "flat",
    }
    return [describe[type(m)](m) for m in module]


@pytest.mark.parametrize("name", [name for name in CLASSIFIERS if "imagenet" not in name])
@pytest.mark.parametrize("size, channels", [(9, 3), (64, 1)])
def test_images_become_logits(name, size, channels):
    network = build(name, 5, size, image_channels=channels).eval()
    images = torch.rand(2, channels, size, size) * 2 - 1
    with torch.no_grad():
        both, first = network(images), network(images[:1])
    assert both.shape == (2, 5) and both.dtype == torch.float32 and both.isfinite().all()
    torch.testing.assert_close(first, both[:1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in CLASSIFIERS if "imagenet" not in name])
def test_every_weight_learns(name):
    network = build(name, size=16)
    loss = nn.functional.cross_entropy(network(torch.rand(4, 3, 16, 16) * 2 - 1), torch.arange(4))
    loss.backward()
    for key, parameter in network.named_parameters():
        assert parameter.grad.abs().sum() > 0, key


def test_layers_of_the_cnn():
    assert sequence(build("cnn", 8, 64)) == [
        *[(3, 32, 3, 3, 1, 1), "pool 2", "relu"],
        *[(32, 64, 3, 3, 1, 1), "pool 2", "relu"],
        *[(64, 64, 3, 3, 1, 1), "pool 2", "relu"],
        *[0.25, "flat", (64 * 8 * 8, 128), "relu", 0.5, (128, 8)],
    ]


def test_layers_of_the_cnn_rnn():
    network = build("cnn_rnn", 8, 64)
    assert sequence(network.cnn) == [
        *[(3, 32, 3, 3, 1, 1), "pool 2", "relu", (32, 64, 3, 3, 1, 1), "pool 2", "relu"],
        *[0.25, "flat", (64 * 16 * 16, 128)],
    ]
    rnn = network.rnn
    assert (rnn.input_size, rnn.hidden_size, rnn.num_layers) == (3 * 64, 64, 2)
    assert sequence(network.head) == [(128, 128), "relu", 0.5, (128, 8)]


@pytest.mark.parametrize("name", ["cnn", "cnn_rnn"])
def test_weights_begin_as_published(name):
    """Uniform within √(6 / (inputs + outputs)), each of them times the kernel's area."""
    for module in build(name).modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            outputs, inputs, *kernel = module.weight.shape
            bound = (6 / ((inputs + outputs) * math.prod(kernel))) ** 0.5
            assert 0.9 * bound < module.weight.abs().max() <= bound
            assert not module.bias.any()


def test_the_lstm_reads_rows_with_all_their_colours_from_top_to_bottom():
    network, seen = build("cnn_rnn").eval(), []
    network.rnn.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    images = torch.arange(3 * 28 * 28.0).view(1, 3, 28, 28)
    network(images)
    assert seen[0].shape == (1, 28, 3 * 28)
    for row in (0, 5, 27):
        assert torch.equal(seen[0][0, row], images[0, :, row].flatten())


def test_the_branches_are_multiplied():
    """Where one branch is zero, the other can't be seen; where it is one, it alone is seen."""
    network = build("cnn_rnn").eval()
    images = torch.rand(2, 3, 28, 28) * 2 - 1
    nn.init.zeros_(network.project.weight)
    for value in (0.0, 1.0):
        nn.init.constant_(network.project.bias, value)
        with torch.no_grad():
            expected = network.head(value * network.cnn(images))
            torch.testing.assert_close(network(images), expected)


def test_stems_of_the_residual_networks():
    stems = {
        (name, size): (
            (first := build(name, size=size)).conv1.kernel_size,
            first.conv1.stride,
            type(first.maxpool),
        )
        for name, size in (("resnet18", 63), ("resnet18", 64), ("resnet50", 28))
    }
    own = ((7, 7), (2, 2), nn.MaxPool2d)
    assert stems["resnet18", 63] == ((3, 3), (1, 1), nn.Identity)
    assert stems["resnet18", 64] == stems["resnet50", 28] == own


# ---------------------------------------------------------------------------------------------
# Pretrained weights
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def imagenet_file(tmp_path, monkeypatch):
    """Where torch keeps resnet18's weights of ImageNet, in a home of its own without a network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    path = tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    path.parent.mkdir(parents=True)
    return path


@pytest.mark.parametrize(
    "size, channels, fresh",
    [(64, 3, {"fc"}), (28, 3, {"fc", "conv1"}), (64, 1, {"fc", "conv1"})],
)
def test_imagenet_weights_are_taken_where_the_shapes_agree(
    imagenet_file, size, channels, fresh, monkeypatch
):
    from torchvision.models import ResNet18_Weights, resnet18

    torch.manual_seed(1)
    state = resnet18().state_dict()
    torch.save(state, imagenet_file)
    begins = hashlib.sha256(imagenet_file.read_bytes()).hexdigest()[:8]
    own = imagenet_file.rename(imagenet_file.with_name(f"resnet18-{begins}.pth"))
    monkeypatch.setattr(ResNet18_Weights.IMAGENET1K_V1.value, "url", f"https://none/{own.name}")
    network = build("resnet18_imagenet", 4, size, image_channels=channels)
    plain = build("resnet18", 4, size, image_channels=channels).state_dict()
    for name, value in network.state_dict().items():
        source = plain if name.split(".")[0] in fresh else state
        assert torch.equal(value, source[name]), name


def test_a_file_of_other_weights_is_bad_input_before_it_is_opened(
    imagenet_file, bad_input, monkeypatch
):
    monkeypatch.delattr(torch, "load")
    imagenet_file.write_bytes(b"not weights")
    with bad_input(str(imagenet_file), "not torchvision's resnet18", "delete it"):
        build("resnet18_imagenet")


def test_a_download_that_fails_is_one_sentence(imagenet_file, bad_input):
    with bad_input("resnet18", "could not be had", str(imagenet_file), "or take resnet18"):
        build("resnet18_imagenet")


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("vgg", {}, ("'vgg'", "resnet50")),
        ("cnn", {"size": 7}, ("at least 8", "not 7")),
    ],
)
def test_bad_input(name, options, words, bad_input):
    with bad_input(*words):
        build(name, **options)
