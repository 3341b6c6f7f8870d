"""Checkpoint folders: a Hugging Face model folder, the optimizer, and the run's state, all of one moment.

    checkpoints/rl-000120.new/  -- written, synced -->  rl-000120/  -- named by -->  LATEST  -- older ones deleted
                rl-000120-critic.new/  -- linked into it -->  critic/

A folder appears whole or not at all, and is never replaced: a death at any moment leaves the previous one valid. What
another process has to keep of that moment it writes as a part, beside the draft, before. Knows nothing of torch.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from ...runtime.rundir import write_atomically
from ..model import checkpoint as model_folder
from ..model.config import ModelConfig
from ..run_state import LATEST

OPTIMIZER, INFO, ARRAYS = "optimizer.safetensors", "trainer.json", "state.safetensors"
_DRAFT = ".new"
_WEIGHTS, _OPTIMIZER = "weights/", "optimizer/"


def write(
    checkpoints: Path,
    name: str,
    config: ModelConfig,
    arrays: Mapping[str, np.ndarray],
    info: Mapping[str, Any],
    files: Mapping[str, bytes],
    parts: Mapping[str, str] = MappingProxyType({}),
    *,
    keep: int,
) -> Path:
    """Writes `arrays` and `info` (Learner.state) and further `files` as checkpoint `name`; returns its folder.

    `parts`: sub-folder -> what `write_part` wrote before. The folder is called `name`.2 (.3, ...) if there is a `name`:
    LATEST may point to that one. Raises OSError (disk full) with the previous checkpoint still the latest.
    """
    folder, draft = _free(checkpoints / name), checkpoints / f"{name}{_DRAFT}"
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir(parents=True)
        model_folder.save(draft, config, _below(_WEIGHTS, arrays))
        save_file(_below(_OPTIMIZER, arrays), draft / OPTIMIZER)
        (draft / INFO).write_text(json.dumps(dict(info)))
        for file, content in files.items():
            (draft / file).write_bytes(content)
        for part, source in parts.items():
            (draft / part).mkdir()
            for path in (checkpoints / source).iterdir():
                os.link(path, draft / part / path.name)
        for path in (*draft.iterdir(), draft):
            _sync(path)
        draft.rename(folder)
        _sync(checkpoints)
        write_atomically(checkpoints / LATEST, folder.name.encode())
    except (OSError, SafetensorError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise OSError(f"checkpoint {folder} can't be written: {error}; the one before it is kept") from error
    _forget_old(checkpoints, folder, keep)
    return folder


def read(folder: Path) -> tuple[ModelConfig, dict[str, np.ndarray], dict[str, Any]]:
    """Config, arrays and info of a checkpoint. Raises ValueError if a part is missing or unreadable."""
    try:
        config, weights = model_folder.load(folder)
        optimizer = load_file(folder / OPTIMIZER)
        info = json.loads((folder / INFO).read_text())
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(
            f"checkpoint {folder} can't be read: {error}; write the name of an older one into {folder.parent / LATEST}"
        ) from None
    arrays = {_WEIGHTS + name: array for name, array in weights.items()}
    return config, arrays | {_OPTIMIZER + name: array for name, array in optimizer.items()}, info


def write_part(checkpoints: Path, name: str, arrays: Mapping[str, np.ndarray], info: Mapping[str, Any]) -> Path:
    """Writes `arrays` and `info` (ValueLearner.state) as a draft that `write` takes in and then deletes.

    Raises OSError if it can't be written.
    """
    draft = checkpoints / f"{name}{_DRAFT}"
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir(parents=True)
        save_file(dict(arrays), draft / ARRAYS)
        (draft / INFO).write_text(json.dumps(dict(info)))
        for path in (*draft.iterdir(), draft):
            _sync(path)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise OSError(
            f"a part of the checkpoint, {draft}, can't be written: {error}; the one before is kept"
        ) from error
    return draft


def read_part(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays and info of a part. Raises ValueError if it is missing or unreadable."""
    try:
        return load_file(folder / ARRAYS), json.loads((folder / INFO).read_text())
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(
            f"checkpoint part {folder} can't be read: {error}; write the name of an older checkpoint into "
            f"{folder.parent.parent / LATEST}"
        ) from None


def read_policy(folder: Path) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """Config and weights of a checkpoint's policy. Raises ValueError if it is missing or unreadable."""
    return model_folder.load(folder)


def _free(folder: Path) -> Path:
    others = (folder.with_name(f"{folder.name}.{n}") for n in itertools.count(2))
    return next(path for path in itertools.chain([folder], others) if not path.exists())


def _forget_old(checkpoints: Path, newest: Path, keep: int) -> None:
    """Deletes drafts that a death has left, and all checkpoints but `newest` and the `keep` - 1 written before it."""
    folders = [path for path in checkpoints.iterdir() if path.is_dir() and path != newest]
    drafts = [path for path in folders if path.suffix == _DRAFT]
    whole = sorted((path for path in folders if path not in drafts), key=lambda path: path.stat().st_mtime)
    for path in (*drafts, *whole[: max(0, len(whole) - keep + 1)]):
        shutil.rmtree(path, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _below(prefix: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
