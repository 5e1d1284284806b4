"""Features of uint8 images from a fixed network, computed once for each set."""

import hashlib
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from utils import InputError, cache_folder, progress, write_to_cache

DEMO_FILE = Path(__file__).with_name("demo_extractor.pt")
DOMAIN_FILE = Path(__file__).with_name("domain_extractor.pt")
SHIPPED = {"demo": DEMO_FILE, "domain": DOMAIN_FILE}
INCEPTION_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth"
)
INCEPTION_SHA256_PREFIX = "6726825d"  # the publisher's own, at the end of the file's name
GOOGLENET_1024 = "0b7f4736f7293ca46d4fd63fd57871af4dc51f904da6d1945f39089587e10dc3"
# Files of other bytes whose features are the same to the last bit: what make_googlenet_extractor
# writes (with torch 2.15.0) counts as the file that measured the results. Tested.
SAME_FEATURES = {"f85497e8cd32e1c14a83d38bfe1c843d763c5eafc31c3bdfd792337b38d234bd": GOOGLENET_1024}

# Measured: eight images are the fastest on a CPU, whose cache they still fit.
CPU_BATCH, CUDA_BATCH = 8, 256

if not hasattr(torch.ops.aten, "_upsample_lanczos2d_aa"):
    # TorchScript looks for every operation of a file, those of branches that are never taken, too;
    # the shipped files name this one, which PyTorch has from 2.12 on.
    _LANCZOS = torch.library.Library("aten", "FRAGMENT")
    _LANCZOS.define(
        "_upsample_lanczos2d_aa.vec(Tensor input, SymInt[]? output_size, bool align_corners, "
        "float[]? scale_factors) -> Tensor"
    )


@dataclass(frozen=True)
class Extractor:
    """A network that maps uint8 [N, 3, H, W] to float32 [N, dim].

    name: as it stands in a protocol; distance_name: how a Fréchet distance on these features may
    be called, "FID" for pytorch-fid's Inception-v3 alone; sha256: of the weights' file.
    """

    name: str
    distance_name: str
    sha256: str
    dim: int
    module: torch.nn.Module
    device: torch.device


class FastNormalisation(TorchDispatchMode):
    """Within it a local response normalisation takes a fraction of its time on a CPU, bit for bit.

    PyTorch averages the squares of neighbouring channels by avg_pool3d, whose CPU kernel took a
    quarter of GoogLeNet's time or more; a sum of slices adds the same numbers in the same order.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # Over one axis, at stride 1, without padding: what `local_response_norm` asks for.
        if func is torch.ops.aten.avg_pool3d.default and len(args) == 3 and not kwargs:
            images, (window, *rest), stride = args
            if images.is_cpu and images.ndim == 5 and {*rest, *stride} == {1}:
                first, *others = images.unfold(2, window, 1).unbind(-1)
                total = first.clone(memory_format=torch.contiguous_format)
                for plane in others:
                    total += plane
                return total.div_(window)
        return func(*args, **(kwargs or {}))


class Inception(torch.nn.Module):
    """pytorch-fid's Inception-v3 on uint8 images; it resizes to 299 pixels itself."""

    def __init__(self):
        super().__init__()
        from pytorch_fid.inception import InceptionV3

        self.net = InceptionV3([InceptionV3.BLOCK_INDEX_BY_DIM[2048]])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.net(images.float() / 255)[0].flatten(1)


def load_extractor(spec: str | Path | None = None, device: torch.device | str = "cpu") -> Extractor:
    """Load a feature extractor in evaluation mode and try it on a few random images.

    spec: "inception" (pytorch-fid's Inception-v3 of Heusel et al. 2017, 2048-d), "domain" (128-d,
    trained on real cells of the train split, so its reference is the test split) and "demo" (64-d,
    on generated cells), which both come with the project, or a TorchScript file that maps uint8
    [N, 3, H, W] to float32 [N, D]; None: $EXTRACTOR, else "inception".
    Raises InputError for a missing, broken or foreign file and for output of another form.
    """
    device = torch.device(device)
    spec = spec or os.environ.get("EXTRACTOR") or "inception"
    path = Path(spec).expanduser()
    if spec == "inception":
        path = _inception_file()
        module = _load_inception().to(device)
    else:
        path = SHIPPED.get(spec, path)
        module = _load_torchscript(path, device)
    module.eval()
    if device.type == "cpu":
        module.to(memory_format=torch.channels_last)
    dim, sha256 = _probe(module, path, device), _sha256(path)
    # A known file under another path is the same network, with the same name and limits.
    spec = next((name for name, file in SHIPPED.items() if _sha256(file) == sha256), spec)
    sha256 = SAME_FEATURES.get(sha256, sha256)
    name, distance_name = path.stem, f"FD ({path.stem})"
    if spec == "inception":
        name, distance_name = f"inception-{dim}", "FID"
    elif spec in SHIPPED:
        name, distance_name = f"{spec}-{dim}", f"FD ({spec})"
    elif sha256 == GOOGLENET_1024:
        name, distance_name = "googlenet-1024", "FD (GoogLeNet-1024)"
    return Extractor(name, distance_name, sha256, dim, module, device)


def refuse_domain(extractor: Extractor) -> None:
    """Raise InputError for an extractor that knows the train split, where that is the reference."""
    if extractor.distance_name == "FD (domain)":
        raise InputError(
            "the domain extractor knows the train split, which is the reference here; it is for "
            "distances to the test split (--reference bloodmnist-28-domain of python -m "
            "evaluation): give another extractor"
        )


def extract(
    images: torch.Tensor, extractor: Extractor, desc: str = "features", cache: bool = True
) -> torch.Tensor:
    """Features of uint8 [N, 3, H, W] images in [0, 255]: float32 [N, dim] on the CPU.

    Grey images [N, 1, H, W] are shown to the network as three equal channels, batch by batch.
    cache: keep them in the cache folder under the images' and the extractor's sha256; for images
    that no one will see again it only fills the disk. Raises InputError for images of another
    dtype or shape and for features that are not finite.
    """
    _check_images(images)
    images = images.cpu().contiguous()
    if not cache:
        return _compute(images, extractor, desc)
    digest = hashlib.sha256(repr(tuple(images.shape)).encode())
    digest.update(images.numpy())
    name = f"{digest.hexdigest()[:16]}-{extractor.sha256[:16]}.pt"
    cached = cache_folder() / "features" / name
    features = _read_cache(cached, (len(images), extractor.dim))
    if features is None:
        features = _compute(images, extractor, desc)
        write_to_cache(cached, lambda path: torch.save(features, path))
    return features


def _compute(images: torch.Tensor, extractor: Extractor, desc: str) -> torch.Tensor:
    batches = images.split(CUDA_BATCH if extractor.device.type == "cuda" else CPU_BATCH)
    return torch.cat(
        [
            _run(extractor.module, batch.expand(-1, 3, -1, -1), extractor.device, extractor.name)
            for batch in progress(batches, total=len(batches), desc=desc)
        ]
    )


def _check_images(images: torch.Tensor) -> None:
    if images.numel() == 0:
        raise InputError(f"there are no images to evaluate: shape {list(images.shape)}")
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise InputError(
            "evaluation takes uint8 images [N, 3 or 1, H, W] in [0, 255], got "
            f"{str(images.dtype).removeprefix('torch.')} {list(images.shape)} in "
            f"[{images.min().item():g}, {images.max().item():g}]; "
            "convert with utils.to_uint8"
        )


def _run(module, batch: torch.Tensor, device: torch.device, name: str | Path) -> torch.Tensor:
    """Features of one batch on the CPU, with their form checked."""
    if device.type == "cpu":
        batch = batch.contiguous(memory_format=torch.channels_last)
    # TF32 would move the features by about 1e-3 away from a CPU's.
    exact = torch.backends.cudnn.flags(
        enabled=True, deterministic=True, allow_tf32=False, fp32_precision="ieee"
    )
    with torch.inference_mode(), exact, FastNormalisation():
        features = module(batch.to(device))
    if not isinstance(features, torch.Tensor):
        raise InputError(f"extractor {name} returns {type(features).__name__}, not one tensor")
    form = (features.dtype, features.ndim, len(features) if features.ndim else 0)
    if form != (torch.float32, 2, len(batch)):
        raise InputError(
            f"extractor {name} must return float32 [{len(batch)}, D] for {len(batch)} images, "
            f"got {str(features.dtype).removeprefix('torch.')} {list(features.shape)}"
        )
    if not features.isfinite().all():
        raise InputError(f"extractor {name} returns NaN or infinite features; use another file")
    return features.cpu()


def _probe(module, path: Path, device: torch.device) -> int:
    """The features' dimension, from random images of BloodMNIST's size."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (3, 3, 28, 28), generator=generator, dtype=torch.uint8)
    try:
        together, alone = (_run(module, part, device, path) for part in (images, images[:1]))
    except torch.OutOfMemoryError:
        raise  # no fault of the file
    except (RuntimeError, torch.jit.Error) as error:
        reason = str(error).strip().splitlines()[-1]
        raise InputError(f"extractor {path} fails on uint8 [3, 3, 28, 28] images: {reason}")
    # A module traced in training mode keeps its batch statistics and dropout even after eval().
    if not torch.allclose(together[:1], alone, rtol=1e-3, atol=1e-3 * alone.abs().max().item()):
        raise InputError(
            f"extractor {path}: an image's features change with the others in its batch; "
            "export the module after eval()"
        )
    return together.shape[1]


def _load_torchscript(path: Path, device: torch.device) -> torch.nn.Module:
    if not path.is_file():
        raise InputError(
            f"extractor {path} does not exist; give inception, domain, demo or a TorchScript file"
        )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`torch\.jit\.load` is deprecated", FutureWarning)
            return torch.jit.load(path, map_location=device)
    except torch.OutOfMemoryError:
        raise  # no fault of the file
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"torch {torch.__version__} can't read {path} as TorchScript ({reason}); get it anew"
        ) from None


def _inception_file() -> Path:
    """The Inception weights, downloaded if they are not there, with their sha256 checked."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_URL.rsplit("/", 1)[1]
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(INCEPTION_URL, path, INCEPTION_SHA256_PREFIX)
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"cannot download {INCEPTION_URL} ({error}); put the file at {path}, "
                "or use --extractor FILE"
            ) from None
    # Before it is opened: the file is a pickle.
    if not _sha256(path).startswith(INCEPTION_SHA256_PREFIX):
        raise InputError(
            f"{path} is not pytorch-fid's file: its sha256 begins with {_sha256(path)[:8]}, not "
            f"{INCEPTION_SHA256_PREFIX}; remove it and get {INCEPTION_URL}"
        )
    return path


def _load_inception() -> torch.nn.Module:
    try:
        return Inception()
    except ImportError as error:
        raise InputError(
            f"the inception extractor needs pytorch-fid ({error}): pip install pytorch-fid, "
            "or use --extractor FILE"
        ) from None


def _read_cache(path: Path, shape: tuple[int, int]) -> torch.Tensor | None:
    try:
        features = torch.load(path, weights_only=True)
        usable = features.shape == shape and features.dtype == torch.float32
        return features if usable and features.isfinite().all() else None
    except Exception:
        return None


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
