"""Reads spoiled files in a process of its own: ``python worker.py FOLDER SEED FIRST LAST [quick]``.

A line of JSON on stdout for each case that went wrong, a last one with the peak of memory. A case that hangs, or takes
more memory than there is, ends the process; the file ``FOLDER/at`` then says which one it was. ``quick`` passes over
what takes a second or more: pictures, and what needs Ray.
"""

from __future__ import annotations

import faulthandler
import io
import json
import logging
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import checkpoints
import corpus
import mutations
from rich.console import Console

from pdiff_plugin import PDiffError, console

LIMIT_S = 10  # of work; where other processes take the cores a case may take longer
HANGS_S = 60
MEMORY_BYTES = 2 << 30
WRITES = {"os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod"}
FORBIDDEN = {"os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect", "socket.bind"}


@dataclass(frozen=True)
class Case:
    """A spoiled file: everything about it follows from the seed and its number."""

    seed: int
    number: int
    target: corpus.Target

    def spoil(self, path: Path, outside: Path) -> str:
        """Put the spoiled file in the place of ``path``; says how."""
        rng = random.Random(f"{self.seed}-{self.number}")
        data = path.read_bytes()
        path.unlink()
        how = rng.random()
        if how < 0.08:
            kind = rng.choice(list(mutations.SPECIAL))
            mutations.SPECIAL[kind](path, outside)
            return kind
        spoil = mutations.spoil_bytes if how < 0.25 else _STRUCTURED.get(path.suffix, mutations.spoil_bytes)
        spoilt, told = spoil(data, rng)
        path.write_bytes(spoilt)
        return told


_STRUCTURED = {
    ".json": mutations.spoil_json,
    ".safetensors": mutations.spoil_safetensors,
    ".csv": mutations.spoil_text,
    ".jsonl": mutations.spoil_text,
    ".pt": checkpoints.spoil,
    ".pth": checkpoints.spoil,
}


def cases(seed: int) -> Iterator[Case]:
    """Spoiled files without end, the same ones for the same seed."""
    rng = random.Random(seed)
    weights = [target.weight for target in corpus.TARGETS]
    for number in count():
        yield Case(seed, number, rng.choices(corpus.TARGETS, weights)[0])


class Guard:
    """Notes whatever is written outside one folder, or run, while it is armed."""

    def __init__(self) -> None:
        self.allowed: Path | None = None
        self.found: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if self.allowed is None or not args:
            return
        if event in FORBIDDEN:
            self.found.append(f"{event} {args[:1]}")
        is_written = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        written = args[1] if event in ("os.link", "os.symlink", "os.rename") else args[0]
        if (is_written or event in WRITES) and isinstance(written, str | bytes | os.PathLike):
            # Not through the last step: what is there may be a link, which is made or removed itself.
            inside = args[1] if event in ("os.remove", "os.rmdir") else -1  # an open folder that the name is in
            start = os.readlink(f"/proc/self/fd/{inside}") if inside >= 0 else os.getcwd()
            folder, name = os.path.split(os.path.abspath(os.path.join(start, os.fsdecode(written))))
            place = os.path.realpath(written) if is_written else os.path.join(os.path.realpath(folder), name)
            if place != os.devnull and not Path(place).is_relative_to(self.allowed):
                self.found.append(f"{event} {place}")


def run(case: Case, folder: Path, guard: Guard) -> dict[str, Any] | None:
    """Read one spoiled file; what went wrong, if anything did."""
    sandbox, out, outside = folder / "sandbox", folder / "out", folder / "decoy" / "outside.json"
    path = sandbox / case.target.path
    kept = path.read_bytes()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    told, wrong = "?", None
    try:
        told = case.spoil(path, outside)
        (folder / "at").write_text(f"{case.number} {case.target.name}: {told}", encoding="utf-8", errors="replace")
        faulthandler.dump_traceback_later(HANGS_S, exit=True)
        began = time.process_time()
        guard.allowed, guard.found = out.resolve(), []
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("error")
            case.target.door(sandbox / case.target.path.partition("/")[0], out)
        if (took := time.process_time() - began) > LIMIT_S:
            wrong = f"took {took:.0f} s"
    except (PDiffError, OSError) as error:
        str(error).encode()  # can be told
        json.dumps(str(error))
    except BaseException as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        own = [f for f in traceback.extract_tb(error.__traceback__) if "pdiff_plugin" in f.filename]
        where = own[-1] if own else at
        wrong = f"{type(error).__name__}: {str(error)[:200]!r} at {Path(where.filename).name}:{where.lineno}"
    finally:
        guard.allowed = None
        faulthandler.cancel_dump_traceback_later()
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)
        path.write_bytes(kept)
    wrong = wrong or (f"touched {guard.found[:3]}" if guard.found else None)
    return None if wrong is None else {"number": case.number, "target": case.target.name, "how": told, "wrong": wrong}


def main(folder: Path, seed: int, first: int, last: int, *, quick: bool) -> None:
    """Run cases ``first`` to ``last`` of a seed."""
    slow = [target for target in corpus.TARGETS if quick and (target.weight < 1 or target.name == "tune.json")]
    report = sys.stdout
    logging.getLogger("pdiff_plugin").addHandler(logging.StreamHandler(io.TextIOWrapper(io.BytesIO(), "utf-8")))
    wide = {"width": 200, "highlight": False, "file": io.StringIO()}
    console.out, console.err = Console(**wide), Console(**wide)
    if not (folder / "sandbox").exists():
        corpus.make(folder / "sandbox")
        (folder / "decoy").mkdir()
        (folder / "decoy" / "outside.json").write_text('{"format": "of somebody else"}')
    for target in corpus.TARGETS:  # as they are: all doors work, and what is imported late is imported
        if target in slow:
            continue
        shutil.rmtree(folder / "out", ignore_errors=True)
        (folder / "out").mkdir()
        target.door(folder / "sandbox" / target.path.partition("/")[0], folder / "out")
    own = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (own + MEMORY_BYTES, own + MEMORY_BYTES))
    tempfile.tempdir = str(folder / "out")  # where torch unpacks what it takes for an archive
    guard = Guard()
    for case in cases(seed):
        if case.number >= last:
            break
        if case.number < first or case.target in slow:
            continue
        if (wrong := run(case, folder, guard)) is not None:
            print(json.dumps(wrong), file=report, flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"done": last, "peak_mb": peak // 1024}), file=report, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:5]), quick="quick" in sys.argv)
