"""The folders in which ComfyUI finds the pack's files, and the names that lists show.

Names have "/" between folders on every system, so that a graph made on one opens on another. Where a name is given,
"\\" is understood as well.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import folder_paths

from ...difflens_core import networks, sae
from ...difflens_core.activations import INDEX
from ...difflens_core.files import DiffLensError, difflens_info, write_whole

MODELS, SAES, CLASSIFIERS, RECIPES = "difflens_models", "difflens_saes", "difflens_classifiers", "difflens_recipes"


STORES = "difflens_activations"
CONTROLS = "controls/"  # folder of recipes that are there to be compared with
SHIPPED = [Path(__file__).resolve().parents[2] / "models" / name for name in ("avatars", "prompted_avatars", "scenes")]


def register_folders() -> None:
    """Make the pack's kinds of file known: the user's folder, then extra_model_paths.yaml's, then the shipped ones."""
    endings = {kind: {".safetensors"} for kind in (MODELS, RECIPES)} | {CLASSIFIERS: {*sae.WEIGHTS}}
    # A folder of activations is known by its index, one of another program's SAE by its configuration.
    # Models of other programs come as files, or as folders that are known by their configuration.
    endings[MODELS] |= {*networks.WEIGHTS, Path(networks.CONFIG).suffix}
    endings |= {STORES: {Path(INDEX).suffix}, SAES: {*sae.WEIGHTS, Path(sae.CONFIGS[0]).suffix}}
    for kind, ending in endings.items():
        extra, _ = folder_paths.folder_names_and_paths.get(kind, ([], set()))
        user = str(Path(folder_paths.models_dir) / kind)
        folder_paths.folder_names_and_paths[kind] = (
            [user, *extra, *(str(shipped / kind) for shipped in SHIPPED)],
            ending,
        )


def spelled(name: str) -> str:
    """A listed or given name as graphs have it. macOS takes letters with accents apart."""
    return unicodedata.normalize("NFC", name.replace("\\", "/"))


def list_files(kind: str) -> list[str]:
    return sorted(map(spelled, folder_paths.get_filename_list(kind)))


def full_path(kind: str, name: str) -> Path | None:
    """Path of a file by its name, None if there is none. However ComfyUI lists it on this system."""
    name = spelled(name)
    listed = [own for own in folder_paths.get_filename_list(kind) if spelled(own) == name]
    found = next(filter(None, (folder_paths.get_full_path(kind, own) for own in (*listed, name))), None)
    return Path(found) if found else None


def find_file(kind: str, name: str, otherwise: str = "") -> str:
    """Path of a listed file. Raises `DiffLensError` if it is gone, with what to do otherwise."""
    if path := full_path(kind, name):
        return str(path)
    folder = folder_paths.get_folder_paths(kind)[0]
    raise DiffLensError(f"{name} was not found. Put it into {folder} or choose another file{otherwise}.")


def check_name(kind: str, name: str | None, listed: Sequence[str]) -> bool | str:
    """Whether a node can take a chosen name, for `validate_inputs`: ComfyUI's own check knows one spelling only.

    None is a name that another node will tell. ComfyUI runs the outputs that do not need this node.
    """
    if name is None or spelled(name) in listed:
        return True
    folder = folder_paths.get_folder_paths(kind)[0]
    return (
        f"{name!r} is not on this machine: put it into {folder} or choose another; what does not need it runs all the "
        f"same. There is: {', '.join(listed)}"
    )


def on_disk(*paths: Path) -> str:
    """What changes when one of these files, or one in these folders, is written, replaced or deleted."""
    files = [file for path in paths for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
    return "; ".join(map(state_of, files))


def state_of(file: Path) -> str:
    """Its times and size. Two times, because programs that unpack or copy set the first as it was elsewhere."""
    try:
        found = file.stat()
    except OSError:
        return f"{file}: none"
    return f"{file}: {found.st_mtime_ns}, {found.st_ctime_ns}, {found.st_size}"


MISSED: dict[Path, int] = {}  # files and folders that nodes write, and how often they were not there


def times_missed(path: Path) -> int:
    """For `fingerprint_inputs` of a node that takes long and writes `path`: changes only when that is gone."""
    MISSED[path] = MISSED.get(path, -1) + (not path.exists())
    return MISSED[path]


def name_state(kind: str, name: str | None) -> str:
    """For `fingerprint_inputs`: the state of all that a name stands for, a file or a folder, and what lies beside it.

    Of a name that another node will tell, the state of all that it may be.
    """
    if name is None:
        return on_disk(*filter(None, (full_path(kind, own) for own in list_files(kind))))
    configs = (*sae.CONFIGS, networks.CONFIG) if kind in (SAES, MODELS) else ()
    found = full_path(kind, name)
    if found is None:  # a folder, known by what it holds
        inside = [own for own in list_files(kind) if str(PurePosixPath(own).parent) == spelled(name)]
        found = full_path(kind, inside[0]) if inside else None
        if found is None:
            return "none"
        scheduler = found.parent.parent / "scheduler" / "scheduler_config.json"
        return on_disk(found.parent, scheduler)
    return on_disk(found, found.with_name(f"{found.name}.json"), *(found.with_name(config) for config in configs))


def folders_and_files(
    kind: str, configs: Sequence[str], endings: Sequence[str]
) -> tuple[set[PurePosixPath], set[PurePosixPath]]:
    """Listed folders that hold one of `configs`, and the files of those endings that lie in none of them."""
    paths = [PurePosixPath(name) for name in list_files(kind)]
    folders = {path.parent for path in paths if path.name in configs and path.parent.name}
    return folders, {path for path in paths if path.suffix in endings and not folders & set(path.parents)}


def list_saes() -> list[str]:
    """Names that `find_sae` takes: folders with a configuration, and the files that lie in none of those.

    A .pt file in a folder without a configuration is no SAE; it may name features (`list_feature_folders`).
    """
    folders, files = folders_and_files(SAES, sae.CONFIGS, sae.WEIGHTS)
    features = {path for path in files if path.suffix == ".pt" and path.parent.name}
    return sorted(map(str, folders | files - features))


def list_feature_folders() -> list[str]:
    """Names that `find_features` takes: folders with .pt files that no configuration makes an SAE."""
    paths = [PurePosixPath(name) for name in list_files(SAES)]
    configured = {path.parent for path in paths if path.name in sae.CONFIGS}
    found = {path.parent for path in paths if path.suffix == ".pt" and path.parent.name}
    return sorted(map(str, found - configured))


def find_features(name: str) -> Path:
    """A listed folder with feature files. Raises `DiffLensError` if it is gone."""
    paths = [PurePosixPath(listed) for listed in list_files(SAES)]
    files = [path for path in paths if str(path.parent) == spelled(name) and path.suffix == ".pt"]
    return Path(find_file(SAES, str(files[0]) if files else name)).parent


def find_sae(name: str) -> str:
    """Path of a listed SAE, a file or a folder. Raises `DiffLensError` if it is gone."""
    for config in sae.CONFIGS:
        if path := full_path(SAES, f"{name}/{config}"):
            return str(path.parent)
    return find_file(SAES, name)


def new_file(kind: str, name: str) -> tuple[Path, str]:
    """Path in the user's folder for a file to be saved as `name`, and the name under which lists will show it.

    `name` may lead into sub-folders, never out of the folder. A file of that name is replaced.
    """
    *folders, last = name_parts(re.sub(r"\.safetensors$", "", name.strip(), flags=re.IGNORECASE))
    listed = "/".join([*folders, f"{last}.safetensors"])
    return Path(folder_paths.get_folder_paths(kind)[0], listed), listed


def new_output(prefix: str, ending: str) -> Path:
    """Path in ComfyUI's output folder for a new file, numbered as Save Image numbers its own."""
    where = "/".join(name_parts(prefix.strip()))
    folder, name, number, _, _ = folder_paths.get_save_image_path(where, folder_paths.get_output_directory())
    return Path(folder) / f"{name}_{number:05}_{ending}"


def name_parts(name: str) -> list[str]:
    """The folders and the file that a user's name asks for. Raises `DiffLensError` if it could lead elsewhere."""
    parts = spelled(name).split("/")
    if not all(re.fullmatch(r"\w[\w .()+-]{0,99}(?<![ .])", part) for part in parts):
        raise DiffLensError(
            f"{name!r} cannot be a file name. Use letters, digits, spaces and _ - + . ( ), beginning with a letter "
            "or digit; / puts the file into a sub-folder."
        )
    for part in parts:
        # Windows takes these for devices whatever stands behind the first dot, and wide digits for plain ones.
        stem = unicodedata.normalize("NFKC", part).partition(".")[0].rstrip().upper()
        if stem in RESERVED:
            raise DiffLensError(f"{name!r} cannot be a file name: Windows keeps {stem} for a device. Choose another.")
    return parts


RESERVED = {"CON", "PRN", "AUX", "NUL", *(f"{port}{digit}" for port in ("COM", "LPT") for digit in range(10))}


def list_stores() -> list[str]:
    """Folders with activations, by the name that `find_store` takes."""
    return [str(path.parent) for path in map(PurePosixPath, list_files(STORES)) if path.name == INDEX]


def find_store(name: str) -> Path:
    """Folder of a listed store. Raises `DiffLensError` if it is gone."""
    return Path(find_file(STORES, f"{name}/{INDEX}")).parent


def new_store(name: str) -> Path:
    """Folder in the user's folder for activations to be saved as `name`; it may be there already."""
    return new_file(STORES, name)[0].with_suffix("")


def temporary_file(name: str) -> Path:
    """Path in ComfyUI's temp folder, which it empties when it starts."""
    folder = Path(folder_paths.get_temp_directory())
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name


def hand_to_page(name: str, content: bytes) -> dict[str, str]:
    """Write a file into the temp folder for the page, and return by what `/view` gives it."""
    write_whole(temporary_file(name), content)
    return {"filename": name, "subfolder": "", "type": "temp"}


register_folders()


def list_models() -> list[str]:
    """Names that `find_model` takes: folders with a configuration, and the files that lie in none of those.

    Without those that draw by prompt.
    """
    folders, files = folders_and_files(MODELS, (networks.CONFIG,), networks.WEIGHTS)
    return sorted({*map(str, folders | files)} - {*list_prompted()})


def list_prompted() -> list[str]:
    """Files of models that draw by prompt."""
    return [name for name in list_files(MODELS) if "text" in info_of(MODELS, name)]


def list_detectors() -> list[str]:
    """Files that may be a face detector's: those that are no classifier of ours."""
    return [name for name in list_files(CLASSIFIERS) if not info_of(CLASSIFIERS, name)]


def list_recipes() -> list[str]:
    """The listed recipes, last the controls, which steer by random features and are there to be compared with."""
    return sorted(list_files(RECIPES), key=lambda name: name.startswith(CONTROLS))


def list_classes() -> dict[str, list[str]]:
    """The listed recipes, with the names of their classes, without controls."""
    names = [name for name in list_recipes() if not name.startswith(CONTROLS)]
    found = {name: info_of(RECIPES, name).get("classes") for name in names}
    return {name: classes for name, classes in found.items() if isinstance(classes, list) and len(classes) > 1}


def info_of(kind: str, name: str) -> dict[str, Any]:
    """What a listed file of ours tells beside its tensors, nothing of another's."""
    path = full_path(kind, name)
    return read_info(path, state_of(path)) if path else {}


@lru_cache(maxsize=4096)
def read_info(path: Path, state: str) -> dict[str, Any]:
    """`difflens_info` of a file in this state: ComfyUI asks for all lists whenever a page is opened."""
    return difflens_info(path)


def find_model(name: str) -> str:
    """Path of a listed model, a file or a folder. Raises `DiffLensError` if it is gone."""
    if PurePosixPath(spelled(name)).suffix in networks.WEIGHTS:
        return find_file(MODELS, name)
    return str(Path(find_file(MODELS, f"{name}/{networks.CONFIG}")).parent)
