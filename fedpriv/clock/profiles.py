"""Device profiles: speed, bandwidth, hours and reliability, drawn from distributions or read from a file."""

import csv
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from fedpriv.checks import is_real, real_within, shown
from fedpriv.data.files import refuse_other_separator
from fedpriv.errors import UserError, nearest
from fedpriv.plugins import Registry
from fedpriv.streams import Purpose, SeededStreams

__all__ = ["DEVICES", "Devices", "Fleet", "LogNormal", "Profile", "Same", "Trace", "Uniform"]

# Beyond these limits, float64 seconds could not distinguish one participation from the next.
_SLOWEST, _FASTEST = 1e-6, 1e15
# A client that answers less often could keep a buffer waiting forever.
_MAX_DROPOUT = 0.99


class Profile(NamedTuple):
    """One device. All fields are public: they determine when a client counts, and nothing of the data it sends.

    `speed` is in example gradients per second; `download` and `upload` are in bytes per second. `available` is the
    share of the day in which it accepts work, one interval that begins at `phase` (share of the day). `dropout` is the
    probability that it never answers a request.
    """

    speed: float
    download: float
    upload: float
    available: float = 1.0
    phase: float = 0.0
    dropout: float = 0.0


class Devices(Protocol):
    """A frozen dataclass that assigns a device to each client."""

    @property
    def day(self) -> float:
        """Length of a day in seconds; availability repeats daily."""
        ...

    @property
    def keep_hours(self) -> bool:
        """True if any device is unavailable at times."""
        ...

    def profile(self, client: int, population: int, rng: np.random.Generator) -> Profile:
        """Return the device of one client, drawn with the client's generator."""
        ...


@dataclass(frozen=True, kw_only=True)
class Same:
    """Identical devices, except for the hour at which they become available.

    Args:
        speed: Example gradients per second.
        download: Bytes per second from the server.
        upload: Bytes per second to the server.
        available: Share of the day in which a client accepts work; the starting hour is drawn uniformly.
        dropout: Probability that a client never answers a request.
        day: Length of a day in seconds.
    """

    speed: float
    download: float
    upload: float
    available: float = 1.0
    dropout: float = 0.0
    day: float = 86400.0

    def __post_init__(self) -> None:
        _check(self.speed, self.download, self.upload)
        _check_habits(self.available, self.dropout, self.day)

    @property
    def keep_hours(self) -> bool:
        """See `Devices.keep_hours`."""
        return self.available < 1.0

    def profile(self, client: int, population: int, rng: np.random.Generator) -> Profile:
        """See `Devices.profile`."""
        return Profile(self.speed, self.download, self.upload, self.available, float(rng.random()), self.dropout)


@dataclass(frozen=True, kw_only=True)
class LogNormal:
    """Devices with independent log-normal speed and bandwidths: median times exp(spread * N(0, 1)).

    Args:
        speed: Median, example gradients per second.
        download: Median, bytes per second from the server.
        upload: Median, bytes per second to the server.
        speed_spread: Standard deviation of the logarithm; at 1, one device in six is 2.7 times slower than the median.
        download_spread: The same for `download`.
        upload_spread: The same for `upload`.
        available: See `Same`.
        dropout: See `Same`.
        day: See `Same`.
    """

    speed: float
    download: float
    upload: float
    speed_spread: float = 1.0
    download_spread: float = 1.0
    upload_spread: float = 1.0
    available: float = 1.0
    dropout: float = 0.0
    day: float = 86400.0

    def __post_init__(self) -> None:
        _check(self.speed, self.download, self.upload)
        _check_habits(self.available, self.dropout, self.day)
        for key in ("speed_spread", "download_spread", "upload_spread"):
            remedy = "Choose 1 for a spread of about ten, 2 for about a hundred"
            real_within(f"devices.{key}", getattr(self, key), 0, 5, remedy)

    @property
    def keep_hours(self) -> bool:
        """See `Devices.keep_hours`."""
        return self.available < 1.0

    def profile(self, client: int, population: int, rng: np.random.Generator) -> Profile:
        """See `Devices.profile`."""
        medians = np.array([self.speed, self.download, self.upload])
        spreads = np.array([self.speed_spread, self.download_spread, self.upload_spread])
        speed, download, upload = np.clip(medians * np.exp(spreads * rng.standard_normal(3)), _SLOWEST, _FASTEST)
        phase = float(rng.random())
        return Profile(float(speed), float(download), float(upload), self.available, phase, self.dropout)


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """Devices with independent, uniformly distributed speed and bandwidths.

    Args:
        speed: Minimum and maximum, example gradients per second.
        download: Minimum and maximum, bytes per second from the server.
        upload: Minimum and maximum, bytes per second to the server.
        available: See `Same`.
        dropout: See `Same`.
        day: See `Same`.
    """

    speed: tuple[float, float]
    download: tuple[float, float]
    upload: tuple[float, float]
    available: float = 1.0
    dropout: float = 0.0
    day: float = 86400.0

    def __post_init__(self) -> None:
        for key in ("speed", "download", "upload"):
            pair = getattr(self, key)
            listed = isinstance(pair, list | tuple) and len(pair) == 2 and all(map(is_real, pair))
            if not listed or pair[0] > pair[1]:
                raise UserError(f"devices.{key}", "[min, max]", shown(pair), "Give two numbers, the smaller one first")
        _check(self.speed[0], self.download[0], self.upload[0])
        _check(self.speed[1], self.download[1], self.upload[1])
        _check_habits(self.available, self.dropout, self.day)

    @property
    def keep_hours(self) -> bool:
        """See `Devices.keep_hours`."""
        return self.available < 1.0

    def profile(self, client: int, population: int, rng: np.random.Generator) -> Profile:
        """See `Devices.profile`."""
        low, high = zip(self.speed, self.download, self.upload, strict=True)
        speed, download, upload = rng.uniform(low, high)
        phase = float(rng.random())
        return Profile(float(speed), float(download), float(upload), self.available, phase, self.dropout)


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Measured devices from a CSV file, one per row.

    Columns are `speed`, `download` and `upload` (as in `Same`) and, optionally, `available`, `phase` and `dropout`
    (shares from 0 to 1; 1, 0 and 0 by default). Client i has row i, from 0. If there are more clients than rows, each
    client's row is drawn with replacement.

    Args:
        file: The file; a relative path is resolved against the current directory.
        day: See `Same`.
        checksum: Checksum of the rows; None computes it from the file. It makes the file's contents part of the
            experiment: an experiment with other devices is a different one.

    Raises:
        UserError: If the file cannot be read, a row is not a valid device, or the rows have another checksum.
    """

    file: str
    day: float = 86400.0
    checksum: str | None = None

    def __post_init__(self) -> None:
        _check_habits(1.0, 0.0, self.day)
        found = self.fingerprint  # read now, to report mistakes before anything runs
        if self.checksum not in (None, found):
            expected, remedy = f"rows of checksum {self.checksum}", "Give that file, or remove devices.checksum"
            raise UserError("devices.file", expected, f"{self.file!r} ({found})", remedy)
        object.__setattr__(self, "checksum", found)

    @cached_property
    def rows(self) -> tuple[Profile, ...]:
        """All devices of the file."""
        try:
            with Path(self.file).open(newline="", encoding="utf-8") as file:
                table = csv.DictReader(file, strict=True)
                names = table.fieldnames or []
                known = list(Profile._fields)
                if not set(names) <= set(known):
                    refuse_other_separator(Path(self.file), ",", known)
                for name in names:
                    if name not in known or names.count(name) > 1:
                        raise UserError(self.file, "known columns, each at most once", repr(name), nearest(name, known))
                for name in known[:3]:
                    if name not in names:
                        raise UserError(
                            self.file, f"a column {name}", ", ".join(names) or "an empty file", "Add the column"
                        )
                rows = tuple(_device(f"{self.file}: line {table.line_num}", row) for row in table)
        except OSError as error:
            reason = error.strerror or str(error)
            remedy = "Check the path; a relative one is resolved against the current directory"
            raise UserError("devices.file", "a CSV file", f"{self.file!r} ({reason})", remedy) from None
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(self.file, "a CSV file", str(error), "Fix the file") from None
        if not rows:
            raise UserError(self.file, "one row per device", "a header alone", "Add a row")
        return rows

    @property
    def fingerprint(self) -> str:
        """A checksum of the devices, row by row."""
        return f"{zlib.crc32(repr(self.rows).encode()):08x}"

    @property
    def keep_hours(self) -> bool:
        """See `Devices.keep_hours`."""
        return any(row.available < 1.0 for row in self.rows)

    def profile(self, client: int, population: int, rng: np.random.Generator) -> Profile:
        """See `Devices.profile`."""
        row = client if population <= len(self.rows) else int(rng.integers(len(self.rows)))
        return self.rows[row]


DEVICES: Registry[Devices] = Registry(
    "kind of devices",
    {
        "same": Same,
        "log-normal": LogNormal,
        "uniform": Uniform,
        "trace": Trace,
    },
    protocol=Devices,
    group="fedpriv.devices",
)


@dataclass(frozen=True)
class Fleet:
    """The devices of all clients, drawn on first use: cost scales with the participating clients.

    Args:
        devices: The distribution or file of devices.
        population: Number of clients.
        streams: Random streams by address, so a client's device depends only on the seed and its id.
    """

    devices: Devices
    population: int
    streams: SeededStreams
    _known: dict[int, Profile] = field(default_factory=dict, repr=False)

    def profile(self, client: int) -> Profile:
        """Return the device of one client.

        Raises:
            IndexError: If there is no such client.
        """
        if client not in self._known:
            if not 0 <= client < self.population:
                raise IndexError(f"client {client} of a population of {self.population}")
            rng = self.streams.source(Purpose.DEVICE, 0, client).rng
            self._known[client] = self.devices.profile(client, self.population, rng)
        return self._known[client]

    def begins(self, client: int, asked: float) -> float:
        """Return when a client asked at `asked` (seconds) starts work: at once, or when its hours begin."""
        device, day = self.profile(client), self.devices.day
        if device.available >= 1.0:
            return asked
        into = (asked / day - device.phase) % 1.0
        return asked if into < device.available else asked + (1.0 - into) * day


def _device(where: str, row: Mapping[str | None, str | None]) -> Profile:
    values: dict[str, float] = {}
    for name, text in row.items():
        if name is None or text is None:
            raise UserError(where, "one value for each column", "a longer or a shorter row", "Fix the row")
        try:
            values[name] = float(text)
        except ValueError:
            raise UserError(f"{where}, {name}", "a number", repr(text), "Fix the row") from None
    device = Profile(**values)
    _check(device.speed, device.download, device.upload, f"{where}, ")
    _check_habits(device.available, device.dropout, 1.0, f"{where}, ")
    if not 0.0 <= device.phase <= 1.0:
        raise UserError(
            f"{where}, phase", "a share of the day from 0 to 1", device.phase, "Choose a share; 0.5 is noon"
        )
    return device


def _check(speed: float, download: float, upload: float, where: str = "devices.") -> None:
    for key, value in (("speed", speed), ("download", download), ("upload", upload)):
        if not is_real(value, _SLOWEST, _FASTEST):
            unit = "examples" if key == "speed" else "bytes"
            expected = f"{unit} a second, from {_SLOWEST:g} to {_FASTEST:g}"
            raise UserError(f"{where}{key}", expected, shown(value), "Choose a number in this range")


def _check_habits(available: float, dropout: float, day: float, where: str = "devices.") -> None:
    if not is_real(available, 0.0, 1.0) or available == 0.0:
        remedy = "Choose 1 for the whole day, and leave out clients that are never available"
        raise UserError(f"{where}available", "a share of the day above 0, at most 1", shown(available), remedy)
    if not is_real(dropout, 0.0, _MAX_DROPOUT):
        remedy = "Leave out clients that never answer"
        raise UserError(f"{where}dropout", f"a probability from 0 to {_MAX_DROPOUT}", shown(dropout), remedy)
    if not is_real(day, 1e-3, 1e9):
        raise UserError(f"{where}day", "seconds, from 0.001 to 1e9", shown(day), "Choose 86400 for a real day")
