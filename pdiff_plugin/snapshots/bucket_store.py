"""A store in a bucket, whose columns are fetched while they are read, with a cache on disk that is bounded in bytes.

Passes over a store read all rows, some thousand columns at a time. A request for so few bytes of every row would cost
more than the bytes, so columns are fetched in blocks of up to a megabyte of a row, the next one while the last one is
worked on. Blocks stay on disk as long as there is room, and later ones are dropped behind the reader: a second pass
then finds the first blocks, where a cache that drops the oldest would have lost every block just before it is wanted.

Shapes: N snapshots in the store, m of them wanted, D values in a row, c columns, W columns of a block.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from pdiff_plugin.snapshots.chunks import Chunk
from pdiff_plugin.snapshots.mapped import disk_folder, mapped
from pdiff_plugin.snapshots.remote import RangeReader, RemoteRows, copy_without_rows
from pdiff_plugin.snapshots.scratch import scratch_folder
from pdiff_plugin.snapshots.store import SnapshotStore

logger = logging.getLogger(__name__)

# Of one row: at 30 ms until a bucket answers and 50 MB/s from then on, more saves little.
_RANGE_BYTES = 1 << 20
# Ranges are asked for in batches of this size, which are in memory for a moment.
_BATCH_BYTES = 64 << 20
_MIN_BATCH_BYTES = 1 << 20
# Blocks in a full cache: one that is read, one that is fetched, and two or more that stay.
_MIN_BLOCKS = 4


@dataclass(frozen=True)
class _Source:
    """Where the rows of a store come from, and what they may take here.

    Attributes:
        reader: of the store's folder.
        places: chunk file of the local copy -> where its rows are.
        size_bytes: of all chunks.
        share: columns that are read in passes.
        cache_bytes: bound on the blocks.
        batch_bytes: of a batch of ranges.
        opened: closes what was opened for it.
    """

    reader: RangeReader
    places: Mapping[Path, RemoteRows]
    size_bytes: int
    share: slice
    cache_bytes: int
    batch_bytes: int
    opened: ExitStack


class BucketStore(SnapshotStore):
    """A store in a bucket: what is small is in a local copy, and columns are fetched as they are asked for."""

    _source: _Source
    _blocks: _Blocks

    @property
    def size_bytes(self) -> int:
        """Size of all chunks in the bucket."""
        return self._source.size_bytes

    def take_num_bytes(self) -> int:
        """Bytes that were read from the bucket since this was asked last."""
        return self._source.reader.take_num_bytes()

    def only(self, trajectories: Sequence[str]) -> BucketStore:
        part = super().only(trajectories)
        assert isinstance(part, BucketStore)
        self._blocks.close()
        part._read_from(self._source)
        return part

    def __reduce__(self) -> NoReturn:
        raise TypeError("every process opens a store in a bucket by itself")

    def _read_from(self, source: _Source) -> None:
        everything = torch.arange(len(self))

        def fetch(out: Tensor, lo: int, hi: int) -> None:
            self._fetch(out, [(lo, hi, 0)], everything)

        self._source = source
        self._blocks = _Blocks(fetch, source.share, len(self), self.row_dtype, source.cache_bytes)
        source.opened.callback(self._blocks.close)

    def _read(self, out: Tensor, lo: int, hi: int, wanted: Tensor) -> None:
        # A few snapshots are asked for by themselves: the block would be fetched again for the next few.
        are_few = 2 * len(wanted) < len(self)
        for number, first, last in self._blocks.cut(lo, hi):
            part = out[:, first - lo : last - lo]
            if number is not None and self._blocks.is_best(number, are_few=are_few):
                self._blocks.copy(number, part, slice(first, last), wanted, goes_on=not are_few)
            else:
                self._fetch(part, [(first, last, 0)], wanted)

    def _pick(self, out: Tensor, columns: Tensor, wanted: Tensor) -> None:
        numbers = self._blocks.number_of(columns)  # (c,)
        alone: list[tuple[int, int, int]] = []
        for number in torch.unique(numbers).tolist():
            places = (numbers == number).nonzero().squeeze(1)
            if number >= 0 and self._blocks.is_best(number, are_few=True):
                values = torch.empty(len(wanted), len(places), dtype=out.dtype)
                self._blocks.copy(number, values, columns[places], wanted, goes_on=False)
                out[:, places] = values
            else:
                alone += [(int(columns[place]), int(columns[place]) + 1, place) for place in places.tolist()]
        self._fetch(out, alone, wanted)

    def _fetch(self, out: Tensor, runs: Sequence[tuple[int, int, int]], wanted: Tensor) -> None:
        """Read columns of the snapshots ``wanted`` (m,) from the bucket.

        Args:
            out: (m, c), of any dtype that holds the values.
            runs: columns [lo, hi), and their place in ``out``.
            wanted: snapshots.
        """
        batch = _Batch(self._source.reader, self._source.batch_bytes, out)
        for chunk, places, own in self._pieces(wanted):
            numbers = torch.arange(len(wanted))[places].tolist()
            for lo, hi, column in runs:
                start = column
                for file, rows, first, last in chunk.parts(lo, hi, own):
                    for number, row in zip(numbers, rows.tolist(), strict=True):
                        batch.add(file, self._source.places[file.path], row, first, last, number, start)
                    start += last - first
        batch.read()


class _Batch:
    """Ranges of values that are asked for at once.

    Args:
        reader: of the bucket.
        most_bytes: after which they are read.
        out: where the values go, (m, c).
    """

    def __init__(self, reader: RangeReader, most_bytes: int, out: Tensor) -> None:
        self._reader, self._most_bytes, self._out = reader, most_bytes, out
        self._ranges: list[tuple[str, int, int]] = []
        self._parts: list[list[tuple[torch.dtype, int, int, int, int]]] = []  # of each range
        self._num_bytes = 0

    def add(self, file: Chunk, place: RemoteRows, row: int, lo: int, hi: int, number: int, column: int) -> None:
        """Ask for columns [lo, hi) of a row of a file, which go to row ``number`` of ``out``, from ``column`` on."""
        step = max(1, min(self._most_bytes, _RANGE_BYTES) // file.dtype.itemsize)
        for first in range(lo, hi, step):
            last = min(first + step, hi)
            start, stop = (place.first_byte + offset for offset in file.byte_range(row, first, last))
            if self._num_bytes + stop - start > self._most_bytes:
                self.read()
            # Whole rows follow on each other.
            if self._ranges and self._ranges[-1][0] == place.path and self._ranges[-1][2] == start:
                self._ranges[-1] = (place.path, self._ranges[-1][1], stop)
            else:
                self._ranges.append((place.path, start, stop))
                self._parts.append([])
            behind = start - self._ranges[-1][1]
            self._parts[-1].append((file.dtype, behind, last - first, number, column + first - lo))
            self._num_bytes += stop - start

    def read(self) -> None:
        """Read what was asked for so far."""
        for piece, parts in zip(self._reader.read(self._ranges), self._parts, strict=True):
            buffer = bytearray(piece)  # torch warns of memory that cannot be written
            for dtype, offset, count, number, column in parts:
                values = torch.frombuffer(buffer, dtype=dtype, count=count, offset=offset)
                self._out[number, column : column + count] = values
        self._ranges, self._parts, self._num_bytes = [], [], 0


class _Blocks:
    """Blocks of W columns of all snapshots, (N, W) each, in mapped files that are gone with them.

    Args:
        fetch: fills a block with columns [lo, hi).
        share: the columns that are cut into blocks.
        num_rows: N.
        dtype: of the values.
        cache_bytes: bound on all blocks together.

    Attributes:
        fits: all of them stay, so that each is fetched once.
    """

    def __init__(
        self,
        fetch: Callable[[Tensor, int, int], None],
        share: slice,
        num_rows: int,
        dtype: torch.dtype,
        cache_bytes: int,
    ) -> None:
        self._fetch, self._share, self._num_rows, self._dtype = fetch, share, num_rows, dtype
        column_bytes = max(1, num_rows * dtype.itemsize)
        num_columns = share.stop - share.start
        self._width = max(1, min(_RANGE_BYTES // dtype.itemsize, cache_bytes // (_MIN_BLOCKS * column_bytes)))
        self._block_bytes = self._width * column_bytes
        self._num_blocks = -(-num_columns // self._width)
        self.fits = num_columns * column_bytes <= cache_bytes
        # Else there has to be room for the two that pass.
        self._most_kept = self._num_blocks if self.fits else max(0, cache_bytes // self._block_bytes - 2)
        self._blocks: dict[int, Future[Tensor]] = {}
        self._kept: set[int] = set()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pdiff-fetch")
        self._is_closed = False

    def cut(self, lo: int, hi: int) -> Iterator[tuple[int | None, int, int]]:
        """Cut columns [lo, hi) at the borders of blocks: number of the block, None outside the share, first, last."""
        while lo < hi:
            if self._share.start <= lo < self._share.stop:
                number: int | None = (lo - self._share.start) // self._width
                last = min(hi, self._columns(number or 0).stop)
            else:
                number, last = None, min(hi, self._share.start) if lo < self._share.start else hi
            yield number, lo, last
            lo = last

    def number_of(self, columns: Tensor) -> Tensor:
        """Number of the block of each of ``columns`` (c,), -1 outside the share."""
        is_own = (columns >= self._share.start) & (columns < self._share.stop)
        return torch.where(is_own, (columns - self._share.start) // self._width, -1)

    def is_best(self, number: int, *, are_few: bool) -> bool:
        """Whether to read from a block rather than from the bucket, where only a few of its values may be wanted."""
        return self.fits or not are_few or number in self._blocks

    def copy(self, number: int, out: Tensor, columns: slice | Tensor, rows: Tensor, *, goes_on: bool) -> None:
        """Copy columns of the store at ``rows`` (m,) out of a block, which is fetched if it is not here: (m, c).

        With ``goes_on`` the next block will be wanted too.
        """
        block, start = self._get(number), self._columns(number).start
        if goes_on and number + 1 < self._num_blocks and number + 1 not in self._blocks:
            self._begin(number + 1, beside=number)
        if isinstance(columns, slice):
            some = block[:, columns.start - start : columns.stop - start]
        else:
            some = block.index_select(1, columns - start)
        is_whole = len(rows) == len(some) and bool((rows.diff() == 1).all())
        out.copy_(some if is_whole else some[rows])

    def close(self) -> None:
        """Drop all blocks; what is on its way is waited for."""
        self._is_closed = True
        self._thread.shutdown(cancel_futures=True)
        self._blocks.clear()

    def _columns(self, number: int) -> slice:
        start = self._share.start + number * self._width
        return slice(start, min(start + self._width, self._share.stop))

    def _get(self, number: int) -> Tensor:
        if number not in self._blocks:
            self._begin(number, beside=number)
        try:
            return self._blocks[number].result()
        except Exception:
            del self._blocks[number]
            raise

    def _begin(self, number: int, beside: int) -> None:
        """Have a block fetched; of those that do not stay, only the one ``beside`` it is not dropped."""
        for passing in self._blocks.keys() - self._kept - {beside}:
            self._blocks.pop(passing).cancel()
        # Others use the disk too: workers of the same machine, for example.
        if len(self._kept) < self._most_kept:
            free = shutil.disk_usage(disk_folder()).free
            if free >= _MIN_BLOCKS * self._block_bytes:
                self._kept.add(number)
            else:
                self._most_kept = len(self._kept)
                text = "%s has %.1f GB free: later columns are fetched again by every pass over the snapshots"
                logger.warning(text, disk_folder(), free / 1e9)
        self._blocks[number] = self._thread.submit(self._load, self._columns(number))

    def _load(self, columns: slice) -> Tensor:
        shape = (self._num_rows, columns.stop - columns.start)
        block = mapped(shape, self._dtype, "columns", least_bytes=1, folder=None)
        if not self._is_closed:
            self._fetch(block, columns.start, columns.stop)
        return block


@contextmanager
def opened_in_bucket(
    url: str, columns: Callable[[int], slice], *, cache_bytes: int, memory_bytes: int
) -> Iterator[BucketStore]:
    """The store at a URL.

    Args:
        url: of the store.
        columns: those that this process reads in passes, given their number. Others can be read too, a few at a time.
        cache_bytes: bound on what is kept of them on disk, in the folder for temporary files.
        memory_bytes: bound on the memory for the passes, of which a part is for what is being fetched.

    Raises:
        StoreNotFoundError: there is none.
        BucketError: the bucket refuses us, or does not answer; or later, when columns are read.
        FormatError: a layout cannot be read, or a rank's snapshots are missing.
    """
    with scratch_folder() as folder, ExitStack() as opened:
        reader = RangeReader(url)
        places, size_bytes = copy_without_rows(reader, folder / "store")
        store = BucketStore.open(folder / "store")
        assert isinstance(store, BucketStore)
        batch_bytes = max(_MIN_BATCH_BYTES, min(_BATCH_BYTES, memory_bytes // 8))
        share = columns(store.layout.num_values)
        store._read_from(_Source(reader, places, size_bytes, share, cache_bytes, batch_bytes, opened))
        yield store
