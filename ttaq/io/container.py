"""The file that everything of ttaq is stored in: one safetensors file whose metadata carries a JSON header.

    bytes 0-7   length of the safetensors header, little-endian
    then        safetensors header (JSON): name, dtype, shape and place of every tensor, and under `__metadata__`,
    `ttaq`
                the header of ttaq: one JSON object in ASCII
    then        the bytes of the tensors

The header of ttaq always has `kind` ("model", "state"), `format_version` (an integer; this code writes FORMAT_VERSION
and reads it and everything below), `versions`, `hash` (`ttaq.nn.hash_tensors` of the tensors) and, last, `header_hash`
(SHA-256 of the text of the header without that field); the other fields belong to the kind. The two hashes cover
every byte that carries meaning, so a damaged file is refused instead of being loaded. Equal content makes equal files.
Reading never executes anything in the file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ttaq.errors import CheckpointError
from ttaq.io.atomic import write_atomically
from ttaq.nn.hash_tensors import hash_tensors
from ttaq.version import __version__

__all__ = ["FORMAT_VERSION", "read", "read_header", "read_tensors", "write"]

FORMAT_VERSION = 1

Header = dict[str, Any]

_NO_MATCH = "its {} and their hash do not match; use a backup or make the file again"

_STORABLE = {
    *(
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.complex64,
    ),
    *(
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint64,
        torch.uint32,
        torch.uint16,
        torch.uint8,
        torch.bool,
    ),
}


def write(
    who: str, path: str | os.PathLike[str], kind: str, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write the file completely or not at all: whatever stood at `path` stays until the new file is on the disk.
    Missing folders are made.

    Raises CheckpointError for values JSON does not know, tensors that cannot be stored and a file that cannot be
    written.
    """
    plain = {name: _plain(tensor, who, name) for name, tensor in tensors.items()}
    versions = {"ttaq": __version__, "torch": str(torch.__version__)}
    header = {
        "kind": kind,
        "format_version": FORMAT_VERSION,
        **fields,
        "versions": versions,
        "hash": hash_tensors(plain),
    }
    try:
        header["header_hash"] = _hash_header(header)
        content = safetensors.torch.save(plain, {"ttaq": json.dumps(header)})
    except (TypeError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"{who}: {path} cannot hold this: {error}; the header takes JSON values, names take text"
        ) from error
    write_atomically(who, Path(path), content, make_folders=True)


def read_header(path: str | os.PathLike[str], *, who: str = "read_header") -> Header:
    """The header of a file of ttaq, checked against its own hash, without loading a tensor.

    Raises CheckpointError for a missing, unreadable, truncated, damaged or foreign file and for one that a newer ttaq
    wrote.
    """
    text = _read(who, path, tensors=False)[0].get("ttaq")
    if text is None:
        raise CheckpointError(
            f"{who}: {path} is a plain safetensors file without the header of ttaq; name its architecture as NAME:PATH "
            f"(in Python ttaq.io.load_weights) or turn it into a model file with `ttaq convert`"
        )
    try:
        header = json.loads(text)
        seal = header.pop("header_hash", None)
        sealed = seal == _hash_header(header)
    except (ValueError, TypeError, AttributeError, RecursionError):
        header, seal, sealed = {}, "", False
    version = header.get("format_version")
    # A newer version may seal its header in another way, but one that seals it like this one must have it whole.
    if seal is not None and not sealed:
        raise CheckpointError(f"{who}: {path} is damaged: {_NO_MATCH.format('header')}")
    if type(version) is int and version > FORMAT_VERSION:
        raise CheckpointError(
            f"{who}: {path} has format version {version}, "
            f"this ttaq ({__version__}) reads up to version {FORMAT_VERSION}; update ttaq"
        )
    texts = all(isinstance(header.get(key), str) for key in ("kind", "hash"))
    if seal is None or type(version) is not int or not texts:
        raise CheckpointError(f"{who}: the header of {path} is not one that ttaq wrote; make the file again")
    return dict(header)


def read(who: str, path: str | os.PathLike[str], kind: str) -> tuple[Header, dict[str, Tensor]]:
    """Header and tensors (on the CPU, in memory of their own) of a file of this kind. Raises as read_header does, and
    for content that does not match the hash."""
    header = read_header(path, who=who)
    if header["kind"] != kind:
        raise CheckpointError(f"{who}: {path} is a {header['kind']} file, expected a {kind} file")
    tensors = read_tensors(who, path)
    if hash_tensors(tensors) != header["hash"]:
        raise CheckpointError(f"{who}: {path} is damaged: {_NO_MATCH.format('tensors')}")
    return header, tensors


def read_tensors(who: str, path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of any safetensors file, on the CPU. Raises CheckpointError for a file that is missing, unreadable
    or not safetensors."""
    return _read(who, path, tensors=True)[1]


def _read(who: str, path: str | os.PathLike[str], *, tensors: bool) -> tuple[dict[str, str], dict[str, Tensor]]:
    if Path(path).is_dir():
        raise CheckpointError(f"{who}: {path} is a folder, expected a file")
    try:
        with safe_open(path, framework="pt") as file:
            # Cloned: a tensor that stays a window into the file would change, or crash the process, when the file does.
            loaded = {name: file.get_tensor(name).clone() for name in file.keys()} if tensors else {}  # noqa: SIM118
            return dict(file.metadata() or {}), loaded
    except FileNotFoundError as error:
        raise CheckpointError(f"{who}: there is no file {path}") from error
    except OSError as error:
        raise CheckpointError(f"{who}: cannot read {path}: {error}") from error
    except SafetensorError as error:
        raise CheckpointError(
            f"{who}: {path} is truncated, damaged or not a safetensors file ({error}); "
            f"a PyTorch file (.pth, .pt, .tar) comes in with `ttaq convert`"
        ) from error


def _hash_header(header: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(header, allow_nan=False).encode()).hexdigest()


def _plain(tensor: Tensor, who: str, name: str) -> Tensor:
    """The same values on the CPU, row by row, in memory of their own."""
    if tensor.dtype not in _STORABLE or tensor.layout is not torch.strided or tensor.is_meta:
        raise CheckpointError(
            f"{who}: {name} is a {tensor.layout} tensor of {tensor.dtype} on {tensor.device}, which cannot be stored"
        )
    return tensor.detach().cpu().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
