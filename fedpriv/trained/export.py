"""Export of a trained model to the formats of other programs, each with a model card."""

import contextlib
import io
import json
import re
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal, TypeVar, cast, get_args

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from fedpriv.checks import a_path, one_of
from fedpriv.errors import UserError, require_extra
from fedpriv.experiment.config import with_bare_names
from fedpriv.files import write_atomically
from fedpriv.tasks.adapters import AdaptedModule, Lora, adapter_tensors, lora_layers, merged
from fedpriv.trained.card import model_card
from fedpriv.trained.module import Trained, adapter_of, load_trained
from fedpriv.vectors import trainable

__all__ = ["FORMATS", "Format", "export_model", "is_plain", "transformers_part"]

T = TypeVar("T")

Format = Literal["state-dict", "safetensors", "torch-export", "onnx", "hf", "peft"]
"""`state-dict` and `safetensors` hold the weights; `torch-export` and `onnx` the whole model, without its Python code;
`hf` is a folder for the Hugging Face Hub; `peft` holds the adapters alone. All others have adapters merged."""

FORMATS: tuple[Format, ...] = get_args(Format)

_CARD, _FACTS = "README.md", "model.json"


def export_model(
    run: Path | str,
    to: Format,
    out: Path | str | None = None,
    *,
    module: nn.Module | None = None,
    data_root: Path | None = None,
) -> Path:
    """Write the trained model of a run in another format, beside a model card `README.md` and `model.json`.

    Args:
        run: The run directory.
        to: The format; one of `FORMATS`.
        out: A new or empty folder; None for one beside the run directory, `RUN-FORMAT`.
        module: See `fedpriv.load_module`.
        data_root: See `fedpriv.load_module`.

    Returns:
        The file with the model.

    Raises:
        UserError: If the format is unknown or needs an extra, the folder is not empty, or the model does not fit the
            format.
    """
    one_of("--to", to, FORMATS)
    if to == "onnx":
        require_extra("--to onnx", "onnx")
    folder = a_path("out", out) if out is not None else Path(f"{a_path('run', run)}-{to}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError("--out", "a new or empty folder", str(folder), "Choose another --out, or remove it")
    trained = load_trained(run, module=module, data_root=data_root)
    if to != "peft" and isinstance(trained.module, AdaptedModule):
        trained = replace(trained, module=merged(trained.module))
    files, main, how = _WRITERS[to](trained)
    files[_CARD] = model_card(trained, main, how).encode()
    files[_FACTS] = (json.dumps(trained.facts, indent=2) + "\n").encode()
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_atomically(folder / name, content)
    return folder / main


_Written = tuple[dict[str, bytes], str, str]
"""The files by name, the name of the one with the model, and Python code that loads it."""


def is_plain(folder: Path) -> bool:
    """Return True if an exported folder of the format `hf` holds a model that `transformers` does not know."""
    return "model_type" not in json.loads((folder / "config.json").read_text(encoding="utf-8"))


def transformers_part(module: nn.Module) -> nn.Module | None:
    """Return the pretrained model of `transformers` that holds all tensors of a module; None if there is none."""
    library = sys.modules.get("transformers")
    kind = None if library is None else library.PreTrainedModel
    if kind is None:
        return None
    size, parts = len(module.state_dict()), module.modules()
    return next((part for part in parts if isinstance(part, kind) and len(part.state_dict()) == size), None)


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in module.state_dict().items()}


def _as_state_dict(trained: Trained) -> _Written:
    file = io.BytesIO()
    torch.save(_state(trained.module), file)
    how = 'net.load_state_dict(torch.load("model.pt", weights_only=True))  # net: the model named above'
    return {"model.pt": file.getvalue()}, "model.pt", how


def _as_safetensors(trained: Trained) -> _Written:
    how = 'net.load_state_dict(safetensors.torch.load_file("model.safetensors"))  # net: the model named above'
    content = safetensors_bytes(_state(trained.module), metadata={"format": "pt"})
    return {"model.safetensors": content}, "model.safetensors", how


def _as_torch_export(trained: Trained) -> _Written:
    program = _understood("torch-export", lambda: _exported(trained))
    file = io.BytesIO()
    torch.export.save(program, file)
    return {"model.pt2": file.getvalue()}, "model.pt2", 'net = torch.export.load("model.pt2").module()'


def _exported(trained: Trained) -> torch.export.ExportedProgram:
    example = torch.zeros(2, *trained.input_shape)
    return torch.export.export(trained.module, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))


def _as_onnx(trained: Trained) -> _Written:
    def written() -> bytes:
        program = torch.onnx.export(
            _exported(trained), input_names=["inputs"], output_names=["outputs"], dynamo=True, verbose=False
        )
        assert program is not None
        return program.model_proto.SerializeToString()

    how = 'outputs = onnxruntime.InferenceSession("model.onnx").run(None, {"inputs": inputs})[0]'
    return {"model.onnx": _understood("onnx", written)}, "model.onnx", how


def _understood(to: str, make: Callable[[], T]) -> T:
    """Return what `make` returns, silently; raise UserError if torch cannot translate the model."""
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            return make()
    except Exception as error:
        got = (str(error).splitlines() or [type(error).__name__])[0][:200]
        remedy = "Use --to safetensors, or write forward without branches on values"
        raise UserError(f"--to {to}", "a model that torch.export can trace", got, remedy) from None


def _as_hf(trained: Trained) -> _Written:
    part = transformers_part(trained.module)
    if part is None:
        content, main, how = _as_safetensors(trained)
        config = {
            "architectures": [type(trained.module).__name__],
            "library_name": "pytorch",
            "model": with_bare_names(trained.tables)["model"],
            **trained.facts,
        }
        return {**content, "config.json": (json.dumps(config, indent=2) + "\n").encode()}, main, how
    with tempfile.TemporaryDirectory() as place:
        part.save_pretrained(place)  # pyright: ignore[reportCallIssue]
        found = {file.name: file.read_bytes() for file in Path(place).iterdir() if file.is_file()}
    name = type(part).__name__
    return found, "model.safetensors", f'net = transformers.{name}.from_pretrained("this folder")'


def _as_peft(trained: Trained) -> _Written:
    adapter, adapted = adapter_of(trained.tables), trained.module
    if not isinstance(adapter, Lora) or not isinstance(adapted, AdaptedModule):
        raise UserError("--to peft", "a run with low-rank adapters", "a run without them", "Choose another --to")
    from peft import LoraConfig

    inner, main = cast(nn.Module, adapted.inner), "adapter_model.safetensors"
    tensors = adapter_tensors(inner, svd=adapter.rotates)
    names = "|".join(map(re.escape, lora_layers(inner)))
    whole = sorted({name.rpartition(".")[0] for name in trainable(inner) if ".lora_" not in name})
    config = LoraConfig(
        r=adapter.rank, lora_alpha=cast(int, adapter.alpha), target_modules=names, modules_to_save=whole or None
    )
    with tempfile.TemporaryDirectory() as place:
        config.save_pretrained(place)
        written = (Path(place) / "adapter_config.json").read_bytes()
    content = safetensors_bytes(tensors, metadata={"format": "pt"})
    how = 'net = peft.PeftModel.from_pretrained(net, "this folder")  # net: the model that was adapted'
    return {main: content, "adapter_config.json": written}, main, how


_WRITERS: dict[Format, Callable[[Trained], _Written]] = {
    "state-dict": _as_state_dict,
    "safetensors": _as_safetensors,
    "torch-export": _as_torch_export,
    "onnx": _as_onnx,
    "hf": _as_hf,
    "peft": _as_peft,
}
