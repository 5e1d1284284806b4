"""The path of a GPU on a machine without one.

Training steps run on fake tensors, which know their device, dtype and shape alone: an operation on
tensors of two devices fails on them as it would on a GPU, and so does reading one of their values,
for which a GPU would have to be waited for. Metrics, which read values, run on tensors of the CPU
that claim to be a GPU's.
"""

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.overrides import TorchFunctionMode

from custom_models import MODELS, layers, make_config
from custom_models.drawing import batch_size
from custom_models.running_mean import RunningMean
from evaluation import copies, protocol
from generative_pipeline import _deterministic_on, fuse
from utils import random_flips_and_turns, to_model_range, to_uint8

BF16 = torch.bfloat16
PRESETS = [(name, preset) for name, module in MODELS.items() for preset in module.PRESETS]


@pytest.fixture
def fake(monkeypatch):
    """Fake tensors, whose gradients are zeros: the real ones need a GPU's driver."""

    def grad(outputs, inputs, **_):
        inputs = [inputs] if isinstance(inputs, torch.Tensor) else inputs
        return tuple(torch.zeros_like(part) for part in inputs)

    def update(optimizer, loss, largest_norm=None):
        assert loss.device.type == "cuda" and loss.dtype == torch.float32 and loss.ndim == 0
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()

    monkeypatch.setattr(torch.autograd, "grad", grad)
    # So that autocast rounds as on a GPU.
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    for module in {type(p).__module__ for m in MODELS.values() for p in m.PRESETS.values()}:
        monkeypatch.setattr(f"{module}.update", update, raising=False)
    with FakeTensorMode():
        yield


def on_gpu(config) -> torch.nn.Module:
    with torch.device("cuda"):  # without it every new tensor is the CPU's, as in a real run
        model = config.build()
    if hasattr(model, "steps"):
        # R3GAN reads its own count of steps, the one value that a training step waits for.
        del model.steps
        model.steps = 0
    return model


@pytest.mark.parametrize(("name", "preset"), PRESETS)
def test_a_training_step_stays_on_the_gpu_and_never_waits_for_it(name, preset, fake):
    config = make_config(name, preset)
    model = on_gpu(config)
    optimizers, n, side = model.optimizers(), config.images_per_step, config.image_size
    fuse(optimizers)
    images = torch.zeros(n, config.image_channels, side, side, dtype=torch.uint8, device="cuda")
    labels = torch.zeros(n, dtype=torch.int64, device="cuda")
    for _ in range(2):  # penalties may come every second step
        reals = random_flips_and_turns(to_model_range(images))
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            assert (torch.ones(2, 2, device="cuda") @ torch.ones(2, 2, device="cuda")).dtype == BF16
            logged = model.training_step(reals, labels, optimizers)
        assert {value.device.type for value in logged.values()} == {"cuda"}
    for optimizer in optimizers.values():  # a fused update counts its steps on the GPU
        assert {state["step"].device.type for state in optimizer.state.values()} == {"cuda"}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_fastest_convolutions_are_looked_for_on_a_gpu_alone(device):
    assert not torch.backends.cudnn.benchmark
    with _deterministic_on(torch.device(device)):
        assert torch.backends.cudnn.benchmark == (device == "cuda")
        assert torch.are_deterministic_algorithms_enabled() == (device == "cpu")
    assert not torch.backends.cudnn.benchmark and not torch.are_deterministic_algorithms_enabled()


def test_the_running_mean_stays_on_the_gpu_and_never_waits_for_it(fake, monkeypatch):
    config = make_config("dcgan", "baseline")  # with counters among its buffers
    model, other = on_gpu(config), on_gpu(config)
    with monkeypatch.context() as patched:
        patched.setattr("copy.deepcopy", lambda _: other)  # fake tensors can't be copied
        mean = RunningMean(model, 0.999)

    class NoCopies(TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), keywords=None):
            assert function not in (torch.Tensor.to, torch.Tensor.cuda, torch.Tensor.item)
            return function(*arguments, **(keywords or {}))

    with NoCopies():
        for _ in range(3):
            mean.update()
    assert {t.device.type for t in mean.module.state_dict().values()} == {"cuda"}


@pytest.mark.parametrize(("name", "preset"), [p for p in PRESETS if p[0] not in ("ddpm", "cvae")])
def test_samples_are_drawn_on_the_gpu(name, preset, fake):
    config = make_config(name, preset)
    labels = torch.zeros(5, dtype=torch.int64, device="cuda")
    images = to_uint8(on_gpu(config).eval().sample(labels, None))
    assert images.device.type == "cuda" and images.dtype == torch.uint8
    assert images.shape == (5, config.image_channels, config.image_size, config.image_size)


@pytest.mark.parametrize(
    ("device", "size", "images"),
    [("cpu", 28, 128), ("cpu", 64, 128), ("cuda", 28, 1024), ("cuda", 64, 196), ("cuda", 128, 128)],
)
def test_a_gpu_draws_more_small_images_at_once(device, size, images):
    assert batch_size(torch.device(device), size) == images


def test_a_tensor_of_another_device_is_found(fake):
    with pytest.raises(RuntimeError, match="device"):
        torch.zeros(2, device="cuda") + torch.zeros(2)
    with pytest.raises(DataDependentOutputException):
        torch.zeros(2, device="cuda").sum().item()


def test_an_update_is_outside_autocast(monkeypatch):
    """As the second derivative of a penalty must be; the CPU's autocast shows it as well."""
    weight = torch.nn.Parameter(torch.ones(2, 2))
    optimizer, seen = torch.optim.SGD([weight], lr=0.5), []
    with torch.autocast("cpu", torch.bfloat16):
        loss = (weight @ weight).float().sum()
        loss.register_hook(lambda _: seen.append(torch.is_autocast_enabled("cpu")))
        layers.update(optimizer, loss, largest_norm=1.0)
    assert seen == [False]
    # All entries have the gradient 4, a norm of 8 that is shortened to 1.
    assert torch.allclose(weight, torch.full((2, 2), 1 - 0.5 * 0.5), atol=1e-6)


# ---------------------------------------------------------------------------------------------
# Metrics
# ---------------------------------------------------------------------------------------------


class Pretended(torch.Tensor):
    """A tensor of the CPU that claims to be a GPU's, and refuses to meet others."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if function == torch.Tensor.device.__get__:
            return torch.device("cuda", 0)
        if name == "numpy":
            raise TypeError("a GPU's tensor has no array")
        if name == "cpu":
            return args[0].as_subclass(torch.Tensor)
        flat = torch.utils._pytree.tree_leaves((args, kwargs or {}))
        others = [x for x in flat if isinstance(x, torch.Tensor) and not isinstance(x, cls)]
        if any(x.ndim for x in others) and name not in ("__getitem__", "__setitem__"):
            raise RuntimeError(f"{name} meets tensors on two devices")
        return super().__torch_function__(function, types, args, kwargs or {})


class Pretending(TorchFunctionMode):
    """Makes new tensors of a GPU, and copies to one, into `Pretended`."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        is_gpu = [isinstance(x, torch.device) and x.type == "cuda" for x in args]
        if function is torch.Tensor.to and any(is_gpu):
            return args[0].as_subclass(Pretended)
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            made = function(*args, **(kwargs | {"device": "cpu"}))
            return made.as_subclass(Pretended)
        return function(*args, **kwargs)


def close(a, b) -> bool:
    """Whether two results are equal but for rounding."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(close, a, b))
    return a == pytest.approx(b, rel=1e-6, abs=1e-9) if isinstance(a, float) else a == b


def test_metrics_are_the_same_on_a_gpu():
    generator = torch.Generator().manual_seed(0)
    real, fake = (torch.randn(n, 6, generator=generator) for n in (90, 70))
    expected = protocol.measure(real, fake)
    with Pretending():
        found = protocol.measure(real.as_subclass(Pretended), fake.as_subclass(Pretended))
    assert close(expected[0], found[0]) and expected[1] == found[1]


def test_copies_are_the_same_on_a_gpu(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    cells = torch.randint(256, (300, 3, 8, 8), dtype=torch.uint8, generator=generator)
    images, train, held_out = cells[:60], cells[50:180], cells[180:]  # ten are copies
    features = {len(part): part.flatten(1)[:, :6].float() for part in (images, train, held_out)}
    monkeypatch.setattr(copies, "extract", lambda part, *_: features[len(part)])
    monkeypatch.setattr(copies, "CANDIDATES", 6)  # too few to prove that nothing nearer was missed
    results = []
    for device in ("cpu", "cuda"):
        extractor = SimpleNamespace(device=torch.device(device))
        with Pretending():
            results.append(copies.find_copies(images, train, held_out, extractor))
    (expected, suspects), (found, others) = results
    assert close(expected, found) and found["pixels"]["identical"] == 10
    assert torch.equal(suspects.images, others.images) and suspects.rows == others.rows


def test_a_pretended_tensor_meets_no_other():
    with pytest.raises(RuntimeError, match="two devices"):
        torch.zeros(2).as_subclass(Pretended) + torch.zeros(2)
    assert torch.zeros(2).as_subclass(Pretended).device.type == "cuda"
