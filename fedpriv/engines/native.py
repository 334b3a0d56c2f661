"""The client step in C, compiled once on the user's machine where there is a C compiler; else torch does it.

The step reads a signal and a memory and writes the memory and the sum. At full speed that is limited by the machine's
memory, and every further pass of a tensor library costs as much again; the file `feedback.c` makes two.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from torch import Tensor

__all__ = ["FeedbackInC", "feedback_in_c"]

_SOURCE = Path(__file__).with_name("feedback.c")
# No flag may change a rounding: no contraction, no reordering.
_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
_COMPILE_SECONDS = 60.0


class FeedbackInC:
    """The functions of `feedback.c` on float32 tensors that lie whole in the CPU's memory.

    Args:
        library: The compiled file.
    """

    def __init__(self, library: Path) -> None:
        loaded = ctypes.CDLL(str(library))
        pointer, size, single, double = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_float, ctypes.c_double
        self._feed_back = loaded.feed_back
        self._feed_back.argtypes = [pointer, pointer, pointer, size, single, single, single, pointer, double, pointer]
        self._add_bounded = loaded.add_bounded
        self._add_bounded.argtypes = [pointer, pointer, size, pointer, double, pointer]

    def feed_back(
        self,
        signal: Tensor,
        memory: Tensor,
        total: Tensor,
        kept: float,
        forget: float,
        beta: float,
        figures: ctypes.Array[ctypes.c_double],
        shift: float,
    ) -> float | None:
        """Adds the message B(signal - kept memory) to `total` (float64) and moves `memory`, all `[params]`, in place.

        Returns:
            The signal's norm; None, and nothing is done, if the residual's is no ordinary number.
        """
        own = ctypes.c_double()
        done = self._feed_back(
            signal.data_ptr(),
            memory.data_ptr(),
            total.data_ptr(),
            signal.numel(),
            kept,
            forget,
            beta,
            figures,
            shift,
            ctypes.byref(own),
        )
        return own.value if done else None

    def add_bounded(
        self, signal: Tensor, total: Tensor, figures: ctypes.Array[ctypes.c_double], shift: float
    ) -> float | None:
        """Adds B(signal) to `total` (float64), both `[params]`; returns as `feed_back` does."""
        own = ctypes.c_double()
        done = self._add_bounded(signal.data_ptr(), total.data_ptr(), signal.numel(), figures, shift, ctypes.byref(own))
        return own.value if done else None


@cache
def feedback_in_c() -> FeedbackInC | None:
    """The compiled step; None without a compiler, or where FEDPRIV_NATIVE is 0."""
    if os.environ.get("FEDPRIV_NATIVE", "1") == "0" or sys.platform == "win32":
        return None
    try:
        return FeedbackInC(_library())
    except (OSError, RuntimeError, subprocess.SubprocessError, AttributeError):  # RuntimeError: no home folder
        return None


def _library() -> Path:
    """The compiled file, kept in the user's cache under a name that says what it was made of."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise FileNotFoundError("no C compiler")
    source = _SOURCE.read_bytes()
    made_of = (source, " ".join((compiler, *_FLAGS)).encode(), platform.machine().encode(), _cpu().encode())
    name = hashlib.sha256(b"\0".join(made_of)).hexdigest()[:24]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedpriv"
    path = folder / f"feedback-{name}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=folder) as place:
            made = Path(place) / "feedback.so"
            command = [compiler, *_FLAGS, "-o", str(made), str(_SOURCE), "-lm"]
            subprocess.run(command, check=True, capture_output=True, timeout=_COMPILE_SECONDS)
            made.replace(path)
    return path


def _cpu() -> str:
    """What the compiler's `native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        return platform.processor()
