"""Augmentations: random variants of clients' training inputs in each round.

The draws of an example depend only on the experiment's seed, the round, the client and the position of the example
among the client's own. So all engines see the same variants, and an example has one variant in all steps of a round.
Test and validation inputs stay as they are.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fedpriv.checks import real_within, whole_within
from fedpriv.errors import UserError
from fedpriv.plugins import Registry, line_of, settings_of
from fedpriv.streams import Purpose, SeededStreams

__all__ = ["AUGMENTATIONS", "Augmentation", "ImageVariants", "OwnAugmentation", "augmented", "draws_of"]

_KEY = "augment.name"


class Augmentation(Protocol):
    """A random change of single inputs; read from the table `[augment]`."""

    @property
    def numbers(self) -> int:
        """Number of uniform random numbers for each example, at least 1."""
        ...

    def check(self, input_shape: Sequence[int]) -> None:
        """Raise UserError if it is undefined for inputs of shape `[*input_shape]`.

        Raises:
            UserError: Names a key of `[augment]`.
        """
        ...

    def apply(self, inputs: Tensor, uniform: np.ndarray) -> Tensor:
        """Return a variant of each input as a new tensor of the same shape; leaves the argument unchanged.

        Args:
            inputs: float32 `[examples, *input_shape]`, on any device.
            uniform: Independent uniform numbers in [0, 1), float64 `[examples, numbers]`: the only source of
                randomness. A row decides the variant of one input.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class ImageVariants:
    """Images flipped, moved and rotated at random; all images of a batch are computed at once.

    Args:
        flip: Flip each image from left to right with probability 1/2.
        crop: Pad images with this many zeros on each side, and cut out a piece of the former size at random.
        rotate: Largest angle of a random rotation, in degrees, 0 to 180; bilinear, and pixels from beyond the border
            repeat the nearest border pixel.

    Raises:
        UserError: If a value is out of range, or nothing is to be done.
    """

    flip: bool = False
    crop: int = 0
    rotate: float = 0.0

    def __post_init__(self) -> None:
        whole_within("augment.crop", self.crop, 0, 10_000, "Give a number of pixels such as 4")
        real_within("augment.rotate", self.rotate, 0, 180)
        if not (self.flip or self.crop or self.rotate):
            remedy = "Set flip = true, crop = 4 or rotate = 10.0, or remove [augment]"
            raise UserError("[augment]", "at least one change", "a table without any", remedy)

    @property
    def numbers(self) -> int:
        """See `Augmentation.numbers`: a flip, two shifts and an angle."""
        return 4

    def check(self, input_shape: Sequence[int]) -> None:
        """See `Augmentation.check`: only images `[channels, height, width]`."""
        if len(input_shape) != 3:
            expected, remedy = "images [channels, height, width]", "Remove [augment], or name a transform of your own"
            raise UserError(_KEY, expected, f"inputs of shape {list(input_shape)}", remedy)
        if self.crop >= min(input_shape[1:]):
            expected, remedy = f"fewer pixels than images have, {min(input_shape[1:])}", "Lower it"
            raise UserError("augment.crop", expected, self.crop, remedy)

    def apply(self, inputs: Tensor, uniform: np.ndarray) -> Tensor:
        """See `Augmentation.apply`."""
        made, numbers = inputs, torch.from_numpy(uniform).to(inputs.device)
        if self.flip:
            made = torch.where((numbers[:, 0] < 0.5)[:, None, None, None], made.flip(-1), made)
        if self.crop:
            made = _moved(made, (numbers[:, 1:3] * (2 * self.crop + 1)).long(), self.crop)
        if self.rotate:
            made = _turned(made, torch.deg2rad((2.0 * numbers[:, 3] - 1.0) * self.rotate))
        return made.clone() if made is inputs else made


@dataclass(frozen=True, kw_only=True)
class OwnAugmentation:
    """Base of the settings of a transform. The class that `of` returns has the transform's parameters as fields.

    A transform maps one input `[*input_shape]` to another of the same shape. It runs example by example, each time with
    the seed of torch set from the example's number: some tenths of a millisecond for each example.
    """

    called: ClassVar[Callable[..., Callable[[Tensor], object]]]
    asked: ClassVar[tuple[str, ...]]

    @staticmethod
    def of(found: object, where: str, name: str) -> "type[OwnAugmentation]":
        """Return the settings of a transform's class, or of a function that returns one; see `plugins.Registry`."""
        if not callable(found):
            remedy = "Name the class of a transform, or a function that returns one"
            raise UserError(where, "a class or a function", f"{name!r}, which is a {type(found).__name__}", remedy)
        return settings_of(OwnAugmentation, found, where, given=(), reserved=("name",), optional=True)

    @property
    def numbers(self) -> int:
        """See `Augmentation.numbers`: a seed."""
        return 1

    def check(self, input_shape: Sequence[int]) -> None:
        """See `Augmentation.check`: transforms an input twice, with one seed.

        Raises:
            UserError: If it raises an exception, returns another shape or type, or draws from another generator.
        """
        example = torch.linspace(0.0, 1.0, math.prod(input_shape)).reshape(1, *input_shape)
        one, other = (self.apply(example, np.full((1, 1), 0.5)) for _ in range(2))
        if not torch.equal(one, other):
            got, remedy = "two results for one seed", "Draw with torch, without a generator of your own"
            raise UserError(_KEY, "a transform that draws from torch's generator alone", got, remedy)

    def apply(self, inputs: Tensor, uniform: np.ndarray) -> Tensor:
        """See `Augmentation.apply`.

        Raises:
            UserError: If the transform raises an exception, or returns another shape or type.
        """
        made = torch.empty_like(inputs)
        with torch.random.fork_rng(devices=[]):
            for at, seed in enumerate((uniform[:, 0] * 2**53).astype(np.int64).tolist()):
                torch.default_generator.manual_seed(seed)
                made[at] = self._of_one(inputs[at].clone())
        return made

    def _of_one(self, example: Tensor) -> Tensor:
        try:
            found = self._transform(example)
        except Exception as error:
            got = line_of(error, type(self).called)
            raise UserError(_KEY, f"a transform of inputs {list(example.shape)}", got, "Correct it") from error
        if not isinstance(found, Tensor) or found.shape != example.shape or not found.is_floating_point():
            shape = f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
            expected = f"a transform that returns floats of shape {list(example.shape)}"
            raise UserError(_KEY, expected, shape, "Correct the transform, or its keys in [augment]")
        return found

    @cached_property
    def _transform(self) -> Callable[[Tensor], object]:
        try:
            return type(self).called(**{field.name: getattr(self, field.name) for field in fields(self)})
        except Exception as error:
            got = line_of(error, type(self).called)
            raise UserError(_KEY, "a transform that can be made", got, "Correct its keys in [augment]") from error


AUGMENTATIONS: Registry[Augmentation] = Registry(
    "augmentation",
    {"images": ImageVariants},
    protocol=Augmentation,
    group="fedpriv.augmentations",
    wrap="fedpriv.data.augment:OwnAugmentation",
)


def draws_of(augment: Augmentation, streams: SeededStreams, examples: int, round: int, client: int) -> np.ndarray:
    """Return the draws of each of a client's examples in a round, float64 `[examples, numbers]`."""
    rng = streams.source(Purpose.AUGMENTATION, round, client).rng
    return rng.random((examples, augment.numbers))


def augmented(augment: Augmentation, inputs: Tensor, draws: np.ndarray, used: Sequence[np.ndarray | None]) -> Tensor:
    """Return a client's inputs, of which those that a step uses are augmented.

    Args:
        augment: The augmentation.
        inputs: All inputs of the client, `[examples, *input_shape]`.
        draws: See `draws_of`.
        used: The examples of each step, as positions; None for all of them.
    """
    if any(positions is None for positions in used):
        return augment.apply(inputs, draws)
    at = np.unique(np.concatenate([positions for positions in used if positions is not None]))
    made = inputs.clone()
    made[at] = augment.apply(inputs[at], draws[at])
    return made


def _moved(images: Tensor, starts: Tensor, margin: int) -> Tensor:
    """Return a piece of each padded image, `[examples, channels, height, width]`; `starts` is `[examples, 2]`."""
    examples, channels, height, width = images.shape
    padded = functional.pad(images, (margin,) * 4)
    rows = starts[:, :1] + torch.arange(height, device=images.device)
    columns = starts[:, 1:] + torch.arange(width, device=images.device)
    each = torch.arange(examples, device=images.device)[:, None, None, None]
    channel = torch.arange(channels, device=images.device)[None, :, None, None]
    return padded[each, channel, rows[:, None, :, None], columns[:, None, None, :]]


def _turned(images: Tensor, angles: Tensor) -> Tensor:
    """Rotate each image counterclockwise about its center by its angle (radians), bilinearly.

    Coordinates are computed number by number, without a matrix product, so that they do not depend on the batch.
    """
    height, width = images.shape[2:]
    cos, sin = (value.float()[:, None, None] for value in (torch.cos(angles), torch.sin(angles)))
    # Coordinates run from -1 to 1 along each side, regardless of its length.
    y, x = (((2 * torch.arange(size, device=images.device) + 1) / size - 1).float() for size in (height, width))
    y, x = y[None, :, None], x[None, None, :]
    grid = torch.stack([cos * x - sin * (height / width) * y, sin * (width / height) * x + cos * y], dim=-1)
    return functional.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
