"""Tar headers and streams as the OCI image spec's layers have them (POSIX.1-2001 pax, ``layer.md``).

The writer makes the same bytes from the same files: numeric owners, no names, pax records only where a plain
header cannot say it. The reader takes what tar, GNU tar and Go write, from a file or a pipe, and is strict:
an archive may come from anywhere. The standard library's tarfile reads the 512 bytes of a header; the rest of
it is not used, since two readers that disagree about an archive are how files get out of their root.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from workbench.images.aside import Aside
from workbench.model import Corrupt, InvalidInput

BLOCK = 512
CHUNK = 1 << 20
SECOND = 10**9
XATTR = b"SCHILY.xattr."

#: Names at the two levels where Linux itself ends (PATH_MAX, NAME_MAX in limits.h).
LONGEST_PATH = 4095
LONGEST_NAME = 255
#: As Go's archive/tar; file capabilities and ACLs take some dozen bytes.
LONGEST_RECORD = 1 << 20

FILE, HARD_LINK, SYMLINK, CHARACTER, BLOCK_DEVICE, FOLDER, FIFO = b"0", b"1", b"2", b"3", b"4", b"5", b"6"


@dataclass(slots=True)
class Entry:
    """One file of an archive. ``mtime``: nanoseconds since 1970; names are raw bytes."""

    name: bytes
    kind: bytes
    mode: int = 0
    uid: int = 0
    gid: int = 0
    size: int = 0
    mtime: int = 0
    link: bytes = b""
    xattrs: dict[str, bytes] = field(default_factory=dict)


_TIME = re.compile(rb"(-?)(\d{1,19})(?:\.(\d*))?")
_FIELDS = b"%07o\0%07o\0%07o\0%011o\0%011o\0"
_TAIL = b"ustar\x0000" + bytes(64) + b"0000000\x000000000\0" + bytes(167)
_TAIL_SUM = sum(_TAIL) + 8 * ord(" ")  # the checksum itself counts as spaces


def _block(name: bytes, mode: int, uid: int, gid: int, size: int, mtime: int, kind: bytes, link: bytes) -> bytes:
    fields = _FIELDS % (mode, uid, gid, size, mtime)
    total = sum(name) + sum(fields) + sum(kind) + sum(link) + _TAIL_SUM
    return b"%b%b%06o\0 %b%b%b" % (name.ljust(100, b"\0"), fields, total, kind, link.ljust(100, b"\0"), _TAIL)


def _record(key: bytes, value: bytes) -> bytes:
    # The length counts its own digits.
    length = len(key) + len(value) + 3
    digits = len(str(length + len(str(length))))
    return b"%d %b=%b\n" % (length + digits, key, value)


def header(entry: Entry) -> bytes:
    """The header block of an entry, after a pax header where a plain one cannot hold it."""
    name, link, mtime = entry.name, entry.link, entry.mtime
    seconds, rest = divmod(mtime, SECOND)
    uid, gid, size = entry.uid, entry.gid, entry.size
    records: dict[bytes, bytes] = {XATTR + key.encode(): value for key, value in entry.xattrs.items()}
    for key, value in ((b"path", name), (b"linkpath", link)):
        if len(value) > 100 or not value.isascii():
            records[key] = value
    if rest or not 0 <= seconds < 1 << 33:
        records[b"mtime"] = _decimal(mtime)
        seconds = min(max(seconds, 0), (1 << 33) - 1)
    if uid >= 1 << 21:
        records[b"uid"], uid = b"%d" % uid, 0
    if gid >= 1 << 21:
        records[b"gid"], gid = b"%d" % gid, 0
    if size >= 1 << 33:
        records[b"size"], size = b"%d" % size, 0
    block = _block(name[:100], entry.mode, uid, gid, size, seconds, entry.kind, link[:100])
    if not records:
        return block
    body = b"".join(_record(key, records[key]) for key in sorted(records))
    return b"".join(
        (_block(b"PaxHeader", 0o644, 0, 0, len(body), 0, b"x", b""), body, bytes(-len(body) % BLOCK), block)
    )


def _decimal(mtime: int) -> bytes:
    sign, (seconds, rest) = (b"-" if mtime < 0 else b""), divmod(abs(mtime), SECOND)
    return b"%b%d" % (sign, seconds) + (b".%09d" % rest).rstrip(b"0") if rest else b"%b%d" % (sign, seconds)


def bad(obstacle: str) -> InvalidInput:
    """The error for an archive that is not applied."""
    return InvalidInput("apply a layer's archive", obstacle, "take the image from somebody you trust")


class Record:
    """Writes down what an archive is made of but the files' content, so that its bytes can be remade.

    Deflated frames: ``L`` length bytes, or ``F`` length path and 8 bytes of size. Archives of other tools
    order and pad in their own way; only with this the ``diff_id`` can be shown again.
    """

    def __init__(self, path: str) -> None:
        self._file = open(path, "xb")
        self._deflate = zlib.compressobj(1)

    def literal(self, data: bytes | memoryview) -> None:
        """Bytes as they stand in the archive."""
        self._file.write(self._deflate.compress(struct.pack(">cI", b"L", len(data)) + data))

    def file(self, path: bytes, size: int) -> None:
        """The content of a file of the tree."""
        frame = struct.pack(">cI", b"F", len(path)) + path + struct.pack(">Q", size)
        self._file.write(self._deflate.compress(frame))

    def close(self) -> None:
        """Finish; durable when this returns."""
        self._file.write(self._deflate.flush())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def read_record(path: str) -> Iterator[tuple[bytes, int]]:
    """What a Record wrote: ``(bytes, -1)`` or ``(path, size)``. Raises Corrupt."""
    with open(path, "rb") as file:
        source = _Inflated(file)
        while head := source.read(5, last=True):
            kind, length = struct.unpack(">cI", head)
            data = source.read(length)
            yield (data, -1) if kind == b"L" else (data, struct.unpack(">Q", source.read(8))[0])


class _Inflated:
    def __init__(self, file: BinaryIO) -> None:
        self._file, self._inflate, self._rest = file, zlib.decompressobj(), bytearray()

    def read(self, size: int, last: bool = False) -> bytes:
        while len(self._rest) < size:
            chunk = self._inflate.unconsumed_tail or self._file.read(CHUNK)
            try:
                data = self._inflate.decompress(chunk, CHUNK)  # no more: a megabyte may hold a thousand
            except zlib.error:
                data = chunk = b""
            if not chunk and not data:
                if last and not self._rest:
                    return b""
                raise Corrupt("remake a layer's archive", "its record ends early", "build or pull the image again")
            self._rest += data
        found = bytes(self._rest[:size])
        del self._rest[:size]
        return found


@dataclass(slots=True)
class _Head:
    """What a header block says."""

    name: bytes
    kind: bytes
    mode: int
    uid: int
    gid: int
    size: int
    mtime: int
    link: bytes


#: From a header's mode to its checksum as our writer and Go's write them, and from its magic to the end.
_PLAIN_FIELDS = re.compile(rb"([0-7]{7})\0" * 3 + rb"([0-7]{11})\0" * 2 + rb"([0-7]{6})\0 ([0-6xg])", re.DOTALL)
_PLAIN_TAIL = re.compile(rb"ustar\x0000.{80}\0{155}.{12}", re.DOTALL)


def _head(block: bytes) -> _Head:
    """Raises InvalidInput. What is plain is read here, which is quicker; all else as tarfile reads it."""
    fields = _PLAIN_FIELDS.fullmatch(block, 100, 157)
    if fields and _PLAIN_TAIL.fullmatch(block, 257):
        mode, uid, gid, size, mtime, checksum = (int(field, 8) for field in fields.groups()[:6])
        if checksum == sum(block) - sum(block[148:156]) + 8 * ord(" "):
            name, link = block[:100].partition(b"\0")[0], block[157:257].partition(b"\0")[0]
            return _Head(name, fields[7], mode, uid, gid, size, mtime, link)
    import tarfile  # rarely needed, and 5 ms of each process that reads or writes a layer

    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError) as error:
        raise bad(f"it has a broken header ({error})") from None
    name, link = (text.encode("utf-8", "surrogateescape") for text in (info.name, info.linkname))
    return _Head(name, info.type, info.mode, info.uid, info.gid, info.size, int(info.mtime), link)


class Form:
    """A digest of what an archive is made of but the files' content, as a ``Reader`` tells it of one that it reads.

    Headers say where content lies and how much: two archives of one form differ in bytes of files only.
    """

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def entry(self, entry: Entry) -> None:
        """The next file."""
        self._hash.update(header(entry) + bytes(-entry.size % BLOCK))

    def finish(self) -> str:
        """All is there; the digest."""
        self._hash.update(bytes(2 * BLOCK))
        return self._hash.hexdigest()


class Reader:
    """Walks an archive once, hashing every byte. ``for entry in reader``; a file's content by ``copy``.

    limit: bytes of the descriptor's file that are the archive, from where it stands; by default all.
    """

    def __init__(self, fd: int, record: Record | None = None, limit: int | None = None) -> None:
        self._fd, self._record, self._limit = fd, record, limit
        self._hash, self._form = hashlib.sha256(), hashlib.sha256()
        self._aside = Aside("tar")  # hashes one piece while the files of another are made
        self._chunk = memoryview(b"")
        self._globals: dict[bytes, bytes] = {}
        self._content = 0  # bytes of the present file's content that were not taken yet
        self.size = 0

    @property
    def digest(self) -> str:
        """``sha256:<hex>`` of what was read so far; of the whole after the last entry."""
        self._aside.wait()
        return "sha256:" + self._hash.hexdigest()

    @property
    def form(self) -> str:
        """A digest of all but the files' content, in the order of the archive (see ``Form``)."""
        return self._form.hexdigest()

    def close(self) -> None:
        """End its thread; the descriptor stays."""
        self._aside.close()

    def _fill(self) -> bool:
        if not self._chunk:
            data = os.read(self._fd, CHUNK if self._limit is None else min(CHUNK, self._limit - self.size))
            self._aside.wait()
            if len(data) < CHUNK:
                self._hash.update(data)
            else:
                self._aside.start(self._hash.update, data)
            self.size += len(data)
            self._chunk = memoryview(data)
        return bool(self._chunk)

    def _take(self, size: int) -> Iterator[memoryview]:
        while size:
            if not self._fill():
                raise bad("it ends early")
            piece, self._chunk = self._chunk[:size], self._chunk[size:]
            size -= len(piece)
            yield piece

    def _literal(self, size: int) -> bytes:
        data = b"".join(self._take(size))
        self._form.update(data)
        if self._record is not None and data:
            self._record.literal(data)
        return data

    def _padding(self, size: int) -> None:
        self._literal(-size % BLOCK)

    def copy(self, entry: Entry, path: bytes, target: int) -> None:
        """Write the content of the present entry to a descriptor, or nowhere (-1); ``path``: its name in the record."""
        if self._record is not None and entry.size:
            self._record.file(path, entry.size)
        for piece in self._take(entry.size):
            while piece and target >= 0:
                piece = piece[os.write(target, piece) :]
        self._padding(entry.size)
        self._content = 0

    def _skip(self) -> None:
        while self._content:
            self._content -= len(self._literal(min(self._content, CHUNK)))

    def __iter__(self) -> Iterator[Entry]:
        extended: dict[bytes, bytes] = {}
        while True:
            block = self._header()
            if block is None:
                return
            info = _head(block)
            if info.size < 0 or info.uid < 0 or info.gid < 0:
                raise bad("a header has a negative size or owner")
            kind = b"0" if info.kind in (b"\0", b"7") else info.kind
            if kind in (b"x", b"g", b"L", b"K"):
                self._extend(kind, info.size, extended)
                continue
            entry = self._entry(info, kind, {**self._globals, **extended})
            extended = {}
            self._content = entry.size + -entry.size % BLOCK
            yield entry
            self._skip()

    def _header(self) -> bytes | None:
        """The next header block; None at the end, with everything behind it read and hashed."""
        if not self._fill():
            return None
        block = self._literal(BLOCK)
        if any(block):
            return block
        if self._fill() and any(self._literal(BLOCK)):
            raise bad("there are files behind its end")
        while self._fill():
            self._literal(len(self._chunk))
        return None

    def _extend(self, kind: bytes, size: int, extended: dict[bytes, bytes]) -> None:
        held = sum(len(key) + len(value) for known in (extended, self._globals) for key, value in known.items())
        if size + held > LONGEST_RECORD:
            raise bad(f"extended headers take {size + held} bytes")
        body = self._literal(size)
        self._padding(size)
        if kind in (b"L", b"K"):  # GNU tar's long names
            extended[b"path" if kind == b"L" else b"linkpath"] = body.split(b"\0", 1)[0]
            return
        goal = extended if kind == b"x" else self._globals
        while body:
            length, space, _ = body.partition(b" ")
            if not space or not length.isdigit() or not len(length) + 3 <= int(length) <= len(body):
                raise bad("it has a broken pax header")
            record, body = body[len(length) + 1 : int(length)], body[int(length) :]
            key, equals, value = record[:-1].partition(b"=")
            if not equals or record[-1:] != b"\n" or not key:
                raise bad("it has a broken pax record")
            if key.startswith(b"GNU.sparse."):
                raise bad("it holds sparse files, which the OCI spec does not know")
            goal[key] = value

    def _entry(self, info: _Head, kind: bytes, pax: dict[bytes, bytes]) -> Entry:
        name, link = pax.get(b"path") or info.name, pax.get(b"linkpath") or info.link
        if b"\0" in name or b"\0" in link:
            raise bad("a name holds a zero byte")
        # As every reader does: only files have content, whatever the header of a link or a folder says.
        size = _number(pax, b"size", info.size) if kind == FILE else 0
        mtime = info.mtime * SECOND
        if b"mtime" in pax:
            time = _TIME.fullmatch(pax[b"mtime"])
            if time is None:
                raise bad("a file's time is no number")
            mtime = int(time[2]) * SECOND + int((time[3] or b"")[:9].ljust(9, b"0"))
            mtime = -mtime if time[1] else mtime
        if not -(2**63) <= mtime < 2**63:
            raise bad("a file's time is out of range")
        xattrs = {
            key[len(XATTR) :].decode("utf-8", "surrogateescape"): value
            for key, value in pax.items()
            if key.startswith(XATTR)
        }
        uid, gid = _number(pax, b"uid", info.uid), _number(pax, b"gid", info.gid)
        if max(uid, gid) > 0xFFFFFFFE:
            raise bad("a file's owner is out of range")
        return Entry(name, kind, info.mode & 0o7777, uid, gid, size, mtime, link, xattrs)


def _number(pax: dict[bytes, bytes], key: bytes, plain: int) -> int:
    text = pax.get(key)
    if text is None:
        return plain
    if not text.isdigit() or len(text) > 19:
        raise bad(f"a file's {key.decode()} is no number")
    return int(text)
