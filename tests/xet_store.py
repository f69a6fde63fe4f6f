"""The object store behind a Hub that speaks xet: xorbs of chunks, and files as runs of chunks. Only what hf_xet asks.

A xorb is a run of chunks, each behind a header of eight bytes; a shard says which chunks of which xorbs a file is made
of, in records of 48 bytes. (Formats: xet_core_structures of huggingface/xet-core.)
"""

import struct
from dataclasses import dataclass, field
from typing import Any

RECORD = 48
END_OF_FILES = b"\xff" * 32
VERIFIED, HAS_SHA256 = 1 << 31, 1 << 30
FOOTER = b"XETBLOB"


@dataclass(frozen=True)
class Segment:
    """Chunks `start` to `end` of one xorb, `size` bytes when unpacked."""

    xorb: str
    size: int
    start: int
    end: int


@dataclass
class XetStore:
    """What clients have uploaded: xorbs by hash, files by hash, and which file has which SHA-256."""

    xorbs: dict[str, bytes] = field(default_factory=dict)
    files: dict[str, list[Segment]] = field(default_factory=dict)
    by_sha256: dict[str, str] = field(default_factory=dict)

    def put_shard(self, shard: bytes) -> None:
        position = RECORD  # behind the shard's own header
        while shard[position : position + 32] != END_OF_FILES:
            file = hexadecimal(shard[position : position + 32])
            flags, n = struct.unpack_from("<II", shard, position + 32)
            records = range(position + RECORD, position + RECORD * (n + 1), RECORD)
            self.files[file] = [
                Segment(hexadecimal(shard[at : at + 32]), *struct.unpack_from("<4xIII", shard, at + 32))
                for at in records
            ]
            position += RECORD * (n + 1)
            if flags & VERIFIED:
                position += RECORD * n
            if flags & HAS_SHA256:
                self.by_sha256[hexadecimal(shard[position : position + 32])] = file
                position += RECORD

    def read(self, file: str) -> bytes:
        """A file's bytes, where its chunks are stored uncompressed (HF_XET_XORB_COMPRESSION_POLICY=none)."""
        return b"".join(
            b"".join(content(self.xorbs[segment.xorb])[segment.start : segment.end]) for segment in self.files[file]
        )

    def reconstruction(self, file: str, first: int, last: int, url: str, version: str) -> dict[str, Any]:
        """Which bytes of which xorbs hold bytes `first` to `last` of a file."""
        at, offset, terms, fetches = 0, None, [], {}
        for segment in self.files[file]:
            if at + segment.size > first and at <= last:
                offset = max(first - at, 0) if offset is None else offset
                chunks = {"start": segment.start, "end": segment.end}
                terms.append({"hash": segment.xorb, "unpacked_length": segment.size, "range": chunks})
                ends = [0, *chunk_ends(self.xorbs[segment.xorb])]
                found = {"start": ends[segment.start], "end": ends[segment.end] - 1}
                fetches.setdefault(segment.xorb, []).append((chunks, found))
            at += segment.size
        answer = {"offset_into_first_range": offset or 0, "terms": terms}
        where = {xorb: f"{url}/xorb/{xorb}" for xorb in fetches}
        if version == "v1":
            answer["fetch_info"] = {
                xorb: [{"range": chunks, "url": where[xorb], "url_range": found} for chunks, found in ranges]
                for xorb, ranges in fetches.items()
            }
        else:
            answer["xorbs"] = {
                xorb: [
                    {"url": where[xorb], "ranges": [{"chunks": chunks, "bytes": found} for chunks, found in ranges]}
                ]
                for xorb, ranges in fetches.items()
            }
        return answer


def hexadecimal(raw: bytes) -> str:
    """A hash as xet prints it: four little-endian numbers."""
    return "".join(f"{value:016x}" for value in struct.unpack("<4Q", raw))


def chunk_ends(xorb: bytes) -> list[int]:
    """Where each chunk of a xorb ends."""
    ends, position = [], 0
    while position < len(xorb) and not xorb.startswith(FOOTER, position):
        position += 8 + int.from_bytes(xorb[position + 1 : position + 4], "little")
        ends.append(position)
    return ends


def content(xorb: bytes) -> list[bytes]:
    """The chunks of a xorb, without their headers."""
    ends = chunk_ends(xorb)
    starts = [0, *ends[:-1]]
    assert not any(xorb[start + 4] for start in starts), "compressed chunks; see `XetStore.read`"
    return [xorb[start + 8 : end] for start, end in zip(starts, ends, strict=True)]
