"""Captured activations in a folder: written shard by shard while sampling goes on, read without loading them.

A store is a folder that any machine can read:

    index.json              what holds for all shards (`Index`)
    shard_00000.safetensors for every site S x b x H x W x C, so that the C numbers of a position are one piece,
    shard_00001 ...         and `samples`, the finished latents of its b pictures; of sites with large maps also " map",
                            their height and width: there H x W are cells, of which one position each is kept
    labels.safetensors      the pictures' classes, if somebody has told them (`save_labels`)

A shard gets its name when it is written to the end. So whatever interrupts a capture, the shards that are there are
whole, and the capture goes on with the first that is not. One capture at a time writes into a folder.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from ..files import (
    DiffLensError,
    NotWritten,
    check_room,
    digest,
    load_tensors,
    read_json,
    reading,
    replacing,
    save_tensors,
    told,
    written,
)
from ..processes import alone_in, process
from .captured import Activations

VERSION = 1
INDEX, LABELS = "index.json", "labels.safetensors"
SAMPLES, SHARD = "samples", "shard_"
SIZE = " map"  # ends the name of a shard's height and width of a site's map of which not all positions are kept
MOST = "most"  # in an index's info: how many pictures at most, of a capture that goes on until it has enough
TWINS = "twins"  # in an index's info: how many pictures in turn start from the same noise, if more than one
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}

Shard = Mapping[str, Tensor]


@dataclass(frozen=True)
class Index:
    """What holds for all shards of a capture.

    sites: module names; progress: S, share of the sampling behind each step that is kept; pictures: how many in all;
    per_shard: how many in a shard (fewer in the last); seed: picture k starts from the noise that a host draws for
    place k of a batch under this seed; model: fingerprint of the weights; dtype: one of `DTYPES`; info: what else
    decides the pictures (sampler, size, ...), JSON-able; cells: of how many cells of a map one position each is kept
    where it has more positions than that, 0 if all are.
    """

    sites: tuple[str, ...]
    progress: tuple[float, ...]
    pictures: int
    per_shard: int
    seed: int
    model: str
    dtype: str = "float16"
    info: Mapping[str, Any] = field(default_factory=dict)
    cells: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "sites", tuple(self.sites))
        object.__setattr__(self, "progress", tuple(self.progress))
        if not all(self.sites) or not 0 < len(self.sites) < len({*self.sites, SAMPLES}):
            raise DiffLensError(f'the sites are "{", ".join(self.sites)}". Name at least one, and each only once.')
        counts = self.pictures, self.per_shard, self.seed, self.cells
        if not all(isinstance(text, str) for text in (*self.sites, self.model)) or {*map(type, counts)} != {int}:
            raise DiffLensError("sites and model must be texts, and pictures, per_shard, seed and cells whole numbers.")
        if not all(0 <= float(at) <= 1 for at in self.progress) or not isinstance(self.info, Mapping):
            raise DiffLensError("progress must be numbers from 0 to 1, and info settings by their names.")
        twins = self.info.get(TWINS, 1)
        if type(twins) is not int or twins < 1 or self.pictures % twins or self.per_shard % twins:
            raise DiffLensError(f"twins are {twins!r}: expected a number that divides the pictures, and those a shard.")
        if not self.progress or self.pictures < 1 or self.per_shard < 1 or self.dtype not in DTYPES:
            raise DiffLensError(
                f"a capture of {len(self.progress)} steps and {self.pictures} pictures, {self.per_shard} at once, as "
                f"{self.dtype}: expected at least one of each, as {' or '.join(DTYPES)}."
            )

    @property
    def shards(self) -> int:
        return math.ceil(self.pictures / self.per_shard)

    def pictures_of(self, shard: int) -> range:
        return range(self.pictures)[shard * self.per_shard : (shard + 1) * self.per_shard]

    @property
    def digest(self) -> str:
        """Twelve hex digits that every shard carries, so that one of another capture is noticed.

        They do not tell where a capture stopped that was to go on until it had enough.
        """
        told = asdict(self) | {"pictures": self.info.get(MOST, self.pictures)}
        if not self.cells:  # stores of version 0.4 and before do not tell
            del told["cells"]
        return digest(json.dumps(told, sort_keys=True))


@dataclass(frozen=True)
class Store:
    """A finished capture: its shards in turn, in memory or mapped from files (read when they are used)."""

    index: Index
    shards: tuple[Shard, ...]

    def activations(self, site: str = "") -> Activations:
        """The activations of `site`, of the first one if empty. Raises `DiffLensError` if it was not captured."""
        site = site or self.index.sites[0]
        if site not in self.index.sites:
            raise DiffLensError(f"site {site} was not captured. There is: {', '.join(self.index.sites)}.")
        values = tuple(shard[site].movedim(-1, 2) for shard in self.shards)
        size = self.shards[0].get(f"{site}{SIZE}")
        own = None if size is None else (int(size[0]), int(size[1]))
        progress, twins = torch.tensor(self.index.progress), self.index.info.get(TWINS, 1)
        return Activations(values, progress, site, self.index.model, own, twins)

    def samples(self) -> Tensor:
        """The finished latents of all pictures, in memory."""
        return torch.cat([shard[SAMPLES] for shard in self.shards])


def record(
    index: Index,
    noises: Iterable[Tensor],
    draw: Callable[[int, Tensor], Shard],
    folder: str | Path | None = None,
    enough: Callable[[Tensor], bool] = lambda samples: False,
) -> Store:
    """Capture shard by shard into `folder`, or in memory if None, until the index's pictures are there or enough.

    noises: the noise of every shard in turn; draw(first, noise): a shard, the first picture of which has number
    `first`, that is S x b x H x W x C for every site and the samples. Shards that the folder holds already are not
    drawn again; beside them one shard at a time is in memory. enough(samples) is told the samples of every shard in
    turn; where it says so, the capture ends and its index says how many pictures it has. Under torchrun (an initialised
    process group) the processes draw the shards of one folder in turn. Raises `DiffLensError` if the folder was begun
    with another index or another process captures into it, if a shard does not fit, holds NaN or infinite numbers, or
    cannot be written.
    """
    rank, processes = process()
    if processes > 1 and (folder is None or MOST in index.info):
        raise DiffLensError("several processes can only capture into one folder, and a number of pictures set before.")
    with nullcontext() if folder is None or rank else alone_in(Path(folder)):
        finished = set() if folder is None else begun_together(Path(folder), index)
        return draw_missing(index, noises, draw, folder, enough, finished)


def draw_missing(
    index: Index, noises: Iterable[Tensor], draw: Callable[[int, Tensor], Shard], folder: str | Path | None,
    enough: Callable[[Tensor], bool], finished: set[int],
) -> Store:  # fmt: skip
    """What `record` does with the shards that are not `finished`."""
    kept: list[Shard] = []
    rank, processes = process()
    for number, noise in zip(range(index.shards), noises, strict=True):
        if number % processes != rank:
            continue
        if number in finished:
            if MOST not in index.info:
                continue
            samples = read_shard(Path(folder or ""), index, number)[SAMPLES]
        else:
            shard = draw(index.pictures_of(number).start, noise)
            check_drawn(shard, index, number)
            samples = shard[SAMPLES]
            if folder is None:
                kept.append(shard)
            else:
                write_shard(Path(folder), index, number, shard)
        if enough(samples) and number + 1 not in finished:
            index = replace(index, pictures=index.pictures_of(number).stop)
            break
    if folder is None:
        return Store(index, tuple(kept))
    if processes > 1:
        dist.barrier()
    if index != read_index(Path(folder)):
        write_index(Path(folder), index)
    # Opened only now: whatever stayed in memory between two large shards would keep the allocator from reusing them.
    return open_store(folder)


def begun_together(folder: Path, index: Index) -> set[int]:
    """What `begin` tells, where one process has made the folder before the others look."""
    rank, processes = process()
    if rank == 0:
        finished = begin(folder, index)
        for leftover in folder.glob(".*.tmp"):  # of a capture that was killed while it wrote
            leftover.unlink()
    if processes > 1:
        dist.barrier()
    return finished if rank == 0 else begin(folder, index)


def check_drawn(shard: Shard, index: Index, number: int) -> None:
    """Raise `DiffLensError` unless a shard fits that was just drawn, and all its numbers are finite."""
    pictures = index.pictures_of(number)
    check_shard(shard, index, number, f"pictures {pictures[0]} to {pictures[-1]}")
    for site in index.sites:
        for progress, values in zip(index.progress, shard[site], strict=True):  # step by step: a shard may be large
            finite = torch.isfinite(values).reshape(len(values), -1).all(dim=1)
            if not finite.all():
                raise DiffLensError(
                    f"{site} puts out numbers that are NaN or beyond {index.dtype}, first at {progress:.0%} of the "
                    f"sampling, in {numbered(pictures, finite)}. Check the model's precision"
                    + (", or keep bfloat16, whose range is wider." if index.dtype == "float16" else ".")
                )
    finite = torch.isfinite(shard[SAMPLES]).reshape(len(pictures), -1).all(dim=1)
    if not finite.all():
        raise DiffLensError(
            f"{numbered(pictures, finite)} came out as NaN or infinite numbers, though {', '.join(index.sites)} did "
            "not. Check the model's precision."
        )


def numbered(pictures: range, finite: Tensor) -> str:
    """The numbers of those `pictures` (b) that are not finite (b), for people."""
    wrong = [str(picture) for picture, fine in zip(pictures, finite.tolist(), strict=True) if not fine]
    return f"picture{'s' * (len(wrong) > 1)} {', '.join(wrong[:8])}{' and others' * (len(wrong) > 8)}"


def begin(folder: Path, index: Index) -> set[int]:
    """Make a store's folder, or go on with one that was begun with the same index: the numbers of its whole shards."""
    if (folder / INDEX).exists():
        found, wanted = plain(read_index(folder)), plain(index)
        ends = {"pictures"} if MOST in index.info else set()  # it may have ended where it had enough then
        names = [name for name in found | wanted if found.get(name) != wanted.get(name) and name not in ends]
        if names:
            wrong = [f"{name} {str(found.get(name))[:60]}, now {str(wanted.get(name))[:60]}" for name in names]
            raise DiffLensError(
                f"{folder.name} was begun with other settings: {'; '.join(wrong)}. Go on with those, choose another "
                "name, or delete the folder."
            )
    else:
        write_index(folder, index)
    finished = {number for number in range(index.shards) if shard_path(folder, number).exists()}
    for number in finished:
        read_shard(folder, index, number)
    return finished


def write_index(folder: Path, index: Index) -> None:
    """Write a store's index whole or not at all, and make its folder."""
    with disk_errors(folder), replacing(folder / INDEX) as temporary:
        temporary.write_text(json.dumps({"version": VERSION, **asdict(index)}, indent=1), encoding="utf-8")


def plain(index: Index) -> dict[str, Any]:
    """Everything an index says, by name, as it is after a journey through JSON."""
    found = json.loads(json.dumps(asdict(index)))
    return found | found.pop("info")


def open_store(folder: str | Path) -> Store:
    """The store in `folder`. Raises `DiffLensError` if it is none, unfinished, or one of its files is damaged."""
    folder = Path(folder)
    index = read_index(folder)
    # The index may promise more shards than anybody can count.
    missing = next((number for number in range(index.shards) if not shard_path(folder, number).exists()), None)
    if missing is not None:
        there = len([*folder.glob(f"{SHARD}*.safetensors")])
        raise DiffLensError(
            f"{folder.name}: {index.shards - there} of {index.shards} shards are missing (the first is "
            f"{shard_path(folder, missing).name}). Capture again under this name with the same settings: only those "
            "are drawn. Or copy them from where the store came from."
        )
    shards = tuple(read_shard(folder, index, number) for number in range(index.shards))
    for name in (*index.sites, SAMPLES):
        # Steps and pictures have been looked at.
        maps = {shard[name].shape[1 if name == SAMPLES else 2 :] for shard in shards}
        if len(maps) > 1 or len({shard[name].dtype for shard in shards}) > 1 or 0 in maps.pop():
            raise DiffLensError(
                f"{folder.name}: the shards differ in the shape or type of {name}, or hold none of it. They do not "
                "belong together: copy the folder again, or delete it and capture again."
            )
    return Store(index, shards)


def read_index(folder: Path) -> Index:
    """The index of a store. Raises `DiffLensError` if the folder holds none that this version can read."""
    try:
        found = read_json(folder / INDEX)
        version = found.pop("version")
        if version == VERSION:
            return Index(**found)
    except (DiffLensError, TypeError, ValueError, KeyError, OverflowError) as error:
        if isinstance(cause := error.__cause__, OSError):
            raise DiffLensError(
                f"{folder}: not an activation store, {INDEX} cannot be read ({cause.strerror})."
            ) from error
        names = ", ".join(["version", *(f.name for f in fields(Index))])
        raise DiffLensError(
            f"{folder.name}/{INDEX} is damaged ({error}), expected JSON with {names}. Copy it again from where the "
            "store came from, or delete the folder and capture again."
        ) from error
    raise DiffLensError(
        f"{folder.name} is an activation store of version {version}, this DiffLens reads version {VERSION}. Update "
        "DiffLens, or capture again."
    )


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"{SHARD}{number:05}.safetensors"


def write_shard(folder: Path, index: Index, number: int, shard: Shard) -> None:
    """Write a shard whole or not at all."""
    path = shard_path(folder, number)
    with disk_errors(path):
        save_tensors(path, "activations", shard, {"index": index.digest, "first": index.pictures_of(number).start})


def read_shard(folder: Path, index: Index, number: int) -> Shard:
    """A shard, mapped into memory. Raises `DiffLensError` if it is cut off or not the one that belongs there."""
    path = shard_path(folder, number)
    name = f"{folder.name}/{path.name}"
    try:
        with safe_open(path, framework="pt") as file:
            info = told(file.metadata())
            shard = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        check_room(shard.values(), path)
    except Exception as error:  # headers that lie bring up anything
        raise DiffLensError(
            f"{name} is damaged or cut off ({error}). Copy it again from where the store came from; or delete it and "
            "capture again under this name: only its pictures are drawn."
        ) from error
    if (info.get("index"), info.get("first")) != (index.digest, index.pictures_of(number).start):
        raise DiffLensError(f"{name} belongs to another capture or another place of this one. Delete it.")
    check_shard(shard, index, number, name)
    return shard


def check_shard(shard: Shard, index: Index, number: int, name: str) -> None:
    """Raise `DiffLensError` unless the shard holds what the index says."""
    if missing := [site for site in (*index.sites, SAMPLES) if site not in shard]:
        raise DiffLensError(f"{name}: lacks {', '.join(missing)}, which {INDEX} says were captured.")
    steps, pictures = len(index.progress), len(index.pictures_of(number))
    for site in index.sites:
        found = tuple(shard[site].shape)
        if len(found) != 5 or found[:2] != (steps, pictures) or shard[site].dtype != DTYPES[index.dtype]:
            raise DiffLensError(
                f"{name}: {site} is {found} in {shard[site].dtype}, expected {steps} steps x {pictures} pictures x "
                f"height x width x channels in {index.dtype}."
            )
        if f"{site}{SIZE}" in shard and (
            shard[f"{site}{SIZE}"].shape != (2,) or not (shard[f"{site}{SIZE}"] > 0).all()
        ):
            raise DiffLensError(f"{name}: what it says of the map of {site} is no height and width.")
    if not shard[SAMPLES].ndim or len(shard[SAMPLES]) != pictures:
        raise DiffLensError(f"{name}: holds samples of shape {tuple(shard[SAMPLES].shape)}, expected {pictures}.")


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Let what cannot be written become a `DiffLensError` that says what to do and that nothing is lost."""
    try:
        with written(path):
            yield
    except NotWritten as error:
        raise DiffLensError(f"{error} Then capture again with the same settings: what is finished is kept.") from error


def save_labels(folder: str | Path, labels: Mapping[str, tuple[tuple[str, ...], Tensor]]) -> None:
    """Write the pictures' classes beside a store's shards: {attribute: (classes, B indices into them)}."""
    folder = Path(folder)
    pictures = read_index(folder).pictures
    for attribute, (_, indices) in labels.items():
        if len(indices) != pictures:
            raise DiffLensError(f"{attribute}: got {len(indices)} labels, {folder.name} has {pictures} pictures.")
    tensors = {attribute: indices.long() for attribute, (_, indices) in labels.items()}
    classes = {attribute: list(names) for attribute, (names, _) in labels.items()}
    save_tensors(folder / LABELS, "labels", tensors, {"classes": classes})


def load_labels(folder: str | Path) -> dict[str, tuple[tuple[str, ...], Tensor]]:
    """The pictures' classes as `save_labels` got them. Raises `DiffLensError` if there are none."""
    tensors, info = load_tensors(Path(folder) / LABELS, "labels", needs=["classes"])
    with reading(Path(folder) / LABELS):
        found = {attribute: (tuple(names), tensors[attribute]) for attribute, names in info["classes"].items()}
        for attribute, (names, labels) in found.items():
            if not all(isinstance(name, str) for name in names):
                raise DiffLensError(f"the classes of {attribute} are not all texts. The file is damaged.")
            if labels.ndim != 1 or labels.is_floating_point() or not ((labels >= -1) & (labels < len(names))).all():
                raise DiffLensError(f"the labels of {attribute} are no numbers of its {len(names)} classes.")
        return found
