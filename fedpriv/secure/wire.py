"""One encoding for everything that is sent, signed, stored or fed to a key derivation.

`pack` begins with the kind of the object. Each field has a tag for its type, and texts and bytes have their length.
Different objects therefore never have the same bytes, and an object has only one encoding.
"""

import struct
from typing import NoReturn

from fedpriv.errors import UserError

__all__ = ["MAX_WHOLE", "Fields", "pack"]

MAX_WHOLE = 2**63 - 1

_DOMAIN = b"fedpriv secure aggregation 1 "
_MAX_TEXT = 256

Field = int | float | str | bytes | memoryview


def pack(kind: str, *fields: Field) -> bytes:
    """Return the encoding of an object.

    Args:
        kind: The kind of object, without a line feed.
        fields: Whole numbers from 0 to `MAX_WHOLE`, floats, texts of at most 256 bytes, and bytes.

    Raises:
        UserError: If a field cannot be encoded.
    """
    parts: list[bytes | memoryview] = [_DOMAIN, kind.encode(), b"\n"]
    for field in fields:
        if isinstance(field, int):
            if not 0 <= field <= MAX_WHOLE:
                raise UserError(kind, "whole numbers from 0 to 2^63 - 1", field, "Change the number")
            parts.append(struct.pack(">cQ", b"i", field))
        elif isinstance(field, float):
            parts.append(struct.pack(">cd", b"d", field))
        elif isinstance(field, str):
            text = field.encode()
            if len(text) > _MAX_TEXT:
                raise UserError(kind, f"texts of at most {_MAX_TEXT} bytes", f"{len(text)} bytes", "Shorten the text")
            parts += [struct.pack(">cQ", b"s", len(text)), text]
        else:
            parts += [struct.pack(">cQ", b"b", len(field)), field]
    return b"".join(parts)


class Fields:
    """Reader of an encoding, field by field. Anything unexpected is one `UserError`.

    Args:
        kind: The expected kind.
        content: The encoding.
    """

    def __init__(self, kind: str, content: bytes | memoryview) -> None:
        self._kind = kind
        self._content = memoryview(content)
        self._at = 0
        head = _DOMAIN + kind.encode() + b"\n"
        if bytes(self._take(len(head))) != head:
            self._fail("another kind of object")

    def whole(self) -> int:
        """Return the next field, a whole number."""
        self._tag(b"i")
        value: int = struct.unpack(">Q", self._take(8))[0]
        if value > MAX_WHOLE:
            self._fail("a number that is too large")
        return value

    def real(self) -> float:
        """Return the next field, a float."""
        self._tag(b"d")
        value: float = struct.unpack(">d", self._take(8))[0]
        return value

    def text(self) -> str:
        """Return the next field, a text."""
        self._tag(b"s")
        length: int = struct.unpack(">Q", self._take(8))[0]
        if length > _MAX_TEXT:
            self._fail("a text that is too long")
        try:
            return bytes(self._take(length)).decode()
        except UnicodeDecodeError:
            self._fail("a text that is not UTF-8")

    def octets(self, length: int) -> memoryview:
        """Return the next field, `length` bytes."""
        self._tag(b"b")
        if struct.unpack(">Q", self._take(8))[0] != length:
            self._fail("bytes of another length")
        return self._take(length)

    def remaining(self) -> int:
        """Return the number of bytes that have not been read."""
        return len(self._content) - self._at

    def end(self) -> None:
        """Raise `UserError` unless all bytes have been read."""
        if self.remaining():
            self._fail("further bytes at the end")

    def _tag(self, tag: bytes) -> None:
        if bytes(self._take(1)) != tag:
            self._fail("a field of another type")

    def _take(self, length: int) -> memoryview:
        if length > self.remaining():
            self._fail("an incomplete object")
        self._at += length
        return self._content[self._at - length : self._at]

    def _fail(self, got: str) -> NoReturn:
        raise UserError(self._kind, f"the bytes of one {self._kind}", got, "Send it again, unchanged")
