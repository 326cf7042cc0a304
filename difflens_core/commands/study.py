"""What a study is made of: a TOML file that says it, and the folder where everything of it lies."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from ..experiments import CalibrationOptions
from ..files import DiffLensError
from ..processes import own_device
from ..sae import TrainingOptions

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Table = TypeVar("Table")
LARGEST = 2**20  # bytes of a study


@dataclass(frozen=True)
class CaptureOptions:
    """pictures: how many to draw; dtype: what numbers are kept in; twins: so many in turn are of the same noise."""

    pictures: int = 1000
    seed: int = 0
    start: float = 0.0
    end: float = 1.0
    dtype: str = "float16"
    twins: int = 1


@dataclass(frozen=True)
class AttributionOptions:
    """method: see `attribute_features`; features_per_class: best latents of each class to keep."""

    method: str = "class mean difference"
    features_per_class: int = 120


@dataclass(frozen=True)
class SteerOptions:
    """pictures: how many to draw, before and after; strength: times the recipe's own; seed: of their noises."""

    pictures: int = 64
    strength: float = 1.0
    seed: int = 1


@dataclass(frozen=True)
class Study:
    """One attribute of one model.

    model: a folder of a diffusers pipeline, its name on the hub, or a denoiser of the avatars (.safetensors);
    classifier: weights that `load_any_classifier` reads; site: the module to read and steer; prompts: the pictures'
    in turn, none for a model without; size: height and width in pixels, the model's own if not given; target: the
    mix, as Steer takes it; batch: pictures that are drawn at once.
    """

    model: str
    classifier: str
    attribute: str
    site: str
    prompts: tuple[str, ...] = ()
    negative: str = ""
    cfg: float = 1.0
    steps: int = 20
    size: tuple[int, ...] = ()
    batch: int = 8
    face_detector: str = ""
    target: str = "uniform"
    device: str = ""
    dtype: str = "float32"
    spare_others: bool = True
    capture: CaptureOptions = field(default_factory=CaptureOptions)
    train: TrainingOptions = field(default_factory=TrainingOptions)
    attribution: AttributionOptions = field(default_factory=AttributionOptions)
    calibrate: CalibrationOptions = field(default_factory=CalibrationOptions)
    steer: SteerOptions = field(default_factory=SteerOptions)
    file: Path = Path("study.toml")

    def path(self, name: str) -> Path:
        """A file that the study names, by itself or beside the study's file."""
        return self.file.parent / name

    @property
    def computes_on(self) -> str:
        """The device that the study names, or this process's own."""
        return self.device or own_device()

    @property
    def folder(self) -> Path:
        """Where everything lies that the commands make: beside the study's file, under its name."""
        return self.file.with_suffix("")

    def made(self, name: str, by: str) -> Path:
        """A file in the folder that an earlier command made. Raises `DiffLensError` if it is not there."""
        path = self.folder / name
        if not path.exists():
            raise DiffLensError(f"{path} is missing. Run first: difflens {by} {self.file}")
        return path


def read_study(path: str | Path) -> Study:
    """The study in a TOML file. Raises `DiffLensError` that names the key that does not fit."""
    path = Path(path)
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"it is larger than {LARGEST >> 20} MB")
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DiffLensError(f"{path} cannot be read ({error.strerror}). Give a study's TOML file.") from error
    except (ValueError, RecursionError) as error:  # no TOML, no UTF-8, numbers too long, or nested too deeply
        raise DiffLensError(f"{path} is no TOML file: {error}.") from error
    if path.suffix != ".toml":
        raise DiffLensError(f"{path} does not end in .toml, so its folder would have its own name. Rename it.")
    if "file" in given:
        raise DiffLensError(f"{path}: file is not known.")
    try:
        return read_table(Study, given | {"file": path}, str(path))
    except OverflowError as error:  # a whole number where one with a fraction is meant
        raise DiffLensError(f"{path}: a number is too large ({error}).") from error


def read_table(kind: type[Table], given: Mapping[str, Any], where: str) -> Table:
    """A dataclass filled by a table's keys. Raises `DiffLensError` for those that are unknown, missing or misfit."""
    known, types = {f.name: f for f in fields(kind)}, get_type_hints(kind)  # type: ignore[arg-type]
    if unknown := sorted(set(given) - set(known)):
        raise DiffLensError(f"{where}: {', '.join(unknown)} is not known. There are: {', '.join(known)}.")
    required = [name for name, f in known.items() if f.default is MISSING and f.default_factory is MISSING]
    if missing := [name for name in required if name not in given]:
        raise DiffLensError(f"{where}: {', '.join(missing)} is missing.")
    return kind(**{name: read_value(types[name], value, f"{where}: {name}") for name, value in given.items()})


def read_value(kind: Any, value: Any, where: str) -> Any:
    """A value of the annotated type."""
    if is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise DiffLensError(f"{where} is {value!r}, expected a table.")
        return read_table(kind, value, where)  # type: ignore[arg-type, type-var]
    if isinstance(value, list):
        value = tuple(value)
    if kind is float and type(value) is int:
        value = float(value)
    named = {tuple[str, ...]: (tuple, str), tuple[int, ...]: (tuple, int)}
    whole, part = named.get(kind, (kind, None))
    if not isinstance(value, whole) or type(value) is bool is not kind:
        raise DiffLensError(f"{where} is {value!r}, expected {'a list' if part else f'a {whole.__name__}'}.")
    if part and not all(isinstance(one, part) for one in value):
        raise DiffLensError(f"{where} is {list(value)!r}, expected a list of {part.__name__}.")
    return value
