"""Shards of a data set as columns: 10^5 of them take some ten megabytes, and are read and checked as a whole."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, NamedTuple, NotRequired, overload

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, Field, GetCoreSchemaHandler, TypeAdapter
from pydantic_core import CoreSchema, core_schema
from typing_extensions import TypedDict

from vitgraft.configs.schema.section import Section, StoredSize

Integers = npt.NDArray[np.int64]
SHARD_NAME = r"^[A-Za-z0-9_][A-Za-z0-9_.\-]{0,199}\.tar$"
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Size = Annotated[StoredSize, Field(ge=1)]
_NAME = re.compile(SHARD_NAME)
_NUMBERS, _HASHES = ("samples", "bytes", "index_size"), ("sha256", "index_sha256")
_LIMIT = 1 << 62


class Shard(Section):
    """One tar file and its index."""

    name: Annotated[str, Field(pattern=SHARD_NAME)]
    samples: Size
    bytes: Size
    sha256: Sha256
    index_sha256: Sha256
    index_size: Size | None = None
    """Of a foreign tar's index, which holds metadata too; ``None``: the size follows from ``samples``."""

    @property
    def index_name(self) -> str:
        """File name of the shard's index."""
        return index_name(self.name)

    @property
    def index_bytes(self) -> int:
        """Size of the index; of our own shards: one uint64 for each sample and one for the end."""
        return 8 * (self.samples + 1) if self.index_size is None else self.index_size


def index_name(name: str) -> str:
    """Return the file name of the index of a tar."""
    return name.removesuffix(".tar") + ".idx"


class _Row(TypedDict):
    """A shard in the manifest's JSON: as :class:`Shard`, which takes three times as long to check and keep."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)  # type: ignore[misc]

    name: Annotated[str, Field(pattern=SHARD_NAME)]
    samples: Size
    bytes: Size
    sha256: Sha256
    index_sha256: Sha256
    index_size: NotRequired[Size | None]


_ROWS: TypeAdapter[list[_Row]] = TypeAdapter(list[_Row])


class Shards(Sequence[Shard]):
    """A list of :class:`Shard`, made on demand, over columns.

    ``names``; ``samples``, ``bytes``, ``index_bytes``: (N,) int64; ``index_sizes``: (N,) int64, 0 where there is none.

    Raises:
        ValueError: a number is 2^62 or more.
    """

    def __init__(self, shards: Iterable[Shard] = ()) -> None:
        self._take([shard.model_dump(exclude_none=True) for shard in shards])

    @classmethod
    def of_rows(cls, rows: list[Any]) -> Shards:
        """Return shards from parsed JSON; raise ValueError (pydantic's ValidationError) for invalid rows."""
        shards = cls()
        shards._take(rows)
        return shards

    def _take(self, rows: list[Any]) -> None:
        columns = _columns(rows)
        if columns is None:
            checked = _ROWS.validate_python(rows)
            # Valid, but not all rows have an index_size, or some say null.
            sizes = [row.get("index_size") or 0 for row in checked]
            columns = _columns([{**row, "index_size": size or 1} for row, size in zip(checked, sizes, strict=True)])
            assert columns is not None
            columns = columns._replace(index_sizes=np.asarray(sizes, dtype=np.int64))
        self.names, self.samples, self.bytes, self.index_sizes, self._sha256, self._index_sha256 = columns

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows for JSON."""
        return [shard.model_dump(exclude_none=True) for shard in self]

    @property
    def index_bytes(self) -> Integers:
        """Size of each index."""
        return np.where(self.index_sizes > 0, self.index_sizes, 8 * (self.samples + 1))

    def hashes(self) -> Iterator[str]:
        """Yield the SHA-256 of each tar, in hex."""
        return _hexes(self._sha256)

    def index_hashes(self) -> Iterator[str]:
        """Yield the SHA-256 of each index, in hex."""
        return _hexes(self._index_sha256)

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, number: int) -> Shard: ...
    @overload
    def __getitem__(self, number: slice) -> list[Shard]: ...
    def __getitem__(self, number: int | slice) -> Shard | list[Shard]:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        number = range(len(self))[number]
        place = slice(32 * number, 32 * number + 32)
        # Everything was checked before.
        return Shard.model_construct(
            name=self.names[number],
            samples=int(self.samples[number]),
            bytes=int(self.bytes[number]),
            sha256=self._sha256[place].hex(),
            index_sha256=self._index_sha256[place].hex(),
            index_size=int(self.index_sizes[number]) or None,
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Shards) and self._columns() == other._columns()

    def __hash__(self) -> int:
        return hash((len(self), self._sha256))

    def _columns(self) -> tuple[Any, ...]:
        numbers = (column.tobytes() for column in (self.samples, self.bytes, self.index_sizes))
        return self.names, self._sha256, self._index_sha256, *numbers

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls._validated, serialization=core_schema.plain_serializer_function_ser_schema(cls.rows)
        )

    @classmethod
    def _validated(cls, value: Any) -> Shards:
        if isinstance(value, cls):
            return value
        if not isinstance(value, list):
            raise ValueError("expected a list of shards")
        return cls.of_rows(value)


class _Columns(NamedTuple):
    names: list[str]
    samples: Integers
    sizes: Integers
    index_sizes: Integers
    sha256: bytes
    index_sha256: bytes


def _columns(rows: list[Any]) -> _Columns | None:
    """Return the columns of rows that are certainly valid; ``None``: pydantic must validate each.

    Its checks take several times as long as these of whole columns.
    """
    try:
        keys = _NUMBERS if rows and "index_size" in rows[0] else _NUMBERS[:2]
        names = [row["name"] for row in rows]
        numbers = [[row[key] for row in rows] for key in keys]
        hashes = [[row[key] for row in rows] for key in _HASHES]
        texts = ["".join(column) for column in hashes]
        packed = [bytes.fromhex(text) for text in texts]
        sound = (
            set(map(len, rows)) <= {1 + len(keys) + len(_HASHES)}
            and all(map(_NAME.fullmatch, names))
            and all(set(map(type, column)) <= {int} and min(column, default=1) > 0 for column in numbers)
            and all(set(map(len, column)) <= {64} for column in hashes)
            # Capitals and spaces are not read back as they were.
            and [data.hex() for data in packed] == texts
        )
    except (TypeError, KeyError, ValueError):
        return None
    if not sound:
        return None
    largest = max(max(column, default=0) for column in numbers)
    if largest >= _LIMIT:
        raise ValueError(f"{largest} samples or bytes in a shard; expected less than 2^62")
    columns = [np.asarray(column, dtype=np.int64) for column in numbers]
    return _Columns(names, columns[0], columns[1], columns[2] if len(keys) > 2 else 0 * columns[0], *packed)


def _hexes(packed: bytes) -> Iterator[str]:
    text = packed.hex()
    return (text[place : place + 64] for place in range(0, len(text), 64))
