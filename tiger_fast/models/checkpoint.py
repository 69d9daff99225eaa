"""Model files: safetensors with the settings as JSON in the header, written whole or not at all."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tiger_fast._extras import require
from tiger_fast._files import write_whole

_FORMAT = "tiger_fast"
_VERSION = 1


def write_checkpoint(path: str | Path, kind: str, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write `tensors` and `metadata` (plain values) for a model class called `kind`.

    The file appears under its name complete and synced to disk, so that a crash leaves the former one.
    """
    save = require("safetensors.torch", extra="train").save
    header = {"format": _FORMAT, "version": str(_VERSION), "kind": kind, "metadata": json.dumps(metadata)}
    content = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, header)
    write_whole(Path(path), lambda file: file.write(content))


def read_checkpoint(path: str | Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `write_checkpoint` wrote: metadata and tensors.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is corrupt, not one of tiger_fast's, of a newer format, or of another model class.
    """
    safetensors = require("safetensors", extra="train")
    if not Path(path).is_file():
        raise FileNotFoundError(f"no model file at {path}")
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a readable .safetensors file (cut off or corrupt?): {error}") from error
    if header.get("format") != _FORMAT or not {"version", "kind", "metadata"} <= header.keys():
        raise ValueError(f"{path} is a .safetensors file, but not one that tiger_fast wrote")
    if int(header["version"]) > _VERSION:
        raise ValueError(f"{path} has format version {header['version']}; this tiger_fast reads up to {_VERSION}")
    if header["kind"] != kind:
        raise ValueError(f"{path} holds a {header['kind']}, not a {kind}")
    return json.loads(header["metadata"]), tensors
