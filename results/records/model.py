"""The study's network: two convolutions with stride, then a dense layer; 1,890 parameters on `[3, 16, 16]`."""

from torch import nn


class SmallCnn(nn.Sequential):
    """Two convolutions that halve the image, with ReLU, and a dense layer. No normalization, no pooling."""

    def __init__(self, width: int = 4) -> None:
        super().__init__(
            nn.Conv2d(3, width, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2 * width * 4 * 4, 10),
        )
