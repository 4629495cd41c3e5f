#!/usr/bin/env python
"""Damages small files of every format that can be imported, and imports them.

Each must be refused with a UsageError that leaves nothing behind, or give a dataset that is in order: its files are
whole, no episode is longer than the file, and no transition leads from one episode of the source into another where the
file has the means to tell. Changes that keep the content (another compression, order, layout) must give the source
again. Nothing in a file may be run, or be read from outside of its folder. A crash, or ten seconds without a result, is
a failure too.

    scripts/fuzz_importers.py --count 100000 --seed 0 --processes 2
    scripts/fuzz_importers.py --only 4711 --keep case      # one file again, kept for a look
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import mmap
import os
import pickle
import pickletools
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

Files = dict[str, bytes]
"""By path inside the folder; "" is a format of a single file."""

MEMORY = 3 * 2**30
SECONDS = 10
GOOD = ("refused", "read", "same")
CANARY = "canary"
NUMBERS = (0, 1, -1, 2, 127, 255, 256, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63 - 1, -(2**63), 10**12)


def makers() -> list[Callable[[Path], Any]]:
    """What makes the sources."""
    from tests import dataset_files as files

    return [
        files.d4rl,
        lambda p: files.d4rl(p, compression="gzip", shuffle=True, chunks=True),
        lambda p: files.d4rl(p, following=False),
        files.minari,
        files.minari_parquet,
        files.robomimic,
        files.ogbench,
        lambda p: files.table(p, "npz"),
        lambda p: files.table(p, "parquet"),
        lambda p: files.table(p, "csv"),
        files.imitation,
        files.imitation_folder,
        files.sb3,
        lambda p: files.sb3(p, environments=2, protocol=2),
        lambda p: files.sb3(p, kind="DictReplayBuffer", protocol=4),
        files.lerobot,
        lambda p: files.lerobot(p, "v2.1"),
        lambda p: files.lerobot(p, video=True),
    ]


LINKED = ("d4rl", "minari", "robomimic", "sb3", "lerobot", "csv", "npz", "parquet", "imitation-folder")
"""Sources that say twice where an episode ends, so that no single change can join two."""

EXPLICIT = ("d4rl", "robomimic", "sb3", "csv", "npz", "parquet")
"""Formats with an array of next observations."""


def build_sources(folder: Path) -> None:
    """Write the sources below `folder`, and what they hold to sources.pkl (ours, and read back by us alone)."""
    found = []
    for i, make in enumerate(makers()):
        home = folder / f"source-{i}"
        home.mkdir()
        file = make(home)
        found.append(file)
    (folder / "sources.pkl").write_bytes(pickle.dumps(found))


def content(path: Path) -> Files:
    """All files of a source."""
    if path.is_file():
        return {"": path.read_bytes()}
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


# --- changes that keep the content ------------------------------------------------------------------------------------


def keep_json(random: Random, value: bytes) -> bytes:
    """Spaces, another order, a key that nobody knows."""
    tree = json.loads(value)
    if random.random() < 0.3 and isinstance(tree, dict):
        tree["unheard of"] = [1, {"a": None}]
    return json.dumps(tree, indent=random.choice([None, 1, 7]), sort_keys=random.random() < 0.5).encode()


def keep_parquet(random: Random, value: bytes) -> bytes:
    """Other row groups, compression and encodings."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.ParquetFile(pa.BufferReader(value)).read(use_threads=False)
    out = io.BytesIO()
    pq.write_table(
        table,
        out,
        row_group_size=random.randint(1, 20),
        compression=random.choice(["none", "snappy", "gzip", "zstd", "lz4"]),
        use_dictionary=random.random() < 0.5,
        data_page_version=random.choice(["1.0", "2.0"]),
        data_page_size=random.choice([16, 1024]),
        store_schema=random.random() < 0.5,
        write_page_checksum=random.random() < 0.5,
    )
    return out.getvalue()


def keep_npz(random: Random, value: bytes) -> bytes:
    """Members in another order, compressed or not, in Fortran's order."""
    arrays = list(read_npz(value).items())
    random.shuffle(arrays)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for name, raw in arrays:
            kept = raw
            if b"'|O'" not in raw[:200] and random.random() < 0.3:
                again = io.BytesIO()
                np.lib.format.write_array(again, np.asfortranarray(np.load(io.BytesIO(raw))))
                kept = again.getvalue()
            file.writestr(name, kept, random.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
    return out.getvalue()


def keep_hdf5(random: Random, value: bytes) -> bytes:
    """Arrays in chunks, compressed."""
    import h5py

    with h5py.File(io.BytesIO(value), "r+") as file:
        names: list[str] = []
        file.visititems(lambda name, node: names.append(name) if isinstance(node, h5py.Dataset) else None)
        for name in random.sample(names, random.randint(1, len(names))):
            array, attributes = file[name][()], dict(file[name].attrs)
            del file[name]
            how = random.choice([{}, {"chunks": True}, {"compression": "gzip"}, {"fletcher32": True}])
            file.create_dataset(name, data=array, **how).attrs.update(attributes)
        out = io.BytesIO()
        with h5py.File(out, "w") as other:
            for key, attribute in file.attrs.items():
                other.attrs[key] = attribute
            for key in file:
                file.copy(key, other)
        return out.getvalue()


def keep_pickle(random: Random, value: bytes) -> bytes:
    """Something is put on the stack and taken from it."""
    at = random.choice(places_of(value)[1:])
    return value[:at] + random.choice([b"N0", b"K\x070", b"}0", b"(t0"]) + value[at:]


@functools.lru_cache(32)
def places_of(value: bytes) -> list[int]:
    """Where the opcodes of a pickle are."""
    return [place for _, _, place in pickletools.genops(value)]


def keep_csv(random: Random, value: bytes) -> bytes:
    """Other line ends."""
    return value.replace(b"\n", b"\r\n") if random.random() < 0.5 else value.rstrip(b"\n")


def keep_arrow(random: Random, value: bytes) -> bytes:
    """Blocks of other sizes."""
    import pyarrow as pa

    table = pa.ipc.open_stream(value).read_all()
    out = io.BytesIO()
    with pa.ipc.new_stream(out, table.schema) as stream:
        stream.write_table(table, max_chunksize=random.randint(1, 3))
    return out.getvalue()


def kind_of(name: str, value: bytes) -> str:
    """What a file is by its first bytes, or its name."""
    if value.startswith(b"PK"):
        return "npz"
    if value.startswith(b"\x89HDF"):
        return "hdf5"
    if value.startswith(b"PAR1"):
        return "parquet"
    if name.endswith(".arrow"):
        return "arrow"
    if name.endswith(".jsonl"):
        return "jsonl"
    if value[:1] == b"{":
        return "json"
    if value[:1] == b"\x80":
        return "pickle"
    if name.endswith(".mp4"):
        return "mp4"
    return "csv"


KEEPERS = {
    "json": keep_json,
    "parquet": keep_parquet,
    "npz": keep_npz,
    "hdf5": keep_hdf5,
    "pickle": keep_pickle,
    "csv": keep_csv,
    "arrow": keep_arrow,
}


def kept(random: Random, files: Files) -> Files:
    """Each file written anew, or not."""
    out = {}
    for name, value in files.items():
        keeper = KEEPERS.get(kind_of(name, value))
        out[name] = keeper(random, value) if keeper and (random.random() < 0.7 or len(files) == 1) else value
    if "" not in files and random.random() < 0.3:
        out["README.md"] = b"# Some data"
    return out


# --- changes that damage ----------------------------------------------------------------------------------------------


def damage_bytes(random: Random, value: bytes, others: list[Files]) -> bytes:
    """Bytes are flipped, cut off, put elsewhere, or taken from another file."""
    data = bytearray(value)
    if not data:
        return random.randbytes(random.randint(1, 50))
    at = random.randrange(len(data))
    if random.random() < 0.3:  # headers and footers are where structure is
        at = min(len(data) - 1, int(random.expovariate(1 / 60)))
        at = at if random.random() < 0.5 else len(data) - 1 - at
    end = min(len(data), at + int(random.expovariate(1 / 40)) + 1)
    match random.randrange(9):
        case 0:
            for _ in range(random.choice([1, 1, 2, 8])):
                data[random.randrange(len(data)) if random.random() < 0.3 else at] ^= 1 << random.randrange(8)
        case 1:
            data[at:end] = random.randbytes(end - at)
        case 2:
            del data[at:]
        case 3:
            data[at:end] = bytes(end - at)
        case 4:
            data[end:end] = data[at:end] * random.choice([1, 1, 3])
        case 5:
            del data[at:end]
        case 6:
            other = random.choice(list(random.choice(others).values())) or b"x"
            start = random.randrange(len(other))
            data[at:end] = other[start : start + random.randint(1, 300)]
        case 7:
            width = random.choice(["<i", "<q", ">i", "<h"])
            number = random.choice(NUMBERS) % 2 ** (8 * struct.calcsize(width))
            data[at : at + struct.calcsize(width)] = number.to_bytes(struct.calcsize(width), "little")
        case 8:
            start = random.randrange(len(data))
            data[at:end] = data[start : start + end - at]
    return bytes(data)


def damage_json(random: Random, value: bytes) -> bytes:
    """A value somewhere in the tree becomes another one."""
    tree = json.loads(value)
    spots: list[tuple[Any, Any]] = []

    def visit(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            spots.append((node, key))
            if isinstance(node[key], dict | list):
                visit(node[key])

    visit(tree)
    if not spots:
        return b"[]"
    node, key = random.choice(spots)
    old = node[key]
    if isinstance(old, str) and old.startswith("{") and old.endswith("}") and random.random() < 0.8:
        with contextlib.suppress(ValueError):  # JSON within JSON, or a template
            node[key] = damage_json(random, old.encode()).decode()
            return json.dumps(tree).encode()
    deep: Any = 1
    for _ in range(random.choice([3, 3000])):
        deep = [deep]
    paths = [
        f"../{CANARY}/x",
        f"/dev/shm/{CANARY}",
        "..",
        "a/../../b",
        "{x}",
        "{chunk_index:999999999d}",
        "{0.__class__}",
    ]
    same_kind = [node[k] for node, k in spots if type(node[k]) is type(old)]
    choice = random.randrange(9)
    if choice == 0 and isinstance(node, dict):
        del node[key]
    elif choice == 1:
        node[key] = random.choice(NUMBERS)
    elif choice == 2:
        node[key] = random.choice([None, True, "", [], {}, [[]], {"a": 1}, 1.5, "float32", "O", "V8", "U9", "<f4"])
    elif choice == 3:
        node[key] = random.choice([float("nan"), float("inf"), 1e308, -1e-308, 10**400])
    elif choice == 4:
        node[key] = random.choice(paths)
    elif choice == 5:
        node[key] = deep
    elif choice == 6:
        node[key] = random.choice(same_kind)
    elif choice == 7 and isinstance(old, int | float):
        node[key] = old + random.choice([-1, 1, 0.5, 100, -2 * old])
    elif isinstance(old, str) and old:
        at = random.randrange(len(old))
        node[key] = old[:at] + random.choice(["", "\0", "/", "\ud800", "é", "{", "}", "9"]) + old[at + 1 :]
    elif isinstance(old, list):
        node[key] = old[: len(old) // 2] if random.random() < 0.5 else old + old
    try:
        return json.dumps(tree).encode()
    except (RecursionError, UnicodeError):
        return b"[" * 100_000


def damage_lines(random: Random, value: bytes) -> bytes:
    """Lines are lost, swapped or doubled; cells change."""
    lines = value.split(b"\n")
    at, other = random.randrange(len(lines)), random.randrange(len(lines))
    match random.randrange(6):
        case 0:
            del lines[at]
        case 1:
            lines[at], lines[other] = lines[other], lines[at]
        case 2:
            lines.insert(other, lines[at])
        case 3:
            cells = lines[at].split(b",")
            odd = [b"", b"nan", b"inf", b"-1", b"1e999", b'"', b"0x10", b"true", b"\xff", b"1_000", b"9" * 400, b" "]
            cells[random.randrange(len(cells))] = random.choice(odd)
            lines[at] = b",".join(cells)
        case 4:
            lines[at] += b"," * random.choice([1, 1, 2000])
        case 5:
            if lines[at][:1] == b"{":
                lines[at] = damage_json(random, lines[at])
            else:
                lines[at] = lines[at][: len(lines[at]) // 2]
    return b"\n".join(lines)


def damage_parquet(random: Random, value: bytes) -> bytes:
    """The table is written anew with a column or a row less, more, or other than it was."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.ParquetFile(pa.BufferReader(value)).read(use_threads=False)
    names, rows = table.column_names, len(table)
    name = random.choice(names)
    at, column = names.index(name), table[name].combine_chunks()
    order = list(range(rows))
    match random.randrange(10):
        case 0:
            table = table.drop_columns([name])
        case 1:
            order[random.randrange(rows)] = random.randrange(rows)
            table = table.take(order)
        case 2:
            table = table.slice(0, random.randrange(rows))
        case 3:
            table = pa.concat_tables([table, table.slice(random.randrange(rows))])
        case 4:
            values = column.to_pylist()
            values[random.randrange(rows)] = None
            table = table.set_column(at, name, pa.array(values, column.type))
        case 5:
            kind = random.choice([pa.string(), pa.float16(), pa.int8(), pa.float64(), pa.bool_(), pa.uint64()])
            with contextlib.suppress(pa.ArrowInvalid, pa.ArrowNotImplementedError):
                table = table.set_column(at, name, column.cast(kind, safe=False))
        case 6:
            table = table.rename_columns(
                [random.choice(["x", "", "action", n + "."]) if n == name else n for n in names]
            )
        case 7:
            values = column.to_pylist()
            spot = random.randrange(rows)
            old = values[spot]
            odd = {int: random.choice(NUMBERS), float: random.choice([float("nan"), float("inf"), 1e300, 0.123])}
            with contextlib.suppress(pa.ArrowInvalid, OverflowError, TypeError):
                values[spot] = odd.get(type(old), old[:-1] if isinstance(old, list | str) else not old)
                kind = pa.list_(column.type.value_type) if pa.types.is_fixed_size_list(column.type) else column.type
                table = table.set_column(at, name, pa.array(values, kind))
        case 8:
            table = table.set_column(at, name, table[random.choice(names)])
        case 9:
            table = pa.concat_tables(
                [table.slice(0, 0)] if random.random() < 0.3 else [table.slice(1), table.slice(0, 1)]
            )
    out = io.BytesIO()
    pq.write_table(table, out, row_group_size=random.randint(1, 20))
    return out.getvalue()


def read_npz(value: bytes) -> Files:
    """The raw members of an .npz."""
    with zipfile.ZipFile(io.BytesIO(value)) as file:
        return {name: file.read(name) for name in file.namelist()}


def damage_npz(random: Random, value: bytes) -> bytes:
    """A member's header or content changes, in a zip that is whole."""
    members = read_npz(value)
    name = random.choice(list(members))
    raw = members[name]
    end = raw.index(b"\n") + 1
    header, body = raw[:end], raw[end:]
    whole = b"'|O'" not in header
    choice = random.randrange(9)
    if choice == 0:
        del members[name]
    elif choice == 1:
        digits = [i for i, c in enumerate(header) if chr(c).isdigit() and i > 10]
        at = random.choice(digits)
        members[name] = header[:at] + str(random.randrange(10)).encode() + header[at + 1 :] + body
    elif choice == 2:
        kinds = [b"'<f4'", b"'<f8'", b"'<i8'", b"'|b1'", b"'|O'", b"'<U4'", b"'|V4'", b"'>f4'", b"'<c8'", b"'<M8'"]
        before = header.split(b"'descr': ")[1].split(b",")[0]
        members[name] = header.replace(before, random.choice(kinds)) + body
    elif choice == 3:
        members[name] = header.replace(b"False", b"True ") + body
    elif choice == 4 and whole:
        array = np.load(io.BytesIO(raw))
        array = random.choice(
            [
                lambda: array[:-1],
                lambda: np.concatenate([array, array]),
                lambda: array[None],
                lambda: array.reshape(-1),
                lambda: array.astype(random.choice(["f2", "f8", "i4", "u1", "bool", "c8", "S3", "O"])),
                lambda: array * np.array(np.nan),
                lambda: -array.astype(float),
                lambda: array[::-1],
                lambda: array[:0],
            ]
        )()
        out = io.BytesIO()
        np.save(out, array, allow_pickle=True)
        members[name] = out.getvalue()
    elif choice == 5:
        members[name] = header + damage_bytes(random, body, [{"": raw}])
    elif choice == 6:
        members[name] = header + body[: len(body) // 2]
    elif choice == 7:
        members[random.choice(["x.npy", "obs.npy", "rewards.npy", "../x.npy"])] = raw
    else:
        members[name] = header + pickle.dumps(Bomb())
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        for member, raw in members.items():
            file.writestr(member, raw)
    return out.getvalue()


class Bomb:
    """Runs something when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("exit 3",)


def damage_hdf5(random: Random, value: bytes) -> bytes:
    """A group or array is lost, changed, or a link."""
    import h5py

    out = io.BytesIO(value)
    with h5py.File(out, "r+") as file:
        names: list[str] = []
        file.visit(names.append)
        name = random.choice(names)
        node = file[name]
        is_array = isinstance(node, h5py.Dataset)
        choice = random.randrange(9)
        if choice == 0:
            del file[name]
        elif choice == 1:
            other = random.choice(names)
            if not name.startswith(other):
                del file[name]
                file[name] = random.choice([h5py.SoftLink("/" + other), h5py.ExternalLink("/etc/passwd", "/x")])
        elif choice == 2 and node.attrs:
            key = random.choice(list(node.attrs))
            node.attrs[key] = random.choice([-1, 2**40, "x", "{}", 1.5, np.arange(3), np.nan])
        elif is_array and choice in (3, 4, 5):
            array = node[()]
            del file[name]
            if not array.shape:
                array = array[None]
            changed = random.choice(
                [
                    lambda: array[:-1],
                    lambda: np.concatenate([array, array]),
                    lambda: array.astype(random.choice(["f2", "f8", "i4", "u1", "S3"])),
                    lambda: array * np.array(np.nan),
                    lambda: array[None],
                    lambda: array[::-1],
                    lambda: array[:0],
                    lambda: np.roll(array, 1, 0),
                ]
            )
            file.create_dataset(name, data=changed())
        elif is_array and choice == 6:
            del file[name]
            file.create_dataset(name, (10**12, 3), "f4", chunks=(1000, 3))
        elif is_array and choice == 7:
            del file[name]
            file.create_group(name)
        else:
            file[f"{name}-again" if random.random() < 0.5 else "more"] = node
    return out.getvalue()


def damage_pickle(random: Random, value: bytes) -> bytes:
    """Opcodes and their arguments change; calls are put in."""
    places = places_of(value)
    i = random.randrange(len(places) - 1)
    at, end = places[i], places[i + 1]
    j = random.randrange(len(places) - 1)
    payloads = [
        pickle.dumps(Bomb())[2:-1],
        b"cposix\nsystem\n(\x8c\x06exit 3tR",
        b"cbuiltins\neval\n(\x8c\x0a__import__tR",
        b"cnumpy\nload\n(\x8c\x01xtR",
        b"c__builtin__\ngetattr\n",
        b"\x8e" + struct.pack("<Q", 2**40),
        b"r" + struct.pack("<I", 2**32 - 1),
        b"\x8a\xff",
        b"P1\n",
        b"\x82\x01",
        b"(" * 10_000,
        b"]" + b"(l" * 3000,
        b"\x8f(N\x90",
        b"".join(b"\x86q%ch%ch%c" % (k, k, k) for k in range(60)),
        b")" + b"\x85" * 50_000,
    ]
    match random.randrange(6):
        case 0:
            return value[:at] + random.choice(list(pickletools.code2op)).encode("latin1") + value[at + 1 :]
        case 1:
            return value[:at] + value[end:]
        case 2:
            return value[:end] + value[at:end] + value[end:]
        case 3:
            return value[:at] + random.choice(payloads) + value[at:]
        case 4:
            return value[:at] + value[places[j] : places[j + 1]] + value[end:]
        case _:
            inner = bytearray(value[at:end])
            inner[-1] = (inner[-1] + random.choice([1, -1, 64])) % 256
            return value[:at] + bytes(inner) + value[end:]


DAMAGERS: dict[str, Callable[[Random, bytes], bytes]] = {
    "json": damage_json,
    "jsonl": damage_lines,
    "csv": damage_lines,
    "parquet": damage_parquet,
    "npz": damage_npz,
    "hdf5": damage_hdf5,
    "pickle": damage_pickle,
}


def damaged(random: Random, files: Files, others: list[Files]) -> Files:
    """One file of a source damaged, or lost, or another in its place."""
    out = dict(files)
    name = random.choice(list(files))
    if "" not in files and random.random() < 0.08:
        match random.randrange(4):
            case 0:
                del out[name]
            case 1:
                out[name] = b""
            case 2:
                out[name] = out[random.choice(list(files))]
            case 3:
                out[name + "~"] = out.pop(name)
        return out
    value = out[name]
    damager = DAMAGERS.get(kind_of(name, value))
    if damager is not None and random.random() < 0.5:
        with contextlib.suppress(Exception):  # what was damaged before, and cannot be taken apart again
            out[name] = damager(random, value)
            return out
    out[name] = damage_bytes(random, value, others)
    return out


# --- one file ---------------------------------------------------------------------------------------------------------


def follows(place: Path) -> bool:
    """Whether this D4RL file still has next observations; one that lost them tells of ends by its flags alone."""
    import h5py

    with h5py.File(place) as file:
        return "next_observations" in file


class Hang(BaseException):
    """The alarm went off."""


class Fuzzer:
    """Makes files and imports them; in a process of its own."""

    def __init__(self, folder: Path, seed: int) -> None:
        from ctrlrl.data.importers import import_dataset
        from ctrlrl.data.importers.base import ImportOptions

        self._import, self._options = import_dataset, ImportOptions
        self.sources: list[Any] = pickle.loads((folder / "sources.pkl").read_bytes())
        self.contents = [content(source.path) for source in self.sources]
        self.seed = seed
        self.folder = folder / f"work-{os.getpid()}"
        self.run: list[str] = []

    def prepare(self, i: int) -> tuple[Any, bool, Files, Path, Path]:
        """The i-th file, written: its source, whether it should be the same, its content, its place, and the folder."""
        random = Random(f"{self.seed}:{i}")
        number = i % len(self.sources)
        source, files = self.sources[number], self.contents[number]
        preserving = random.random() < 0.1
        changed = kept(random, files) if preserving else files
        if not preserving:
            for _ in range(random.choice([1, 1, 1, 2, 4])):
                changed = damaged(random, changed, self.contents) or changed
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        place = self.folder / source.path.name
        if "" in files:
            place.write_bytes(changed.get("", b""))
        else:
            place.mkdir()
            for name, value in changed.items():
                target = place / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(value)
        if changed == files:
            preserving = True
        return source, preserving, changed, place, self.folder

    def case(self, i: int) -> tuple[str, str, str]:
        """Import the i-th file; the source's name, the outcome, and what was wrong."""
        source, preserving, _, place, folder = self.prepare(i)
        out = folder / "out"
        self.run.clear()
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            outcome, why = self._outcome(source, place, out, preserving)
        except Hang:
            outcome, why = "hang", "".join(traceback.format_exc(limit=-3))
        except BaseException:
            outcome, why = "wrong", traceback.format_exc()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        if self.run:
            outcome, why = "executed", ", ".join(self.run)
        left = (
            {entry.name for entry in os.scandir(folder)}
            - {place.name}
            - ({"out"} if outcome in ("read", "same") else set())
        )
        if left and outcome in GOOD:
            outcome, why = "leftover", ", ".join(sorted(left))
        return source.name, outcome, why

    def _outcome(self, source: Any, place: Path, out: Path, preserving: bool) -> tuple[str, str]:
        from ctrlrl.errors import UsageError
        from tests.dataset_files import differences

        try:
            data, _ = self._import(place, out, source.format, self._options(**source.options))
        except UsageError as error:
            message = str(error)
            if preserving:
                return "wrong", f"the same content was refused: {message}"
            if len(message) > 3000 or str(self.folder) not in message:
                return "wrong", f"a message that is too long, or names no file: {message[:500]}"
            message.encode()  # can be printed
            return "refused", ""
        data.verify()
        entry = ""
        if isinstance(data.observation, dict):
            entry = "state" if "state" in data.observation else next(iter(data.observation))
        found = differences(data, source.episodes, entry=entry)
        if not found:
            return "same", ""
        if preserving:
            return "wrong", f"the same content gave other episodes: {found}"
        return self._in_order(source, data, entry, place)

    def _in_order(self, source: Any, data: Any, entry: str, place: Path) -> tuple[str, str]:
        """Whether a dataset that is not the source could still be what the file says."""
        limit = 40 + 4 * source.rows  # parts may have been doubled
        if data.num_transitions > limit:
            return "wrong", f"{data.num_transitions} transitions of {source.rows}"
        if not (data.terminated | data.truncated).all():
            return "wrong", "an episode ends without a flag"
        if not source.name.startswith(LINKED) or (source.format == "d4rl" and not follows(place)):
            return "read", ""
        of = {
            np.asarray(row).tobytes(): number
            for number, episode in enumerate(source.episodes)
            for row in episode.observation
        }
        # By observation, the action that followed: a row with another one was made by the damage, and is what it is.
        followed = {
            np.asarray(row).tobytes(): np.asarray(action).tobytes()
            for episode in source.episodes
            for row, action in zip(episode.observation, episode.action, strict=False)
        }
        for i in range(data.num_episodes):
            episode = data.episode(i)
            observation = episode.observation[entry] if entry else episode.observation
            if isinstance(observation, list) or observation.shape[1:] != (3,) or observation.dtype != np.float32:
                continue
            known = [of.get(row.tobytes()) for row in observation]
            for t, action in enumerate(episode.action):
                if followed.get(observation[t].tobytes()) != np.asarray(action).tobytes():
                    known[t] = None
            if source.format in EXPLICIT:  # the last of these is what the file says follows
                known = known[:-1]
            if any(now is not None and then is not None and now != then for now, then in pairwise(known)):
                return "joined", f"episode {i} leads from one episode of the source into another: {known}"
        return "read", ""


def work(folder: Path, seed: int, start: int, stop: int, step: int, progress: Path) -> None:
    """Import files start, start + step, ... and print a line for each."""
    signal.signal(signal.SIGALRM, _alarm)
    import pyarrow as pa

    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    os.fsync = lambda handle: None  # type: ignore[assignment]
    fuzzer = Fuzzer(folder, seed)
    fuzzer.case(start)  # so that all modules are there before the limits
    sys.addaudithook(lambda event, arguments: _watch(fuzzer, event, arguments))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with open(progress, "r+b") as file:
        at = mmap.mmap(file.fileno(), 8)
    for i in range(start, stop, step):
        at[:] = struct.pack("<q", i)
        name, outcome, why = fuzzer.case(i)
        os.write(1, json.dumps([i, name, outcome, why]).encode() + b"\n")
    shutil.rmtree(fuzzer.folder, ignore_errors=True)


def _alarm(*arguments: Any) -> None:
    raise Hang


def _watch(fuzzer: Fuzzer, event: str, arguments: Any) -> None:
    if event in ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "pickle.find_class") or (
        event == "open" and isinstance(arguments[0], str) and (CANARY in arguments[0] or "/etc/pass" in arguments[0])
    ):
        fuzzer.run.append(f"{event} {str(arguments)[:200]}")


# --- all files --------------------------------------------------------------------------------------------------------


class Pool:
    """Processes that import; one that dies or hangs is replaced, and goes on behind the file it died of."""

    def __init__(self, folder: Path, seed: int, count: int, processes: int) -> None:
        self.folder, self.seed, self.count, self.step = folder, seed, count, processes
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.failures: list[tuple[int, str, str, str]] = []
        self._lock = threading.Lock()

    def run(self) -> None:
        """Until all files are through."""
        threads = [threading.Thread(target=self._attend, args=(k,)) for k in range(self.step)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _attend(self, k: int) -> None:
        progress, names = self.folder / f"progress-{k}", self._names()
        start = k
        while start < self.count:
            progress.write_bytes(struct.pack("<q", start))
            command = [sys.executable, __file__, "--worker", str(self.folder), str(start), str(self.count)]
            command += [str(self.step), str(progress), "--seed", str(self.seed)]
            environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
            errors = self.folder / f"errors-{k}"
            with open(errors, "wb") as stderr:
                process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, env=environment)
            watch = threading.Timer(3 * SECONDS, process.kill)
            watch.start()
            done = -1
            assert process.stdout is not None
            for line in process.stdout:
                i, name, outcome, why = json.loads(line)
                done = i
                self._take(i, name, outcome, why)
                watch.cancel()
                watch = threading.Timer(3 * SECONDS, process.kill)
                watch.start()
            watch.cancel()
            code = process.wait()
            if code == 0 and done + self.step >= self.count:
                return
            at = struct.unpack("<q", progress.read_bytes())[0]
            if done < at:
                said = errors.read_text(errors="replace")[-800:]
                self._take(at, names[at % len(names)], "crash", f"exit code {code} (negative: signal)\n{said}")
            start = max(at, done) + self.step

    def _names(self) -> list[str]:
        return [source.name for source in pickle.loads((self.folder / "sources.pkl").read_bytes())]

    def _take(self, i: int, name: str, outcome: str, why: str) -> None:
        with self._lock:
            self.outcomes[name, outcome] += 1
            if outcome not in GOOD:
                self.failures.append((i, name, outcome, why))
                finding = f"--- file {i} ({name}): {outcome}\n{why}"
                print(finding.encode("utf-8", "backslashreplace").decode(), flush=True)


def _table(outcomes: Counter[tuple[str, str]]) -> Iterator[str]:
    names = sorted({name for name, _ in outcomes})
    kinds = [*GOOD, *sorted({outcome for _, outcome in outcomes} - set(GOOD))]
    yield f"{'':28}" + "".join(f"{kind:>10}" for kind in kinds)
    for name in names:
        yield f"{name:28}" + "".join(f"{outcomes[name, kind]:10,}" for kind in kinds)
    yield f"{'all':28}" + "".join(f"{sum(outcomes[name, kind] for name in names):10,}" for kind in kinds)


def main() -> int:
    """Fuzz; the exit code is 1 if a file was not handled as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000, help="files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", type=int, help="make and import this one file, in this process")
    parser.add_argument("--keep", type=Path, help="with --only: copy the file there")
    parser.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        folder, start, stop, step, progress = options.worker
        work(Path(folder), options.seed, int(start), int(stop), int(step), Path(progress))
        return 0
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="ctrlrl-fuzz-", dir=base) as name:
        folder = Path(name)
        build_sources(folder)
        if options.only is not None:
            signal.signal(signal.SIGALRM, _alarm)
            fuzzer = Fuzzer(folder, options.seed)
            print(*fuzzer.case(options.only), sep="\n")
            if options.keep:
                shutil.copytree(fuzzer.folder, options.keep)
            return 0
        began = time.monotonic()
        pool = Pool(folder, options.seed, options.count, options.processes)
        pool.run()
        seconds = time.monotonic() - began
        print("\n".join(_table(pool.outcomes)))
        total = sum(pool.outcomes.values())
        rate = total / seconds / options.processes
        print(f"{total:,} files in {seconds:.0f} s, {rate:.0f} a second and process; {len(pool.failures):,} failures")
        return 1 if pool.failures else 0


if __name__ == "__main__":
    sys.exit(main())
