"""Classifiers of cells: the two of the published study of GAN augmentation, and two residual ones.

The published study (Enhancing White Blood Cell Classification through GAN-based Data Augmentation,
BCCD, best accuracy 87.77 %) gives its classifiers as notebooks, whose layers differ from one to the
next. `CNN` and `CNNRNN` say what is taken from them and what is not.
"""

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn

from utils import InputError

IMAGENET = "_imagenet"  # behind a residual network's name: it starts from torchvision's weights
CLASSIFIERS = (
    *("cnn", "cnn_rnn", "resnet18", "resnet50"),
    *(f"resnet18{IMAGENET}", f"resnet50{IMAGENET}"),
)
SMALLEST_SIDE = 8  # pixels: three halvings leave one
SMALL_SIDE = 64  # pixels: below it resnet18 keeps the resolution in its first layers


def make_classifier(
    name: str, n_classes: int, image_size: int, image_channels: int = 3
) -> nn.Module:
    """A classifier of images in [-1, 1], float32 [N, C, S, S], to logits [N, n_classes].

    name: one of CLASSIFIERS. Those that end in _imagenet start from torchvision's weights, which
    are downloaded once, or lie in torch's folder of checkpoints already; torch's random state
    decides the first weights of the others. Raises InputError for an unknown name, images that are
    too small, and weights that can't be had.
    """
    if name not in CLASSIFIERS:
        raise InputError(f"unknown classifier {name!r}; known are {', '.join(CLASSIFIERS)}")
    if image_size < SMALLEST_SIDE:
        raise InputError(
            f"a classifier needs images of at least {SMALLEST_SIDE} pixels, not {image_size}"
        )
    if name.startswith("resnet"):
        architecture = name.removesuffix(IMAGENET)
        network = residual_network(architecture, n_classes, image_size, image_channels)
        if name.endswith(IMAGENET):
            load_imagenet(network, architecture)
        return network
    network = {"cnn": CNN, "cnn_rnn": CNNRNN}[name](n_classes, image_size, image_channels)
    return network.to(memory_format=torch.channels_last)  # a fifth faster on a CPU


def convolutions(image_channels: int, widths: tuple[int, ...]) -> list[nn.Module]:
    """3×3 convolutions, each with max-pooling that halves the side and with ReLU.

    The largest of four values is the same before and after ReLU; after pooling it is less work.
    """
    layers = []
    for inputs, outputs in zip((image_channels, *widths), widths):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.MaxPool2d(2), nn.ReLU()]
    return layers


def init_glorot(module: nn.Module) -> None:
    """Uniform weights of variance 2 / (inputs + outputs) and zero biases, as published (Keras).

    Glorot and Bengio 2010, equation 16.
    """
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


class CNN(nn.Sequential):
    """Three convolutions and a dense layer: [N, C, S, S] → logits [N, n_classes].

    As published: 3×3 convolutions of 32, 64 and 64 channels with ReLU and max-pooling, dropout
    0.25, a dense layer of 128 with ReLU, dropout 0.5. Ours: every arm of a study has these three
    convolutions (published: two, three or five, by the arm), padded and each followed by
    max-pooling (published: not padded, and pooled once, after the last).
    """

    def __init__(self, n_classes: int, image_size: int, image_channels: int):
        super().__init__(
            *convolutions(image_channels, (32, 64, 64)),
            nn.Dropout(0.25),
            nn.Flatten(),
            nn.Linear(64 * (image_size // 8) ** 2, 128),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(128, n_classes),
        )
        self.apply(init_glorot)


class CNNRNN(nn.Module):
    """Convolutions beside an LSTM that reads the image's rows: [N, C, S, S] → logits.

    As published: 3×3 convolutions of 32 and 64 channels with ReLU, max-pooling, dropout 0.25; two
    LSTM layers of 64 units that read the rows from top to bottom; both merged, a dense layer of 128
    with ReLU, dropout 0.5. Ours: a row holds all its colours (published: their mean), the LSTM
    reads in one direction (published: both), max-pooling follows each convolution (published: the
    last), and the branches are merged by the elementwise product of their dense projections, as
    the notebooks' comments say; their code concatenates.
    """

    def __init__(self, n_classes: int, image_size: int, image_channels: int):
        super().__init__()
        self.cnn = nn.Sequential(
            *convolutions(image_channels, (32, 64)),
            nn.Dropout(0.25),
            nn.Flatten(),
            nn.Linear(64 * (image_size // 4) ** 2, 128),
        )
        self.rnn = nn.LSTM(image_channels * image_size, 64, num_layers=2, batch_first=True)
        self.project = nn.Linear(64, 128)
        self.head = nn.Sequential(
            nn.Linear(128, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, n_classes)
        )
        self.apply(init_glorot)

    def forward(self, images: Tensor) -> Tensor:
        rows = images.transpose(1, 2).flatten(2)  # [N, S, C S]
        states, _ = self.rnn(rows)
        return self.head(self.cnn(images) * self.project(states[:, -1]))


def residual_network(
    name: str, n_classes: int, image_size: int, image_channels: int
) -> nn.Module:
    """torchvision's resnet18 or resnet50 (He et al. 2016).

    resnet18 begins with a 3×3 convolution of stride 1 without max-pooling below 64 pixels, as in
    that paper's section 4.2.
    """
    try:
        from torchvision import models
    except ImportError:
        raise InputError(f"{name} is torchvision's: pip install torchvision, or take cnn")
    network = getattr(models, name)(num_classes=n_classes)
    if name == "resnet18" and image_size < SMALL_SIDE:
        network.conv1 = nn.Conv2d(image_channels, 64, 3, padding=1, bias=False)
        network.maxpool = nn.Identity()
    elif image_channels != 3:
        network.conv1 = nn.Conv2d(image_channels, 64, 7, stride=2, padding=3, bias=False)
    return network


def load_imagenet(network: nn.Module, name: str) -> None:
    """torchvision's weights of a training on ImageNet, but for layers of another shape.

    These are the first convolution of small or grey images and the last layer. ImageNet's networks
    saw images of another scale and offset, nearly the same for all colours: the normalisation after
    the first convolution takes both up.
    """
    from torchvision.models import get_model_weights

    url = get_model_weights(name).IMAGENET1K_V1.url
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    begins = path.stem.rsplit("-", 1)[1]  # the publisher's own: the sha256's first eight digits
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, path, begins)
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"torchvision's ImageNet weights of {name} could not be had ({error}); put them at "
                f"{path}, or take {name}"
            )
    # Before it is opened: the file is a pickle.
    if not hashlib.sha256(path.read_bytes()).hexdigest().startswith(begins):
        raise InputError(f"{path} is not torchvision's {name}; delete it, and it is fetched anew")
    own, state = network.state_dict(), torch.load(path, map_location="cpu", weights_only=True)
    for part in ("conv1.weight", "fc.weight", "fc.bias"):
        if state[part].shape != own[part].shape:
            state[part] = own[part]
    network.load_state_dict(state)
