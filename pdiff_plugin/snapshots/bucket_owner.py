"""Who writes to a folder in a bucket: an object there names a process, and says every few seconds that it still lives.

A bucket has no locks. Of two that begin at the same moment, the one whose name stands there in the end goes on; the
other finds that out within seconds, and puts nothing more.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from dataclasses import asdict
from typing import Any
from uuid import uuid4

from pdiff_plugin.errors import FolderInUseError, FormatError
from pdiff_plugin.snapshots.files import check_format, is_number, parse_json
from pdiff_plugin.snapshots.processes import Process, this_process

logger = logging.getLogger(__name__)

FORMAT = "pdiff-owner"
FORMAT_VERSION = 1
OWNER_NAME = "owner.json"
_TELL_EVERY_S = 5.0
_GONE_AFTER_S = 20.0
_LOOK_EVERY_S = 0.5


class BucketOwner:
    """The right to write to a folder of a bucket.

    Args:
        fs: the bucket's file system.
        root: path of the folder in it.
        url: of the folder, for people.
    """

    def __init__(self, fs: Any, root: str, url: str) -> None:
        self.fs, self.root, self.path, self.url = fs, root, f"{root}/{OWNER_NAME}", url
        self.id = uuid4().hex
        self._thread: threading.Thread | None = None
        self._released = threading.Event()
        self._taken_by: str | None = None

    @property
    def is_claimed(self) -> bool:
        """Whether the folder was this process's once."""
        return self._thread is not None

    def claim(self) -> None:
        """Take the folder, once; wait for a while to see whether the process that has it still lives.

        Raises:
            FolderInUseError: it does, or another one has taken it since.
        """
        if not self.is_claimed:
            self._wait_for_its_owner()
            self.fs.makedirs(self.root, exist_ok=True)
            self._tell()
            self._thread = threading.Thread(target=self._go_on_telling, name="pdiff-owner", daemon=True)
            self._thread.start()
        self.check()

    def check(self) -> None:
        """Raise :class:`FolderInUseError` once another process has taken the folder."""
        if self._taken_by is not None:
            raise FolderInUseError(self.url, self._taken_by)

    def release(self) -> None:
        """Leave the folder to others."""
        if self._thread is None:
            return
        self._released.set()
        self._thread.join()
        if self._taken_by is None and self._found().get("id") == self.id:
            self.fs.rm_file(self.path)

    def _wait_for_its_owner(self) -> None:
        first = self._found()
        started, is_told = time.monotonic(), False
        # By its own clock it may be gone for long; by one that is ahead of ours, it would never be.
        while (found := self._found()) and time.time() - found["time"] < _GONE_AFTER_S and found["id"] != self.id:
            process = Process.from_json(found)
            assert process is not None  # as _found makes sure
            if found != first:
                raise FolderInUseError(self.url, str(Process.from_json(found)))
            if process.has_ended() or time.monotonic() - started > _GONE_AFTER_S:
                return
            if not is_told:
                is_told = True
                logger.warning("waiting to see whether %s still writes to %s", process, self.url)
            time.sleep(_LOOK_EVERY_S)

    def _found(self) -> dict[str, Any]:
        where = f"{self.url}/{OWNER_NAME}"
        try:
            found = parse_json(self.fs.cat_file(self.path), where, f"a {FORMAT} document; delete it")
        except FileNotFoundError:
            return {}
        check_format(where, found if isinstance(found, dict) else {}, FORMAT, FORMAT_VERSION)
        if not is_number(found.get("time")) or Process.from_json(found) is None:
            raise FormatError(where, "no process, or no time", f"a {FORMAT} document", "Delete it.")
        return dict(found)

    def _tell(self) -> None:
        document = {"format": FORMAT, "format_version": FORMAT_VERSION, "id": self.id}
        document |= {**asdict(this_process()), "time": time.time()}
        self.fs.pipe_file(self.path, json.dumps(document).encode())

    def _go_on_telling(self) -> None:
        while not self._released.wait(_TELL_EVERY_S):
            try:
                found = self._found()
                if found.get("id", self.id) != self.id:
                    self._taken_by = str(Process.from_json(found))
                    logger.warning("%s", FolderInUseError(self.url, self._taken_by))
                    return
                self._tell()
            except Exception as error:  # not every bucket raises OSError
                logger.warning("could not write to %s, trying again (%s)", self.path, error)
