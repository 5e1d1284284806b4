"""Make the GoogLeNet feature extractor, googlenet-1024.pt, from its public weights.

Run from the repository root: python -m evaluation.make_googlenet_extractor
The weights are Google's "inception5h": GoogLeNet (Szegedy et al. 2015, "Going Deeper with
Convolutions") trained on ImageNet, as a TensorFlow graph. --weights names inception5h.zip or the
graph in it; without it the zip is downloaded once. The result is a TorchScript file that maps uint8
[N, 3, H, W] to the pooled features of the last inception block, float32 [N, 1024]. Before it is
kept, its features of drawn cells are compared with those of the extractor that measured this
project's results.

The two files differ in their bytes and agree in their features, so the one made with the pinned
version of torch counts as the other in protocols (`features.SAME_FEATURES`). Another version of
torch may write other bytes: the table builder then takes its numbers for those of another protocol.
"""

import hashlib
import warnings
import zipfile
from pathlib import Path

import torch
from google.protobuf.message import DecodeError
from tensorboard.compat.proto.graph_pb2 import GraphDef
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.util.tensor_util import make_ndarray
from torch import nn
from torch.nn import functional as F

from evaluation.features import load_extractor
from evaluation.make_demo_extractor import export
from utils import (
    BROKEN_ARCHIVE,
    InputError,
    OneSentenceParser,
    exit_on_bad_input,
    load_dataset,
    write_atomically,
)

URL = "https://storage.googleapis.com/download.tensorflow.org/models/inception5h.zip"
# As TensorFlow's own build files pinned it.
SHA256 = "d13569f6a98159de37e92e9c8ec4dae8f674fbf475f69fe6199b514f756d4364"
GRAPH = "tensorflow_inception_graph.pb"
WAY_OUT = f"take inception5h.zip from {URL}"

# Measured with the extractor of this project's results (sha256 0b7f4736…): the mean of each run of
# 128 features, for the demo data's first three train cells. Sums in another order move them by less
# than 1e-6 of their value, the loss of any one bias tensor moves some by 2.2e-4 or more.
KNOWN = (
    (1.72061, 0.78024, 1.18754, 1.02780, 1.28552, 0.93806, 1.45920, 1.09007),
    (1.64598, 0.97323, 1.46483, 0.97928, 1.00888, 0.89267, 1.67690, 1.11527),
    (1.64689, 1.03085, 1.39181, 0.89812, 0.97618, 0.93405, 1.55227, 1.27158),
)
TOLERANCE = 2e-4


class Convolution(nn.Module):
    """A convolution and a ReLU; weights are kept in float16, sums are float32.

    name: of its tensors in the graph, without the ending _w or _b.
    """

    def __init__(self, name: str, inputs: int, outputs: int, size: int, stride: int = 1):
        super().__init__()
        self.name, self.stride = name, stride
        # At stride 1 TensorFlow's "SAME" is symmetric; elsewhere the caller pads.
        self.padding = size // 2 if stride == 1 else 0
        self.weight = nn.Parameter(torch.zeros(outputs, inputs, size, size, dtype=torch.float16))
        self.bias = nn.Parameter(torch.zeros(outputs, dtype=torch.float16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.relu(F.conv2d(x, weight, bias, self.stride, self.padding))


class Inception(nn.Module):
    """Four branches on the same input, joined along the channels (Figure 2b).

    widths: of 1×1, 3×3 reduce, 3×3, 5×5 reduce, 5×5, pool proj, as in the columns of Table 1.
    """

    def __init__(self, name: str, inputs: int, widths: tuple[int, int, int, int, int, int]):
        super().__init__()
        one, reduce_three, three, reduce_five, five, pool = widths
        self.one = Convolution(f"{name}_1x1", inputs, one, 1)
        self.three = nn.Sequential(
            Convolution(f"{name}_3x3_bottleneck", inputs, reduce_three, 1),
            Convolution(f"{name}_3x3", reduce_three, three, 3),
        )
        self.five = nn.Sequential(
            Convolution(f"{name}_5x5_bottleneck", inputs, reduce_five, 1),
            Convolution(f"{name}_5x5", reduce_five, five, 5),
        )
        self.pool = nn.Sequential(
            nn.MaxPool2d(3, stride=1, padding=1),
            Convolution(f"{name}_pool_reduce", inputs, pool, 1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)], dim=1)


class GoogLeNet(nn.Module):
    """uint8 [N, 3, H, W] → float32 [N, 1024]: Table 1 up to the average pooling.

    The public weights differ from Table 1 in two widths: 204 for 208 in 4a, 48 for 32 in 5a.
    """

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.ZeroPad2d((2, 3, 2, 3)),  # "SAME" for 7×7 at stride 2: the odd pixel goes last
            Convolution("conv2d0", 3, 64, 7, stride=2),
            halve(),
            normalise(),
            Convolution("conv2d1", 64, 64, 1),
            Convolution("conv2d2", 64, 192, 3),
            normalise(),
            halve(),
            Inception("mixed3a", 192, (64, 96, 128, 16, 32, 32)),
            Inception("mixed3b", 256, (128, 128, 192, 32, 96, 64)),
            halve(),
            Inception("mixed4a", 480, (192, 96, 204, 16, 48, 64)),
            Inception("mixed4b", 508, (160, 112, 224, 24, 64, 64)),
            Inception("mixed4c", 512, (128, 128, 256, 24, 64, 64)),
            Inception("mixed4d", 512, (112, 144, 288, 32, 64, 64)),
            Inception("mixed4e", 528, (256, 160, 320, 32, 128, 128)),
            halve(),
            Inception("mixed5a", 832, (256, 160, 320, 48, 128, 128)),
            Inception("mixed5b", 832, (384, 192, 384, 48, 128, 128)),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if images.dtype != torch.uint8:
            raise ValueError("expected uint8 images in [0, 255]")
        x = F.interpolate(images.float(), size=[224, 224], mode="bilinear", antialias=True)
        return self.layers(x - 117).mean(dim=(2, 3))  # the pixel mean that the weights expect


def halve() -> nn.Module:
    """Max pooling 3×3 at stride 2; on even sizes ceil_mode pads as TensorFlow's "SAME" does."""
    return nn.MaxPool2d(3, stride=2, ceil_mode=True)


def normalise() -> nn.Module:
    """Local response normalisation over a channel and five on each side: x / √(2 + 1e-4 Σ x²)."""
    # torch divides alpha by the number of channels in the window; the graph doesn't.
    return nn.LocalResponseNorm(11, alpha=11 * 1e-4, beta=0.5, k=2.0)


def download() -> Path:
    """The public weights in torch's hub folder, downloaded with their sha256 checked if not there.

    Raises InputError where there is no network.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / "inception5h.zip"
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL, path, SHA256)
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"cannot download {URL} ({error}); put the file at {path} or name it with --weights"
            )
    return path


def read_graph(path: Path) -> dict[str, TensorProto]:
    """The constant tensors of a TensorFlow graph by name; path: inception5h.zip or the graph alone.

    Raises InputError for a file that is missing, broken or a zip without the graph.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                data = archive.read(GRAPH)
        else:
            data = path.read_bytes()
        nodes = GraphDef.FromString(data).node
    except KeyError:
        raise InputError(f"{path} holds no {GRAPH}; {WAY_OUT}")
    except (*BROKEN_ARCHIVE, DecodeError) as error:
        raise InputError(f"{path} cannot be read as a TensorFlow graph ({error}); {WAY_OUT}")
    return {node.name: node.attr["value"].tensor for node in nodes if node.op == "Const"}


def build(path: Path) -> GoogLeNet:
    """GoogLeNet with the weights of a graph, rounded to float16; path as in `read_graph`.

    Raises InputError for a graph without one of the tensors or with one of another shape.
    """
    tensors = read_graph(path)

    def tensor(name: str, shape: list[int]) -> torch.Tensor:
        if name not in tensors:
            raise InputError(f"{path} holds no tensor {name}; {WAY_OUT}")
        found = [dimension.size for dimension in tensors[name].tensor_shape.dim]
        if found != shape:
            raise InputError(f"{path}: tensor {name} is {found}, not {shape}; {WAY_OUT}")
        try:
            return torch.from_numpy(make_ndarray(tensors[name]))
        except (TypeError, ValueError) as error:
            raise InputError(f"{path}: tensor {name} cannot be read ({error}); {WAY_OUT}")

    model = GoogLeNet().eval().requires_grad_(False)
    for layer in model.modules():
        if isinstance(layer, Convolution):
            outputs, inputs, size, _ = layer.weight.shape
            weight = tensor(f"{layer.name}_w", [size, size, inputs, outputs])
            # TensorFlow's order is [height, width, input, output].
            layer.weight.copy_(weight.permute(3, 2, 0, 1))
            layer.bias.copy_(tensor(f"{layer.name}_b", [outputs]))
    return model


def check(path: Path) -> None:
    """Compare an extractor's features of three demo cells with the known ones.

    Raises InputError where one of them differs by more than TOLERANCE of its value.
    """
    images = load_dataset("demo", None, 28, "train").images[: len(KNOWN)]
    with torch.inference_mode():
        features = load_extractor(path).module(images)
    known = torch.tensor(KNOWN)
    difference = (features.unflatten(1, (known.shape[1], -1)).mean(2) / known - 1).abs().max()
    if not difference <= TOLERANCE:
        raise InputError(
            f"these weights are not those of googlenet-1024: features of demo cells differ by "
            f"{difference:.1g} of their value from the known ones; {WAY_OUT}"
        )


def make(weights: Path, out: Path) -> str:
    """Write the extractor, whole and checked or not at all; returns its sha256.

    weights: as in `read_graph`. Raises InputError for weights that are not the public ones.
    """
    # The layout that networks on a CPU run in; converted later, a frozen network keeps its own.
    model = build(weights).to(memory_format=torch.channels_last)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.", FutureWarning)
        # Unfrozen, a class keeps its constants in an order that changes from run to run.
        data = export(torch.jit.freeze(torch.jit.script(model)))

    def write(partial: Path) -> None:
        partial.write_bytes(data)
        check(partial)

    write_atomically(out, write)
    return hashlib.sha256(data).hexdigest()


def main() -> None:
    parser = OneSentenceParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, help=f"inception5h.zip or {GRAPH} (downloaded)")
    parser.add_argument("--out", type=Path, default=Path("googlenet-1024.pt"), help="file to write")
    arguments = parser.parse_args()
    sha256 = make(arguments.weights or download(), arguments.out)
    print(f"{arguments.out}: sha256 {sha256}")


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
