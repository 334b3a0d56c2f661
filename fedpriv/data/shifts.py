"""Feature shifts: clients' inputs look different, while labels keep their meaning.

A client's shift depends only on the experiment's seed and the client's number. It is applied once, when the data are
distributed, so all engines see the same inputs. Only training inputs are shifted. Test and validation inputs stay
unchanged, so accuracy is measured on inputs that belong to no particular client.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fedpriv.checks import real_within
from fedpriv.errors import UserError
from fedpriv.plugins import Registry

__all__ = ["SHIFTS", "NoiseLevels", "Rotation", "Shift", "Style"]


class Shift(Protocol):
    """A transformation of a client's inputs; read from the table `[data]`."""

    def check(self, input_shape: Sequence[int]) -> None:
        """Raise UserError if the shift is undefined for inputs of shape `[*input_shape]`.

        Raises:
            UserError: Names `data.shift`.
        """
        ...

    def apply(self, inputs: Tensor, rng: np.random.Generator) -> Tensor:
        """Return one client's inputs `[examples, *input_shape]`, shifted; leaves the argument unchanged.

        Args:
            inputs: float32, on the CPU.
            rng: The only source of randomness; equal states give equal shifts.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Rotation:
    """Images rotated by an angle per client, uniform between plus and minus `shift_angle`.

    Bilinear, about the center; pixels from beyond the border repeat the nearest border pixel. Source: Ghosh et al., An
    Efficient Framework for Clustered Federated Learning, NeurIPS 2020, with a continuum of angles instead of four.

    Args:
        shift_angle: Largest angle, in degrees, 0 to 180.

    Raises:
        UserError: If the angle is out of range.
    """

    shift_angle: float = 45.0

    def __post_init__(self) -> None:
        real_within("data.shift_angle", self.shift_angle, 0, 180)

    def check(self, input_shape: Sequence[int]) -> None:
        """See `Shift.check`: only images `[channels, height, width]`."""
        if len(input_shape) != 3:
            expected, remedy = "images [channels, height, width] for 'rotation'", "Choose 'noise' or 'style'"
            raise UserError("data.shift", expected, f"inputs of shape {list(input_shape)}", remedy)

    def apply(self, inputs: Tensor, rng: np.random.Generator) -> Tensor:
        """See `Shift.apply`."""
        return turned(inputs, rng.uniform(-self.shift_angle, self.shift_angle))


@dataclass(frozen=True, kw_only=True)
class NoiseLevels:
    """Fixed Gaussian noise on every input; each client's standard deviation is uniform from 0 to `shift_noise`.

    Source: Li, Diao, Chen and He, Federated Learning on Non-IID Data Silos: An Experimental Study, ICDE 2022, section
    IV.B, in which the variance grows from client to client.

    Args:
        shift_noise: Largest standard deviation, 0 to 100, in units of the inputs.

    Raises:
        UserError: If it is out of range.
    """

    shift_noise: float = 1.0

    def __post_init__(self) -> None:
        real_within("data.shift_noise", self.shift_noise, 0, 100)

    def check(self, input_shape: Sequence[int]) -> None:
        """See `Shift.check`: any inputs."""

    def apply(self, inputs: Tensor, rng: np.random.Generator) -> Tensor:
        """See `Shift.apply`."""
        deviation = rng.uniform(0.0, self.shift_noise)
        return inputs + deviation * torch.from_numpy(rng.standard_normal(inputs.shape, dtype=np.float32))


@dataclass(frozen=True, kw_only=True)
class Style:
    """Contrast and brightness per client and channel: x becomes gain * x + offset.

    For each client and channel, gain = exp(shift_contrast * z) and offset = shift_brightness * z', with z and z'
    standard normal. Inputs other than images `[channels, height, width]` have one channel. The shift represents
    different cameras and scanners, the feature shift of Li et al., FedBN, ICLR 2021.

    Args:
        shift_contrast: Standard deviation of a gain's logarithm, 0 to 2.
        shift_brightness: Standard deviation of an offset, 0 to 10, in units of the inputs.

    Raises:
        UserError: If a value is out of range.
    """

    shift_contrast: float = 0.3
    shift_brightness: float = 0.3

    def __post_init__(self) -> None:
        real_within("data.shift_contrast", self.shift_contrast, 0, 2)
        real_within("data.shift_brightness", self.shift_brightness, 0, 10)

    def check(self, input_shape: Sequence[int]) -> None:
        """See `Shift.check`: any inputs."""

    def apply(self, inputs: Tensor, rng: np.random.Generator) -> Tensor:
        """See `Shift.apply`."""
        shape = (inputs.shape[1], 1, 1) if inputs.dim() == 4 else (1,)
        gains, offsets = rng.standard_normal((2, *shape))
        gains, offsets = np.exp(self.shift_contrast * gains), self.shift_brightness * offsets
        return inputs * torch.from_numpy(gains).float() + torch.from_numpy(offsets).float()


SHIFTS: Registry[Shift] = Registry(
    "shift", {"rotation": Rotation, "noise": NoiseLevels, "style": Style}, protocol=Shift, group="fedpriv.shifts"
)


def turned(images: Tensor, degrees: float) -> Tensor:
    """Rotate images `[examples, channels, height, width]` counterclockwise about their center, bilinearly."""
    height, width = images.shape[2:]
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    # The grid's coordinates run from -1 to 1 along each side, regardless of its length.
    turn = torch.tensor([[[cos, -sin * height / width, 0.0], [sin * width / height, cos, 0.0]]])
    grid = functional.affine_grid(turn, [1, 1, height, width], align_corners=False)
    everywhere = grid.expand(len(images), -1, -1, -1)
    return functional.grid_sample(images, everywhere, mode="bilinear", padding_mode="border", align_corners=False)
