"""Ways through files in ``/dev/shm``: safetensors, an Arrow IPC file, LMDB.

Each as its documentation has it fastest: what can be is mapped and not copied. See
`transport_ways` for what a way is.
"""

from __future__ import annotations

import tempfile
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import numpy as np
from route_chains import LAYERS, TOP_K, new_rid
from transport_ways import Array, Opener, Record, Way

SHM = Path("/dev/shm")
MAPPED_RECORDS = 64  # of the largest; what a killed reader holds is not used again

LmdbLocator: TypeAlias = tuple[str, int, bytes]  # folder, bytes to map, key


def _folder() -> tempfile.TemporaryDirectory[str]:
    """In shared memory; removed at the interpreter's end at the latest."""
    return tempfile.TemporaryDirectory(prefix="bench-transports-", dir=SHM)


class FileWay(Way[str]):
    """A file for each record, in a folder of its own; its path is the locator."""

    def __init__(self) -> None:
        self._made = _folder()
        self._folder = Path(self._made.name)

    def publish(self, record: Record, readers: int) -> Sequence[str]:
        path = str(self._folder / new_rid())
        self.save(record.rows, path)
        return [path] * readers

    @abstractmethod
    def save(self, rows: Array, path: str) -> None: ...

    def retire(self) -> None:
        for path in self._folder.iterdir():
            path.unlink()

    def shared_bytes(self) -> int:
        return sum(path.stat().st_blocks * 512 for path in self._folder.iterdir())

    def close(self) -> None:
        self._made.cleanup()


class SafetensorsWay(FileWay):
    """``safetensors.numpy.save_file``."""

    name = "safetensors"
    copied: ClassVar = {"to bytes": 1, "into the file": 1}

    def __init__(self) -> None:
        super().__init__()
        from safetensors.numpy import save_file

        self._save_file = save_file

    def save(self, rows: Array, path: str) -> None:
        self._save_file({"rows": rows}, path)


class SafetensorsOpener(Opener[str]):
    """``safe_open`` with torch, which maps the file; with numpy it would copy."""

    def __init__(self) -> None:
        from safetensors import safe_open

        self._safe_open = safe_open

    def open(self, locator: str) -> Array:
        with self._safe_open(locator, framework="pt") as file:
            rows: Array = file.get_tensor("rows").numpy()
        return rows


class ArrowWay(FileWay):
    """``pyarrow.ipc``: a file of one record batch, its column the rows' bytes."""

    name = "pyarrow IPC file"
    copied: ClassVar = {"into the file": 1}

    def __init__(self) -> None:
        super().__init__()
        import pyarrow

        self._arrow = pyarrow

    def save(self, rows: Array, path: str) -> None:
        column = self._arrow.array(rows.reshape(-1))  # no copy
        batch = self._arrow.record_batch([column], names=["rows"])
        with (
            self._arrow.OSFile(path, "wb") as file,
            self._arrow.ipc.new_file(file, batch.schema) as writer,
        ):
            writer.write_batch(batch)


class ArrowOpener(Opener[str]):
    """Maps the file; its array has no copy of the rows."""

    def __init__(self) -> None:
        import pyarrow

        self._arrow = pyarrow

    def open(self, locator: str) -> Array:
        with self._arrow.ipc.open_file(self._arrow.memory_map(locator)) as reader:
            column = reader.get_batch(0).column(0)
        rows: Array = column.to_numpy(zero_copy_only=True)
        return rows.reshape(-1, LAYERS, TOP_K)


class LmdbWay(Way[LmdbLocator]):
    """LMDB with ``writemap`` and without syncing: a value is written straight into the map.

    What a killed reader had open keeps all later pages from being used again until somebody calls
    ``reader_check``, which is not done here: nobody knows when.
    """

    name = "LMDB"
    copied: ClassVar = {"into the map": 1}
    warm_ups = 3  # what a transaction frees, none before the second after it may use again

    def __init__(self, largest_bytes: int) -> None:
        self._map_bytes = MAPPED_RECORDS * largest_bytes
        self._keys: list[bytes] = []
        self._open()

    def _open(self) -> None:
        import lmdb

        self._made = _folder()
        self._folder = self._made.name
        self._environment: Any = lmdb.open(
            self._folder,
            map_size=self._map_bytes,
            writemap=True,
            sync=False,
            metasync=False,
            map_async=True,
            max_readers=64,
        )

    def renew(self) -> None:
        self.close()
        self._open()

    def publish(self, record: Record, readers: int) -> Sequence[LmdbLocator]:
        key = new_rid().encode()
        with self._environment.begin(write=True) as transaction:
            transaction.put(key, record.rows)
        self._keys.append(key)
        return [(self._folder, self._map_bytes, key)] * readers

    def retire(self) -> None:
        with self._environment.begin(write=True) as transaction:
            while self._keys:
                transaction.delete(self._keys.pop())

    def shared_bytes(self) -> int:
        """Pages of the file that have ever been used: what is freed stays in it."""
        information, page = self._environment.info(), self._environment.stat()["psize"]
        return (information["last_pgno"] + 1) * page

    def close(self) -> None:
        self._environment.close()
        self._made.cleanup()


class LmdbOpener(Opener[LmdbLocator]):
    """A read transaction, which keeps the value's pages from being used again."""

    def __init__(self) -> None:
        self._environment: Any = None
        self._folder = ""

    def open(self, locator: LmdbLocator) -> Array:
        folder, map_bytes, key = locator
        if self._folder != folder:
            import lmdb

            self._folder = folder
            self._environment = lmdb.open(folder, map_size=map_bytes, readonly=True, max_readers=64)
        self._transaction = self._environment.begin(buffers=True)
        value = self._transaction.get(key)
        if value is None:
            raise KeyError(key)
        return np.frombuffer(value, np.uint8).reshape(-1, LAYERS, TOP_K)

    def drop(self) -> None:
        self._transaction.abort()
