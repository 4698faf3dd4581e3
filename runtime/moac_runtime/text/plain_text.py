"""Text that arrives through a file or a pipe, as its writer meant it."""

from __future__ import annotations

import codecs

# Those of UTF-32 first: its little-endian mark begins as that of UTF-16 does.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def decode_text(data: bytes) -> str:
    """The text of a file: UTF-8, or what its byte order mark says; the mark is no part of it.

    Line ends of Windows become plain ones. Raises UnicodeDecodeError.
    """
    encoding = next((name for mark, name in _MARKS.items() if data.startswith(mark)), "utf-8")
    return data.decode(encoding).replace("\r\n", "\n")


def decode_prompt(data: bytes) -> str:
    """The same without the one line end that closes a file's last line.

    Every tool that writes lines adds it, and it is nobody's question. Further ones were written
    on purpose and stay.
    """
    return decode_text(data).removesuffix("\n")
