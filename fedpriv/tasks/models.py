"""Models: frozen settings that build a torch module for given inputs, the same parameters for the same seed.

No model has buffers (no batch statistics): everything it learns is in its parameters. Rounds exchange nothing else,
and the privacy statement covers nothing else.
"""

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedpriv.checks import positive_int
from fedpriv.errors import UserError
from fedpriv.plugins import Registry
from fedpriv.tasks.convolution import DirectConv2d
from fedpriv.tasks.equivariant import ORIENTATIONS, GroupConv, LiftingConv, OrientedNorm, pooled
from fedpriv.tasks.pooling import MaxPoolReLU

__all__ = ["MODELS", "C4Cnn", "Cnn", "Mlp", "ModelSource", "ResNet20", "Softmax"]


# A layer takes time and memory however few parameters it has.
_MAX_LAYERS = 1000
_MAX_DIRECT_WIDTH = 8


class ModelSource(Protocol):
    """Settings of a model; filled from the table `[model]`. `dense` is True if it has dense layers alone."""

    dense: ClassVar[bool]

    def parameters(self, input_shape: tuple[int, ...], classes: int) -> int:
        """Return the number of parameters of the module that `build` makes, without allocating them.

        Args:
            input_shape: Shape of one input.
            classes: Number of labels.

        Raises:
            UserError: If the model does not fit such inputs.
        """
        ...

    def build(self, input_shape: tuple[int, ...], classes: int, seed: int) -> nn.Module:
        """Return a module from `[batch, *input_shape]` to logits `[batch, classes]`, on the CPU, float32.

        Args:
            input_shape: Shape of one input.
            classes: Number of labels.
            seed: Decides the first weights and nothing else. The global generators are neither read nor changed.

        Raises:
            UserError: If the model does not fit such inputs.
        """
        ...


class _Made:
    """Base of frozen settings with `_make`, which returns a module on torch's default device."""

    def _make(self, input_shape: tuple[int, ...], classes: int) -> nn.Module:
        raise NotImplementedError

    def parameters(self, input_shape: tuple[int, ...], classes: int) -> int:
        """See `ModelSource.parameters`."""
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in self._make(input_shape, classes).parameters())

    def build(self, input_shape: tuple[int, ...], classes: int, seed: int) -> nn.Module:
        """See `ModelSource.build`. No generator is changed."""
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(seed)
            return self._make(input_shape, classes)


@dataclass(frozen=True, kw_only=True)
class Softmax(_Made):
    """Multinomial logistic regression, started at zero: a convex problem, the same start for every seed."""

    dense: ClassVar[bool] = True

    def _make(self, input_shape: tuple[int, ...], classes: int) -> nn.Module:
        module = nn.Sequential(nn.Flatten(), nn.Linear(_size(input_shape), classes))
        for parameter in module.parameters():
            nn.init.zeros_(parameter)
        return module


@dataclass(frozen=True, kw_only=True)
class Mlp(_Made):
    """Dense layers with ReLU between them.

    Args:
        hidden: Widths of the hidden layers, at most 1,000 of them.

    Raises:
        UserError: If a width is not a positive whole number, or there are too many.
    """

    dense: ClassVar[bool] = True
    hidden: tuple[int, ...] = (64,)

    def __post_init__(self) -> None:
        if not isinstance(self.hidden, Sequence) or isinstance(self.hidden, str):
            raise UserError("model.hidden", "a list of widths", repr(self.hidden), "Write it as [64] or [128, 64]")
        if len(self.hidden) > _MAX_LAYERS:
            raise UserError("model.hidden", f"at most {_MAX_LAYERS:,} widths", f"{len(self.hidden):,}", "Shorten it")
        for width in self.hidden:
            positive_int("model.hidden", width)
        object.__setattr__(self, "hidden", tuple(self.hidden))

    def _make(self, input_shape: tuple[int, ...], classes: int) -> nn.Module:
        return _dense_layers(_size(input_shape), self.hidden, classes)


@dataclass(frozen=True, kw_only=True)
class Cnn(_Made):
    """A LeNet: two 5x5 convolutions with ReLU and 2x2 max-pooling, then two dense layers.

    With the default width it has 61,794 parameters on `[3, 32, 32]` and 10 classes, about LeNet-5's 62,006.
    It takes any number of channels and any sides from 4. Source: LeCun et al. 1998, with padding instead of a
    fixed input size.

    Args:
        width: Channels of the first convolution; the second has twice, the dense layer seven times as many.

    Raises:
        UserError: If `width` is not a positive whole number.
    """

    dense: ClassVar[bool] = False
    width: int = 8

    def __post_init__(self) -> None:
        positive_int("model.width", self.width)

    def _make(self, input_shape: tuple[int, ...], classes: int) -> nn.Module:
        channels, height, sides = _image("cnn", input_shape)
        pixels = (height // 4) * (sides // 4)
        return _lenet(channels, pixels, self.width, classes)


@dataclass(frozen=True, kw_only=True)
class ResNet20(_Made):
    """The CIFAR ResNet of 20 layers with group instead of batch normalization.

    269,722 parameters on CIFAR-10. Shortcuts between stages drop every second pixel and add zero channels
    (option A), so they have no parameters. Sources: He et al., arXiv:1512.03385, section 4.2;
    Wu and He, Group Normalization, arXiv:1803.08494.
    """

    dense: ClassVar[bool] = False

    def _make(self, input_shape: tuple[int, ...], classes: int) -> nn.Module:
        channels, _, _ = _image("resnet20", input_shape)
        return _resnet20(channels, classes)


@dataclass(frozen=True, kw_only=True)
class C4Cnn(_Made):
    """A small network that ignores rotation: an image turned by 90 degrees has the same logits.

    Three convolutions over the rotations by quarter turns with group normalization, ReLU and max-pooling, then the
    maximum over orientations, the mean over places and a dense layer. 14,674 parameters on `[3, 32, 32]` and 10
    classes. It cannot distinguish images that differ by a turn alone (6 and 9). See
    `fedpriv.tasks.equivariant`.

    Args:
        width: Maps of the first convolution, each in four orientations; the others have twice as many.

    Raises:
        UserError: If `width` is not a positive whole number.
    """

    dense: ClassVar[bool] = False
    width: int = 8

    def __post_init__(self) -> None:
        positive_int("model.width", self.width)

    def _make(self, input_shape: tuple[int, ...], classes: int) -> nn.Module:
        channels, _, _ = _image("c4-cnn", input_shape)
        return _C4Network(channels, self.width, classes)


MODELS: Registry[ModelSource] = Registry(
    "model",
    {
        "softmax": Softmax,
        "mlp": Mlp,
        "cnn": Cnn,
        "resnet20": ResNet20,
        "c4-cnn": C4Cnn,
        "statistics": "fedpriv.analytics.statistics:Statistics",
        "text-encoder": "fedpriv.tasks.adapters.pretrained:TextEncoder",
        "timm": "fedpriv.tasks.adapters.pretrained:ImageBody",
    },
    protocol=ModelSource,
    group="fedpriv.models",
    wrap="fedpriv.tasks.own:OwnModule",
    hidden=("statistics",),
)


def _size(input_shape: tuple[int, ...]) -> int:
    return torch.Size(input_shape).numel()


def _image(model: str, input_shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Return channels, height and width, or raise UserError if the inputs are no images."""
    if len(input_shape) != 3 or min(input_shape[1:]) < 4:
        expected = f"inputs [channels, height, width] with sides of at least 4 for {model!r}"
        remedy = "Choose 'softmax' or 'mlp', or a dataset of images"
        raise UserError("model.name", expected, f"inputs of shape {list(input_shape)}", remedy)
    channels, height, width = input_shape
    return channels, height, width


def _dense_layers(inputs: int, hidden: tuple[int, ...], classes: int) -> nn.Module:
    widths = (inputs, *hidden)
    layers: list[nn.Module] = [nn.Flatten()]
    for i, width in enumerate(hidden):
        layers += [nn.Linear(widths[i], width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], classes))


def _lenet(channels: int, pixels: int, width: int, classes: int) -> nn.Module:
    # Up to this width all convolutions are faster in C, and beyond it none.
    conv = partial(DirectConv2d if width <= _MAX_DIRECT_WIDTH else nn.Conv2d, kernel_size=5, padding=2)
    layers = {
        0: conv(channels, width),
        1: MaxPoolReLU(),  # pooling first: the same numbers and gradients as after ReLU, from a quarter of the elements
        3: conv(width, 2 * width),
        4: MaxPoolReLU(),
        6: nn.Flatten(),
        7: nn.Linear(2 * width * pixels, 7 * width),
        8: nn.ReLU(),
        9: nn.Linear(7 * width, classes),
    }
    return nn.Sequential(OrderedDict((str(name), layer) for name, layer in layers.items()))


def _resnet20(channels: int, classes: int) -> nn.Module:
    widths = [16] * 4 + [32] * 3 + [64] * 3
    blocks = [_Block(before, after) for before, after in itertools.pairwise(widths)]
    stem = [_conv3x3(channels, 16, stride=1), _norm(16), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes))


def _conv3x3(before: int, after: int, stride: int) -> nn.Conv2d:
    conv = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
    if not conv.weight.is_meta:  # nothing to draw; torch would spend seconds on imports for it
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(8, channels)


class _C4Network(nn.Module):
    def __init__(self, channels: int, width: int, classes: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = LiftingConv(channels, width, 5), OrientedNorm(width)
        self.conv2, self.norm2 = GroupConv(width, 2 * width, 3), OrientedNorm(2 * width)
        self.conv3, self.norm3 = GroupConv(2 * width, 2 * width, 3), OrientedNorm(2 * width)
        self.last = nn.Linear(2 * width, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        maps = pooled(self.norm1(self.conv1(inputs)).relu())
        maps = pooled(self.norm2(self.conv2(maps)).relu())
        maps = self.norm3(self.conv3(maps)).relu()
        return self.last(maps.mean(dim=(-2, -1)).unflatten(1, (-1, ORIENTATIONS)).amax(dim=2))


class _Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut without parameters."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.stride = 1 if before == after else 2
        self.added_channels = after - before
        self.conv1, self.norm1 = _conv3x3(before, after, self.stride), _norm(after)
        self.conv2, self.norm2 = _conv3x3(after, after, 1), _norm(after)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `[batch, before, h, w]` to `[batch, after, h / stride, w / stride]`."""
        inner = functional.relu(self.norm1(self.conv1(x)))
        kept = x[:, :, :: self.stride, :: self.stride]
        shortcut = functional.pad(kept, (0, 0, 0, 0, 0, self.added_channels))
        return functional.relu(self.norm2(self.conv2(inner)) + shortcut)
