"""Pretrained models from a folder or an installed package, with a new head. Nothing is downloaded."""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import ClassVar, Literal, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional

from fedpriv.checks import positive_int
from fedpriv.data.files import local_path
from fedpriv.errors import UserError, require_extra
from fedpriv.plugins import line_of

__all__ = ["ImageBody", "TextEncoder"]


@dataclass(frozen=True, kw_only=True)
class TextEncoder:
    """A pretrained encoder of transformers with a linear head on the mean over tokens; inputs are numbers of tokens.

    Args:
        folder: Folder of `save_pretrained`, with `config.json` and `model.safetensors`; from the current directory, or
            from the package's folder.
        package: Import name of an installed package that holds the folder; None for none.
        padding: Number of the token that fills up shorter texts, and does not count.
    """

    dense: ClassVar[bool] = False
    folder: str
    package: str | None = None
    padding: int = 0

    def parameters(self, input_shape: tuple[int, ...], classes: int) -> int:
        """See `ModelSource.parameters`; read from the files' headers, with all tensors of the folder."""
        place = local_path("model.folder", self.folder, self.package)
        try:
            width: int = json.loads((place / "config.json").read_text(encoding="utf-8"))["hidden_size"]
            stored = sum(_floats_of(file) for file in place.glob("*.safetensors"))
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            expected, got = "a folder of save_pretrained with safetensors", line_of(error, TextEncoder)
            raise UserError("model.folder", expected, got, "Name another folder") from None
        return stored + classes * (width + 1)

    def build(self, input_shape: tuple[int, ...], classes: int, seed: int) -> nn.Module:
        """See `ModelSource.build`."""
        if len(input_shape) != 1:
            expected, got = "inputs [tokens] for 'text-encoder'", f"inputs of shape {list(input_shape)}"
            raise UserError("model.name", expected, got, 'Choose data such as data.name = "text"')
        place = local_path("model.folder", self.folder, self.package)
        require_extra('model.name = "text-encoder"', "adapters", ["transformers"])
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.default_generator.manual_seed(seed)
            return _Text(_loaded_encoder(place), classes, self.padding, input_shape[0])


def _floats_of(file: Path) -> int:
    with safe_open(file, "pt") as tensors:
        return sum(prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118


def _loaded_encoder(place: Path) -> nn.Module:
    from transformers.models.auto.modeling_auto import AutoModel
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        found = AutoModel.from_pretrained(place, local_files_only=True, use_safetensors=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        expected, got = "a folder of save_pretrained with safetensors", line_of(error, AutoModel)
        raise UserError("model.folder", expected, got, "Name another folder") from None
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
    return found.float().eval()


class _Text(nn.Module):
    """Tokens `[batch, length]` to logits. Between stages, the last number of each token is 1, or 0 for padding."""

    def __init__(self, body: nn.Module, classes: int, padding: int, length: int) -> None:
        super().__init__()
        self.body, self.padding = body, padding
        self.head = nn.Linear(cast(int, cast(nn.Module, body.config).hidden_size), classes)
        self.in_stages = False
        self.in_stages = self._fits_stages(length)

    @property
    def stages(self) -> tuple[nn.Module, ...]:
        """The embeddings, each layer, and the head; none if the encoder is of another form than BERT."""
        if not self.in_stages:
            return ()
        layers = cast(Sequence[nn.Module], self.body.encoder.layer)  # pyright: ignore[reportAttributeAccessIssue]
        embeddings = cast(nn.Module, self.body.embeddings)
        return (_Embedded(embeddings, self.padding), *map(_Encoded, layers), _Pooled(self.head))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits `[batch, classes]`."""
        if self.in_stages:
            for stage in self.stages:
                inputs = stage(inputs)
            return inputs
        return self.head(_mean(self._states(inputs)))

    def _states(self, inputs: Tensor) -> Tensor:
        tokens = inputs.long()
        mask = tokens != self.padding
        found = self.body(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        return torch.cat([found, mask.to(found.dtype)[..., None]], dim=-1)

    def _fits_stages(self, length: int) -> bool:
        """Return True if the layers, called one after the other, are the whole encoder."""
        layers = getattr(getattr(self.body, "encoder", None), "layer", None)
        if layers is None or not hasattr(self.body, "embeddings"):
            return False
        tokens = torch.full((2, length), float(self.padding))
        tokens[0, : length - length // 3] = self.padding + 1
        tokens[1, : length // 2 + 1] = self.padding + 2
        try:
            with torch.no_grad():
                found = _Embedded(cast(nn.Module, self.body.embeddings), self.padding)(tokens)
                for layer in cast(Sequence[nn.Module], layers):
                    found = _Encoded(layer)(found)
                return torch.allclose(_mean(found), _mean(self._states(tokens)), rtol=1e-4, atol=1e-5)
        except (TypeError, RuntimeError, ValueError):
            return False


class _Embedded(nn.Module):
    def __init__(self, embeddings: nn.Module, padding: int) -> None:
        super().__init__()
        self.embeddings, self.padding = embeddings, padding

    def forward(self, inputs: Tensor) -> Tensor:
        tokens = inputs.long()
        found = self.embeddings(input_ids=tokens)
        return torch.cat([found, (tokens != self.padding).to(found.dtype)[..., None]], dim=-1)


class _Encoded(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, values: Tensor) -> Tensor:
        states, mask = values[..., :-1], values[..., -1]
        excluded = (1.0 - mask)[:, None, None, :] * torch.finfo(states.dtype).min
        found = self.layer(states, excluded)
        found = found[0] if isinstance(found, tuple) else found
        return torch.cat([found, mask[..., None]], dim=-1)


class _Pooled(nn.Module):
    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, values: Tensor) -> Tensor:
        return self.head(_mean(values))


def _mean(values: Tensor) -> Tensor:
    """Return the mean over tokens that are no padding."""
    states, mask = values[..., :-1], values[..., -1:]
    return (states * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1.0)


@dataclass(frozen=True, kw_only=True)
class ImageBody:
    """A network of timm for images, in evaluation mode, with a linear head on its features.

    Args:
        architecture: Name of the network in timm.
        weights: File of its pretrained weights (safetensors, or a PyTorch file of tensors); None for random ones.
        package: Import name of an installed package that holds the file; None for a path from the current directory.
        match: `names`, or `order` for a PyTorch file with other names for the same tensors in the same order.
        size: Images are enlarged to this side; None to leave them.
    """

    dense: ClassVar[bool] = False
    architecture: str
    weights: str | None = None
    package: str | None = None
    match: Literal["names", "order"] = "names"
    size: int | None = None

    def __post_init__(self) -> None:
        if self.size is not None:
            positive_int("model.size", self.size)

    def parameters(self, input_shape: tuple[int, ...], classes: int) -> int:
        """See `ModelSource.parameters`."""
        return sum(parameter.numel() for parameter in self.build(input_shape, classes, 0).parameters())

    def build(self, input_shape: tuple[int, ...], classes: int, seed: int) -> nn.Module:
        """See `ModelSource.build`."""
        if len(input_shape) != 3:
            expected, got = "inputs [channels, height, width] for 'timm'", f"inputs of shape {list(input_shape)}"
            raise UserError("model.name", expected, got, "Choose data of images")
        require_extra('model.name = "timm"', "timm")
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.default_generator.manual_seed(seed)
            body = self._body(input_shape[0])
            if self.weights is not None:
                self._load(body, local_path("model.weights", self.weights, self.package))
            body.reset_classifier(0)  # pyright: ignore[reportCallIssue]
            return _Image(body.eval(), classes, self.size, input_shape)

    def _body(self, channels: int) -> nn.Module:
        import timm

        try:
            return timm.create_model(self.architecture, pretrained=False, in_chans=channels)
        except (RuntimeError, TypeError, ValueError) as error:
            got = line_of(error, timm.create_model)
            raise UserError("model.architecture", "a network of timm", got, "See timm.list_models()") from None

    def _load(self, body: nn.Module, file: Path) -> None:
        """Replace the weights by those of a file, with their own head."""
        found, own = _tensors_of(file), body.state_dict()
        if self.match == "order":
            found = dict(zip(own, found.values(), strict=False)) if len(found) == len(own) else found
        wrong = [name for name in own if name not in found or found[name].shape != own[name].shape]
        if wrong or len(found) != len(own):
            expected = f"{len(own)} tensors of {self.architecture}"
            got = f"{len(found)}, of which {wrong[0] if wrong else 'some'} does not fit"
            raise UserError("model.weights", expected, got, 'Correct it, or try match = "order"')
        body.load_state_dict(found)


def _tensors_of(file: Path) -> Mapping[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        got = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError("model.weights", "a file of named tensors", got, "Name another file") from None


class _Image(nn.Module):
    """Images to logits: features of the body, then the head."""

    def __init__(self, body: nn.Module, classes: int, size: int | None, input_shape: Sequence[int]) -> None:
        super().__init__()
        self.body, self.size = body, size
        with torch.no_grad():
            width = _Features(body, size)(torch.zeros(1, *input_shape)).shape[1]
        self.head = nn.Linear(width, classes)

    @property
    def stages(self) -> tuple[nn.Module, ...]:
        """The body, and the head."""
        return _Features(self.body, self.size), self.head

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits `[batch, classes]`."""
        return self.head(self.stages[0](inputs))


class _Features(nn.Module):
    def __init__(self, body: nn.Module, size: int | None) -> None:
        super().__init__()
        self.body, self.size = body, size

    def forward(self, inputs: Tensor) -> Tensor:
        if self.size is not None:
            inputs = functional.interpolate(inputs, size=(self.size, self.size), mode="bilinear", antialias=False)
        return self.body(inputs)
