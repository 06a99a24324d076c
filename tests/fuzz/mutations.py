"""Ways to spoil a file: other values in documents, other tensors, other bytes, and what is no file at all."""

from __future__ import annotations

import json
import os
import random
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

DEEP = 100_000
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


class Raw(str):
    """JSON text that stands for a value."""


NASTY = [
    *(
        Raw(text)
        for text in ("null", "true", "false", "0", "-1", "1", "2", "3", "1.5", "-0.0", '""', '"x"', "[]", "{}")
    ),
    *(Raw(text) for text in ("1e9", "1000000000", "4611686018427387904", "9223372036854775807", "9223372036854775808")),
    *(Raw(text) for text in ("18446744073709551616", "1e308", "1e400", "-1e400", "NaN", "Infinity", "-Infinity")),
    *(Raw(text) for text in ('"\\u001b[31mred"', '"\\ud800"', '"\\u0000"', '"../../decoy/x"', '"%s%n{0}"', '"1e999"')),
    *(Raw(text) for text in ('"\\"><script>alert(1)</script>"', '"$\\\\frac{$"', '"\\u202ex"', '"[red]x[/]"')),
    *(
        Raw(text)
        for text in ("[null]", "[[[]]]", '{"a": 1}', '[1, "x"]', "[1e9, 1e9, 1e9]", "[0]", "[-1]", "[1, 2, 3]")
    ),
    Raw("9" * 5000),
    Raw('"' + "9" * 5000 + '"'),
    Raw('"' + "y" * 100_000 + '"'),
    Raw("[" * DEEP + "]" * DEEP),
    Raw('{"a":' * DEEP + "1" + "}" * DEEP),
    Raw("[" + "0," * 50_000 + "0]"),
]


def dump(value: Any) -> str:
    """``json.dumps`` that knows :class:`Raw`."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)}: {dump(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(dump, value)) + "]"
    return json.dumps(value)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a document."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [(value, key) for key, _ in items]
    return found + [place for container, key in list(found) for place in _places(container[key])]


def spoil_document(document: Any, rng: random.Random) -> str:
    """Change one or two places of a document, in place; says where."""
    told = []
    for _ in range(rng.choice((1, 1, 1, 2))):
        places = _places(document)
        if not places:
            return "an empty document"
        # Shallow places as often as the many deep ones.
        if rng.random() < 0.4:
            places = [(document, key) for key in (document if isinstance(document, dict) else range(len(document)))]
        container, key = rng.choice(places)
        old = container[key]
        how = rng.choice(("value", "value", "value", "value", "gone", "more", "off", "wrapped", "shorter"))
        told.append(f"{how} at {key!r}"[:60])
        if how == "value":
            container[key] = rng.choice(NASTY)
            told[-1] += f" = {container[key][:30]}"
        elif how == "gone":
            del container[key]
        elif how == "more" and isinstance(container, dict):
            container[rng.choice(("extra", "", "\x1b[2J", "a.b", "__class__"))] = rng.choice(NASTY)
        elif how == "more":
            container.extend([old] * rng.choice((1, 1, 100)))
        elif how == "off" and isinstance(old, int | float):
            container[key] = old + rng.choice((-1, 1, 0.5, 10**6))
        elif how == "shorter" and isinstance(old, list | str):
            container[key] = old[: len(old) // 2]
        else:
            container[key] = [old]
    return ", ".join(told)


def spoil_json(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """A JSON document with another value somewhere, or another one altogether."""
    if rng.random() < 0.05:
        return rng.choice(NASTY).encode(), "another document"
    document = json.loads(data)
    told = spoil_document(document, rng)
    return dump(document).encode("utf-8", "surrogatepass"), told


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and body of a safetensors file."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _joined(header: str, body: bytes) -> bytes:
    text = header.encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + body


def spoil_safetensors(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """A tensor file with another header, other metadata, or other tensors that are stored as they should be."""
    header, body = split(data)
    how = rng.choice(("metadata", "metadata", "metadata", "header", "length", "tensor", "tensor", "tensor"))
    if how == "header":
        told = spoil_document(header, rng)
        return _joined(dump(header), body), f"header: {told}"
    if how == "length":
        length = rng.choice((0, 1, 2**63, 2**64 - 1, len(data), len(data) * 2, 100_000_001))
        return length.to_bytes(8, "little") + data[8:], f"header of {length} bytes"
    metadata = header.pop("__metadata__", {})
    if how == "metadata" and metadata:
        told = _spoil_metadata(metadata, rng)
        return _joined(dump({"__metadata__": metadata, **header}), body), told
    tensors = {name: [one["dtype"], one["shape"], body[slice(*one["data_offsets"])]] for name, one in header.items()}
    told = _spoil_tensors(tensors, rng) if tensors else "no tensors"
    return _with_tensors(metadata, tensors), told


def _with_tensors(metadata: dict[str, str], tensors: dict[str, list[Any]]) -> bytes:
    document: dict[str, Any] = {"__metadata__": metadata}
    body = b""
    for name, (dtype, shape, data) in sorted(tensors.items(), key=lambda one: -ITEM_BYTES[one[1][0]]):
        document[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps(document)
    return _joined(text + " " * (-(8 + len(text.encode())) % 8), body)


def _spoil_metadata(metadata: dict[str, str], rng: random.Random) -> str:
    key = rng.choice(list(metadata))
    try:
        document = json.loads(metadata[key])
    except ValueError:
        document = None
    if isinstance(document, dict | list) and document and rng.random() < 0.8:
        told = spoil_document(document, rng)
        metadata[key] = dump(document).encode("utf-8", "replace").decode()
        return f"{key} in the header: {told}"
    if rng.random() < 0.2:
        del metadata[key]
        return f"no {key} in the header"
    metadata[key] = str(rng.choice(NASTY))
    return f"{key} in the header = {metadata[key][:30]}"


def _spoil_tensors(tensors: dict[str, list[Any]], rng: random.Random) -> str:
    name = rng.choice(list(tensors))
    dtype, shape, data = tensors[name]
    size = ITEM_BYTES[dtype]
    num = len(data) // size
    how = rng.choice(
        ("dtype", "shape", "values", "values", "order", "gone", "renamed", "scalar", "empty", "fewer", "more")
    )
    if how == "dtype":
        other = rng.choice([one for one in ITEM_BYTES if one != dtype])
        raw = (data * 8)[: num * ITEM_BYTES[other]]
        tensors[name] = [other, shape, bytes(num) if other == "BOOL" else raw]
        how = f"dtype {other}"
    elif how == "shape":
        tensors[name][1] = rng.choice(([num], [1, *shape], [*shape, 1], [num, 1], list(reversed(shape))))
    elif how == "values":
        filler = rng.choice((b"\xff", b"\x00", b"\x7f", b"\x80", b"\x01", b"\xfe"))
        first = rng.randrange(num) if num else 0
        last = rng.choice((num, first + 1))
        if dtype == "BOOL":
            filler = b"\x01"
        tensors[name][2] = data[: first * size] + filler * (last - first) * size + data[last * size :]
    elif how == "order":
        items = [data[place * size : (place + 1) * size] for place in range(num)]
        items = rng.choice((items[::-1], items[:1] * num, sorted(items), rng.sample(items, num)))
        tensors[name][2] = b"".join(items)
    elif how == "gone":
        del tensors[name]
    elif how == "renamed":
        tensors[rng.choice(("other", f"{name}.0", "", "\x1b[2J", "a..b"))] = tensors.pop(name)
    elif how == "scalar":
        tensors[name][1:] = [[], data[:size] or bytes(size)]
    elif how == "empty":
        tensors[name][1:] = [rng.choice(([0], [0, *shape[1:]], [*shape[:-1], 0], [0, 2**62], [2**31, 2**31, 0])), b""]
    elif how == "fewer" and shape and shape[0] > 1:
        tensors[name][1:] = [[shape[0] - 1, *shape[1:]], data[: -(len(data) // shape[0])]]
    elif shape and shape[0]:
        tensors[name][1:] = [[2 * shape[0], *shape[1:]], data * 2]
    return f"tensor {name!r}: {how}"


def spoil_text(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """A table, or lines of JSON, with another cell or another line."""
    lines = data.decode().splitlines()
    place = rng.randrange(len(lines))
    cells = lines[place].split(",")
    nasty = rng.choice((*NASTY, '"', '"""', "\x00", "\x1b[2J", "=1+1", "9" * 5000, "x" * 200_000, "[", "1,2,3,4", ";"))
    how = rng.choice(("cell", "cell", "cell", "row", "twice", "gone"))
    if how == "cell":
        cells[rng.randrange(len(cells))] = nasty
        lines[place] = ",".join(cells)
    elif how == "row":
        lines[place] = nasty
    elif how == "twice":
        lines.insert(place, lines[place])
    else:
        del lines[place]
    return "\n".join(lines).encode("utf-8", "surrogatepass"), f"{how} of line {place + 1}: {nasty[:30]!r}"


def spoil_bytes(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Cut short, with other bits, or something else."""
    how = rng.choice(("cut", "cut", "bits", "bits", "bits", "garbage", "empty", "longer", "zeros", "hole"))
    if how == "cut":
        length = rng.randrange(len(data)) if rng.random() < 0.5 else max(0, len(data) - rng.randint(1, 16))
        return data[:length], f"cut to {length} bytes"
    if how == "bits":
        changed, limit = bytearray(data), min(len(data), rng.choice((8, 200, 2000, len(data))))
        for _ in range(rng.choice((1, 1, 3, 30))):
            changed[rng.randrange(limit)] ^= 1 << rng.randrange(8)
        return bytes(changed), f"other bits in the first {limit} bytes"
    if how == "hole":
        first = rng.randrange(len(data))
        return data[:first] + data[first + rng.randint(1, 100) :], f"a hole at byte {first}"
    other = {"garbage": rng.randbytes(rng.choice((1, 7, 8, 9, 1000))), "empty": b"", "longer": data + rng.randbytes(9)}
    return other.get(how, bytes(len(data))), how


def _fifo(path: Path, _: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path, _: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        here = os.getcwd()
        os.chdir(path.parent)  # a socket's path has at most 107 characters
        try:
            made.bind(path.name)
        finally:
            os.chdir(here)


def _unreadable(path: Path, decoy: Path) -> None:
    path.write_bytes(decoy.read_bytes())
    path.chmod(0)  # root reads it all the same


SPECIAL: dict[str, Callable[[Path, Path], None]] = {
    "a FIFO": _fifo,
    "a socket": _socket,
    "a folder": lambda path, _: path.mkdir(),
    "nothing": lambda path, _: None,
    "a dangling link": lambda path, _: path.symlink_to(path.with_name("nowhere")),
    "a link to itself": lambda path, _: path.symlink_to(path.name),
    "a link to the folder above": lambda path, _: path.symlink_to(".."),
    "a link out of the sandbox": lambda path, decoy: path.symlink_to(decoy),
    "a link to /dev/zero": lambda path, _: path.symlink_to("/dev/zero"),
    "an unreadable file": _unreadable,
}
