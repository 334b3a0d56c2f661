"""Let torchvision, and packages that import it, be imported beside a torch of another build.

A torchvision built for CUDA cannot be imported with a CPU build of torch, because it describes operators (`nms`) that
it cannot load. transformers, timm and peft import torchvision, so they would fail, too. Few models need these
operators: declaring the missing ones by name is enough.
"""

import functools
import importlib.machinery
import sys
import types
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder

__all__ = ["install"]

OPERATORS = ("nms", "qnms")


class _Finder(MetaPathFinder):
    """Finds torchvision where Python finds it, and repeats its import if the operators are missing."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return the specification of torchvision; None for other modules."""
        if fullname != "torchvision":
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            run = functools.partial(_run, spec.loader)
            vars(spec.loader)["exec_module"] = run
        return spec


def install() -> None:
    """Install the finder in this process, once."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _run(loader: Loader, module: types.ModuleType) -> None:
    """Run torchvision; if an operator is missing, declare the operators and run it again."""
    execute = type(loader).exec_module
    try:
        execute(loader, module)
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
        for name in [name for name in sys.modules if name.startswith("torchvision.")]:
            del sys.modules[name]
        _declare_operators()
        execute(loader, module)


@functools.cache
def _declare_operators() -> None:
    """Declare the operators, once in a process."""
    from torch import library as operators

    for name in OPERATORS:
        operators.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
