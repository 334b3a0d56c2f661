"""Convolutions that turn with the image: the group C4 of rotations by a quarter turn.

An input turned by 90 degrees gives turned feature maps with their four orientations shifted by one, exactly. A kernel
is stored once and used in four orientations, so that a network needs a quarter of the parameters of one that learns
each orientation by itself; and the noise of a private message grows with the number of parameters. Sources: Cohen and
Welling, Group Equivariant Convolutional Networks, ICML 2016; under privacy: Hoelzl, Rueckert and Kaissis,
arXiv:2301.13104.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["ORIENTATIONS", "GroupConv", "LiftingConv", "OrientedNorm", "pooled"]

ORIENTATIONS = 4


class LiftingConv(nn.Module):
    """A convolution of an image `[n, before, h, w]` to feature maps in four orientations `[n, after * 4, h, w]`.

    Args:
        before: Channels of the image.
        after: Number of kernels.
        kernel: Odd side of a kernel; the image is padded with zeros.
    """

    def __init__(self, before: int, after: int, kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(_drawn(after, before, kernel, kernel, fan_in=before * kernel**2))

    def forward(self, inputs: Tensor) -> Tensor:
        """Convolve with every kernel in every orientation."""
        turned = torch.stack([torch.rot90(self.weight, turn, (-2, -1)) for turn in range(ORIENTATIONS)], dim=1)
        return functional.conv2d(inputs, turned.flatten(0, 1), padding=self.weight.shape[-1] // 2)


class GroupConv(nn.Module):
    """A convolution of feature maps in four orientations, `[n, before * 4, h, w]` to `[n, after * 4, h, w]`.

    Args:
        before: Number of maps, each in four orientations.
        after: Number of kernels.
        kernel: Odd side of a kernel; maps are padded with zeros.
    """

    def __init__(self, before: int, after: int, kernel: int) -> None:
        super().__init__()
        fan_in = before * ORIENTATIONS * kernel**2
        self.weight = nn.Parameter(_drawn(after, before, ORIENTATIONS, kernel, kernel, fan_in=fan_in))

    def forward(self, inputs: Tensor) -> Tensor:
        """Convolve with every kernel in every rotation, its orientations shifted accordingly."""
        turned = [
            torch.rot90(self.weight, turn, (-2, -1)).roll(turn, dims=2).flatten(1, 2) for turn in range(ORIENTATIONS)
        ]
        weight = torch.stack(turned, dim=1).flatten(0, 1)
        return functional.conv2d(inputs, weight, padding=self.weight.shape[-1] // 2)


class OrientedNorm(nn.Module):
    """Group normalization of maps in four orientations; the orientations of a map share scale and shift.

    Args:
        maps: Number of maps; each forms one group with its four orientations.
    """

    def __init__(self, maps: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(maps)), nn.Parameter(torch.zeros(maps))

    def forward(self, inputs: Tensor) -> Tensor:
        """Normalize each example's maps; `[n, maps * 4, h, w]` as given."""
        weight, bias = (part.repeat_interleave(ORIENTATIONS) for part in (self.weight, self.bias))
        return functional.group_norm(inputs, len(self.weight), weight, bias)


def pooled(maps: Tensor) -> Tensor:
    """Return the maxima of symmetrically placed windows, so that turned maps give turned maxima; sides are halved.

    Args:
        maps: `[n, channels, h, w]`, both sides at least 2.
    """
    kernel = [2 if side % 2 == 0 else 3 for side in maps.shape[-2:]]
    return functional.max_pool2d(maps, kernel, stride=2)


def _drawn(*shape: int, fan_in: int) -> Tensor:
    """Draw weights for ReLU, of variance 2 / fan_in (He et al. 2015); draw nothing on the meta device."""
    made = torch.empty(*shape)
    return made if made.is_meta else made.normal_(0.0, (2.0 / fan_in) ** 0.5)
