# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Checks of volume files before they are read: the size in a header must be possible and fit into memory."""

from __future__ import annotations

import bz2
import math
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import nibabel as nib
import nrrd
import numpy as np

from lib.errors import PatchwiseError

# Far above any scan (512 x 512 x 600 has 157 million voxels); the most voxels that the app allocates for a header.
MOST_VOXELS = 600_000_000
MOST_IN_SLICE = 2**24
# DEFLATE packs at most 1032 bytes into one.
_MOST_PACKED = 1040
_MOST_HEADER = 2**22
_BLOCK = 2**20
_MOST_SNIFFED = 2**16
_META_IMAGE = re.compile(rb"^[ \t]*ElementDataFile[ \t]*=([^\r\n]*)", re.IGNORECASE | re.MULTILINE)
_NIFTI = {348: nib.Nifti1Header, 540: nib.Nifti2Header}
_EITHER_ORDER = {348, 540, *(struct.unpack("<i", struct.pack(">i", size))[0] for size in (348, 540))}
_NRRD_TYPES: dict[str, str] = nrrd.reader._TYPEMAP_NRRD2NUMPY
_META_TYPES = {
    "MET_CHAR": "i1",
    "MET_UCHAR": "u1",
    "MET_SHORT": "i2",
    "MET_USHORT": "u2",
    "MET_INT": "i4",
    "MET_UINT": "u4",
    "MET_LONG": "i8",
    "MET_ULONG": "u8",
    "MET_LONG_LONG": "i8",
    "MET_ULONG_LONG": "u8",
    "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}


class ImageError(PatchwiseError, ValueError):
    """An unusable volume; the message names the file, the problem and the remedy."""


def is_nifti(path: str | Path) -> bool:
    """Return whether a file is NIfTI by its name."""
    return str(path).lower().endswith((".nii", ".nii.gz"))


def check_volume_file(path: str | Path) -> int:
    """Bytes of the voxels that a file declares, after checks that it holds them and that their number is plausible.

    Reads a header and at most a block of voxels at a time, so it needs a few MB, independent of the declared size.

    Raises:
        ImageError: unreadable header, absurd sizes, more declared than the file can hold, voxels kept in another file.
    """
    if is_nifti(path):
        return check_nifti(Path(path))[1]
    ending = Path(path).suffix.lower()
    if Path(path).is_dir() or ending not in (".nrrd", ".mha"):
        raise ImageError(f"{Path(path).name}: volumes are read from one .nii.gz, .nii, .nrrd or .mha file; convert it")
    return (_check_nrrd if ending == ".nrrd" else _check_meta_image)(Path(path))


def _header(path: Path) -> tuple[int, Any, bytes]:
    """Size of the header, the header, and the four bytes behind it."""
    try:
        with nib.openers.ImageOpener(str(path)) as stream:
            raw = stream.read(544)
        sizes = {struct.unpack(order + "i", raw[:4])[0] for order in "<>"}
        size = next(iter(sizes & _NIFTI.keys()), None)
        if size is None or len(raw) < size:
            raise ValueError("no NIfTI header at its beginning")
        # By the size of its header: nibabel itself would also take other formats under this name.
        magic = raw[344:348] if size == 348 else raw[4:8]
        if not magic.startswith(b"n+"):
            raise ValueError("half of a NIfTI pair; store header and voxels in one .nii file")
        return size, cast(Any, _NIFTI[size])(raw[:size]), raw[size : size + 4]
    except FileNotFoundError:
        raise ImageError(f"{path.name}: no such file; restore it or refresh the studies folder") from None
    except Exception as error:
        raise ImageError(f"{path.name}: not readable as NIfTI ({one_line(error)}); replace the file") from error


def check_nifti(path: Path) -> tuple[Any, int]:
    """Header of a NIfTI file and the bytes of voxels that it declares, after the checks of `check_volume_file`.

    Raises:
        ImageError: as `check_volume_file`.
    """
    size, header, extended = _header(path)
    dim = [int(n) for n in header["dim"]]
    if not 1 <= dim[0] <= 7:
        raise ImageError(f"{path.name}: its header says {dim[0]} axes, expected 3; replace the file")
    offset = float(header["vox_offset"])
    if not (offset == 0 or size + 4 <= offset <= _MOST_HEADER) or (offset == 0 and any(extended)):
        raise ImageError(f"{path.name}: its header puts the voxels at byte {offset:g}; replace the file")
    try:
        kind = header.get_data_dtype()
    except Exception as error:
        raise ImageError(f"{path.name}: not readable as NIfTI ({one_line(error)}); replace the file") from error
    needed = _check_sizes(path, dim[1 : dim[0] + 1], kind)
    held = path.stat().st_size * (_MOST_PACKED if path.name.lower().endswith(".gz") else 1)
    if needed > held:
        raise _too_little(path, needed)
    return header, needed


def check_nrrd_fields(name: str, header: bytes) -> None:
    """Refuse a header that refers to other files or skips bytes, in any spelling that a reader may accept.

    Teem and ITK ignore the case of a field's name; readers differ in blanks, and in whether `:=` makes a field.

    Raises:
        ImageError: such a field.
    """
    for line in re.split(rb"[\r\n]+", header)[1:]:
        field = re.sub(rb"[^a-z]", b"", line.partition(b":")[0].lower())
        if not line.lstrip().startswith(b"#") and field in (b"datafile", b"lineskip", b"byteskip"):
            said = line.partition(b":")[0].strip().decode("ascii", "replace")[:40]
            raise ImageError(f"{name}: its header says {said!r}; store header and voxels in one plain file")


def check_self_contained(path: Path) -> None:
    """Refuse a file of any name whose voxels may be in another file that a reader would open.

    Raises:
        ImageError: an NRRD header with a data file, a MetaImage header that is not LOCAL, half of a NIfTI pair.
    """
    try:
        with nib.openers.ImageOpener(str(path)) as stream:
            start = stream.read(_MOST_SNIFFED)
    except Exception:
        # Damaged compression: no reader gets as far as a reference.
        return
    if start.startswith(b"NRRD"):
        ends = [start.find(blank) for blank in (b"\n\n", b"\r\n\r\n") if blank in start]
        check_nrrd_fields(path.name, start[: min(ends)] if ends else start)
    meta = _META_IMAGE.search(start)
    if meta and meta[1].strip().upper() != b"LOCAL":
        raise ImageError(f"{path.name}: a MetaImage whose voxels are in another file; store both in one file")
    if struct.unpack("<i", start[:4].ljust(4, b"\0"))[0] in _EITHER_ORDER:
        magics = (start[344:348], start[4:8])
        if not any(magic.startswith(b"n+") for magic in magics):
            raise ImageError(f"{path.name}: half of a NIfTI pair; store header and voxels in one .nii file")


def _check_sizes(path: Path, sizes: list[int], kind: np.dtype[Any]) -> int:
    if not sizes or min(sizes) < 1:
        raise ImageError(f"{path.name}: expected a volume of three axes, found shape {tuple(sizes)}")
    if kind.kind not in "biuf" or kind.itemsize > 8:
        raise ImageError(f"{path.name}: voxels of type {kind} are not intensities; store whole or floating numbers")
    if math.prod(sizes) > MOST_VOXELS or math.prod(sizes[:2]) > MOST_IN_SLICE:
        raise ImageError(
            f"{path.name}: its header says {' x '.join(map(str, sizes))} voxels, at most {MOST_VOXELS:,} and "
            f"{MOST_IN_SLICE:,} a slice are read; crop or resample the scan"
        )
    return math.prod(sizes) * kind.itemsize


def _too_little(path: Path, needed: int) -> ImageError:
    return ImageError(
        f"{path.name}: the file ends early: its header declares {needed / 2**20:,.1f} MiB of voxels, the file of "
        f"{path.stat().st_size:,} bytes holds less; replace the file"
    )


def split_nrrd(path: Path) -> tuple[bytes, bytes]:
    """Header of an NRRD file, with the empty line that ends it, and the bytes behind it.

    Raises:
        ValueError: not an NRRD file.
    """
    content = path.read_bytes()
    header = _nrrd_header(content)
    return header, content[len(header) :]


def read_nrrd_header(path: Path) -> str:
    """Header of an NRRD file as text.

    Raises:
        ImageError: no such header.
    """
    try:
        with open(path, "rb") as stream:
            return _nrrd_header(stream.read(_MOST_HEADER)).decode("utf-8", "replace")
    except (ValueError, OSError) as error:
        raise ImageError(f"{path.name}: not readable as NRRD ({one_line(error)}); replace the file") from error


def packed_by_bzip2(path: Path) -> bool:
    """Return whether a file is an NRRD file whose voxels are packed by bzip2.

    Raises:
        ImageError: an NRRD file by its name, without a header that can be read.
    """
    if path.suffix.lower() != ".nrrd":
        return False
    try:
        fields = _nrrd_fields(read_nrrd_header(path).encode())
    except ValueError as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"{path.name}: not readable as NRRD ({error}); replace the file") from error
    return fields.get("encoding", "").lower() in ("bzip2", "bz2")


def _nrrd_header(start: bytes) -> bytes:
    ends = [start.find(blank) + len(blank) for blank in (b"\n\n", b"\r\n\r\n") if blank in start]
    if not start.startswith(b"NRRD") or not ends:
        raise ValueError("no NRRD header at its beginning")
    return start[: min(ends)]


def _check_nrrd(path: Path) -> int:
    try:
        with open(path, "rb") as stream:
            header = _nrrd_header(stream.read(_MOST_HEADER))
            check_nrrd_fields(path.name, header)
            fields = _nrrd_fields(header)
            sizes, kind = [int(n) for n in fields["sizes"].split()], np.dtype(_NRRD_TYPES[fields["type"]])
            encoding = fields["encoding"].lower()
    except FileNotFoundError:
        raise ImageError(f"{path.name}: no such file; restore it or refresh the studies folder") from None
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(f"{path.name}: not readable as NRRD ({one_line(error)}); replace the file") from error
    needed = _check_sizes(path, sizes, kind)
    inflate = {"raw": _as_is, "gzip": _gunzip, "gz": _gunzip, "bzip2": _bunzip, "bz2": _bunzip}.get(encoding)
    if inflate is None:
        raise ImageError(f"{path.name}: voxels are stored as {encoding[:20]!r}; store them as raw, gzip or bzip2")
    with open(path, "rb") as stream:
        stream.seek(len(header))
        held = _count(path, inflate(stream), needed)
    if held < needed:
        raise _too_little(path, needed)
    return needed


def _nrrd_fields(header: bytes) -> dict[str, str]:
    """The fields of an NRRD header by name in lower case; readers ignore case, and every other field is optional.

    Raises:
        ValueError: a field is there twice.
    """
    fields: dict[str, str] = {}
    for line in header.decode("utf-8", "replace").splitlines()[1:]:
        name, colon, value = line.partition(":")
        name = " ".join(name.lower().split())
        if not colon or value.startswith("=") or name.startswith("#"):
            continue
        if name in fields:
            raise ValueError(f"the field {name!r} is there twice")
        fields[name] = value.strip()
    return fields


def _check_meta_image(path: Path) -> int:
    """Check a MetaImage; its voxels must be binary and follow the header."""
    try:
        with open(path, "rb") as stream:
            start = stream.read(_MOST_HEADER)
        meta = _META_IMAGE.search(start)
        if meta is None:
            raise ValueError("no MetaImage header at its beginning")
        begin = start.find(b"\n", meta.end()) + 1
        pairs = (line.partition("=") for line in start[:begin].decode("ascii").splitlines())
        fields = {name.strip().lower(): value.strip() for name, _, value in pairs}
        sizes = [int(n) for n in fields["dimsize"].split()]
        kind, channels = (
            np.dtype(_META_TYPES[fields["elementtype"].upper()]),
            int(fields.get("elementnumberofchannels", 1)),
        )
        packed = fields.get("compresseddata", "false").lower() in ("true", "t", "1")
        binary = fields.get("binarydata", "true").lower() in ("true", "t", "1")
    except FileNotFoundError:
        raise ImageError(f"{path.name}: no such file; restore it or refresh the studies folder") from None
    except Exception as error:
        raise ImageError(f"{path.name}: not readable as MetaImage ({one_line(error)}); replace the file") from error
    if fields["elementdatafile"].upper() != "LOCAL" or "headersize" in fields or not binary:
        raise ImageError(f"{path.name}: a MetaImage whose voxels do not follow its header; store both in one file")
    needed = _check_sizes(path, sizes, kind) * max(channels, 1)
    with open(path, "rb") as stream:
        stream.seek(begin)
        held = _count(path, (_gunzip if packed else _as_is)(stream), needed)
    if held < needed:
        raise _too_little(path, needed)
    return needed


def _count(path: Path, blocks: Iterator[bytes], needed: int) -> int:
    held = 0
    try:
        for block in blocks:
            held += len(block)
            if held > needed:
                raise ImageError(
                    f"{path.name}: the file holds more voxels than the {needed:,} bytes of its header; replace the file"
                )
    except (zlib.error, OSError, EOFError, ValueError) as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"{path.name}: the voxels are damaged ({one_line(error)}); replace the file") from error
    return held


def _as_is(stream: BinaryIO) -> Iterator[bytes]:
    return iter(lambda: stream.read(_BLOCK), b"")


def _gunzip(stream: BinaryIO) -> Iterator[bytes]:
    unpacker = zlib.decompressobj(zlib.MAX_WBITS | 32)
    return _unpack(stream, unpacker.decompress, lambda: unpacker.eof, lambda: unpacker.unconsumed_tail)


def _bunzip(stream: BinaryIO) -> Iterator[bytes]:
    unpacker = bz2.BZ2Decompressor()
    return _unpack(stream, unpacker.decompress, lambda: unpacker.eof, lambda: b"")


def _unpack(
    stream: BinaryIO, unpack: Callable[[bytes, int], bytes], ended: Callable[[], bool], rest: Callable[[], bytes]
) -> Iterator[bytes]:
    packed = b"\0"
    while packed and not ended():
        packed = rest() or stream.read(_BLOCK)
        block = unpack(packed, _BLOCK)
        # bzip2 returns its remaining output without new input.
        while block:
            yield block
            block = unpack(rest(), _BLOCK) if not ended() else b""


def one_line(error: Exception) -> str:
    """Return the text of an error on one line, at most 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__
