"""Gives a server the weights of a policy version by the calls it has for that.

    FOLDER/VERSION (config.json, *.safetensors)  SGLang                          vLLM (VLLM_SERVER_DEV_MODE=1)
    hold: nothing is generated, what was is      POST /pause_generation          POST /pause?mode=abort
      ended early ("abort")
    update: read the folder, drop cached keys    POST /update_weights_from_disk  POST /collective_rpc, reload_weights;
      and values                                                                   /reset_prefix_cache;
                                                                                   /update_weight_version
    release                                      POST /continue_generation       POST /resume
    held_version                                 GET /get_model_info             GET /weight_info

llama.cpp has none of these. Knows nothing of requests.
"""

from __future__ import annotations

import reprlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...model.config import ModelConfig
from .client import Client
from .faults import Fault
from .settings import ServerSettings

SHORT_S = 30.0
"""For calls that move no weights."""

MARK = ".headrace"
"""A file in every folder that was made here; others are nobody's to remove."""


class ServerWeights:
    """What one server holds, and how to change it."""

    def __init__(self, client: Client, settings: ServerSettings, folder: Path) -> None:
        self._client = client
        self._settings = settings
        self._folder = folder

    def write(self, version: int, config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> None:
        """Writes a version for the server to read. Blocks; raises OSError."""
        from ...model import checkpoint

        folder = self._folder / str(version)
        if not folder.exists():
            folder.mkdir(parents=True)
            (folder / MARK).touch()
        checkpoint.save(folder, config, tensors)

    def forget_older(self, version: int) -> None:
        """Removes what was written of versions before this one. Blocks."""
        for folder in self._folder.iterdir():
            if folder.name.isdecimal() and int(folder.name) < version and (folder / MARK).exists():
                shutil.rmtree(folder, ignore_errors=True)

    async def hold(self) -> None:
        """Ends what is being generated early, and lets nothing begin."""
        if self._settings.dialect == "sglang":
            await self._post("/pause_generation", {"mode": "abort"})
        elif self._settings.dialect == "vllm":
            await self._post("/pause?mode=abort")

    async def release(self) -> None:
        if self._settings.dialect == "sglang":
            await self._post("/continue_generation", {})
        elif self._settings.dialect == "vllm":
            await self._post("/resume")

    async def update(self, version: int) -> None:
        """Has the server read `version`, which was written. Raises Fault "no_weights" if it will not."""
        folder, wait_s = str(self._folder / str(version)), self._settings.update_s
        if self._settings.dialect == "sglang":
            body = {"model_path": folder, "weight_version": str(version), "flush_cache": True}
            answer = await self._post("/update_weights_from_disk", body, wait_s)
            if not isinstance(answer, dict) or answer.get("success") is not True:
                raise Fault(
                    "no_weights", f"/update_weights_from_disk did not take version {version}: {reprlib.repr(answer)}"
                )
        elif self._settings.dialect == "vllm":
            body = {"method": "reload_weights", "kwargs": {"weights_path": folder}, "timeout": wait_s}
            await self._post("/collective_rpc", body, wait_s)
            await self._post("/reset_prefix_cache?reset_running_requests=true")
            await self._post("/update_weight_version", {"new_version": str(version)})

    async def held_version(self) -> str | None:
        """What the server says that it holds; None if it does not say. Raises Fault if it can't be reached."""
        path = {"sglang": "/get_model_info", "vllm": "/weight_info"}[self._settings.dialect]
        try:
            answer = await self._client.call("GET", path, None, SHORT_S)
        except Fault as fault:
            if fault.kind != "rejected":
                raise
            return None
        version = answer.get("weight_version") if isinstance(answer, dict) else None
        return str(version) if isinstance(version, str | int) else None

    async def _post(self, path: str, body: Mapping[str, Any] | None = None, deadline_s: float = SHORT_S) -> Any:
        try:
            return await self._client.call("POST", path, body, deadline_s)
        except Fault as fault:
            kind = fault.kind if fault.passing else "no_weights"
            raise Fault(kind, f"POST {path.partition('?')[0]}: {fault}", wait_s=fault.wait_s) from None
