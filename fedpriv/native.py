"""Compile C files once on the user's machine, if it has a C compiler. Every C file has a Python equivalent."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

__all__ = ["about_compiled", "address_of", "native_library"]

# No flag may change rounding: no contraction, no reordering.
_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
_COMPILE_SECONDS = 60.0


def native_library(source: Path, declare: Callable[[ctypes.CDLL], None]) -> ctypes.CDLL | None:
    """Return a compiled C file, or None if there is no compiler or FEDPRIV_NATIVE is 0.

    Args:
        source: The C file.
        declare: Declares the types of its functions.
    """
    if os.environ.get("FEDPRIV_NATIVE", "1") == "0" or sys.platform == "win32":
        return None
    try:
        library = ctypes.CDLL(str(_compiled(source)))
        declare(library)
    except (OSError, RuntimeError, subprocess.SubprocessError, AttributeError):  # RuntimeError: no home folder
        return None
    return library


def address_of(array: "np.ndarray") -> int:
    """Return the address of an array's numbers: `array.ctypes.data`, in a third of the time if it is writable."""
    if not array.flags.writeable or not array.size:
        return array.ctypes.data
    return ctypes.addressof(ctypes.c_char.from_buffer(array.data))


def about_compiled(there: bool) -> str:
    """Return "compiled" if compiled C code is in use, otherwise the reason why not.

    Args:
        there: True if `native_library` returned a library that is in use.
    """
    if there:
        return "compiled"
    if os.environ.get("FEDPRIV_NATIVE", "1") == "0":
        reason = "FEDPRIV_NATIVE is 0"
    elif sys.platform == "win32":
        reason = "not on Windows"
    elif _compiler() is None:
        reason = "no C compiler here; install gcc or clang"
    else:
        reason = "the C compiler here cannot compile it"
    return f"missing ({reason}): torch and numpy do the same work more slowly"


def _compiler() -> str | None:
    return os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


def _compiled(source: Path) -> Path:
    """Return the path of the compiled file, cached per user under a hash of its inputs."""
    compiler = _compiler()
    if compiler is None:
        raise FileNotFoundError("no C compiler")
    command = [compiler, *_FLAGS]
    made_of = (source.read_bytes(), " ".join(command).encode(), platform.machine().encode(), _cpu().encode())
    name = hashlib.sha256(b"\0".join(made_of)).hexdigest()[:24]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedpriv"
    path = folder / f"{source.stem}-{name}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=folder) as place:
            made = Path(place) / path.name
            command += ["-o", str(made), str(source), "-lm"]
            subprocess.run(command, check=True, capture_output=True, timeout=_COMPILE_SECONDS)
            made.replace(path)
    return path


def _cpu() -> str:
    """Return the CPU features that the compiler's `native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        return platform.processor()
