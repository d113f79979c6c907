# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's tensors by name, read slice by slice from safetensors or PyTorch files."""

import json
import zipfile
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tpu_inference.errors import TpuInferenceError
from tpu_inference.layers.common.quantization import has_nan_bytes

_BYTES = {"F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn), "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2)}
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


class CheckpointError(TpuInferenceError):
    """Everything that is wrong with a checkpoint, one line each."""

    def __init__(self, where: str, problems: Sequence[str]) -> None:
        lines = "\n".join(f"  - {problem}" for problem in problems)
        super().__init__(f"The checkpoint at {where} cannot be loaded ({len(problems)} problem(s)):\n{lines}")
        self.problems = list(problems)


def nan_problem(name: str) -> str:
    """Of a tensor of quantized values."""
    return f"not a number: {name} has NaN among its e4m3 values"


class _SafetensorsFile:
    """Memory-mapped; a slice reads only its bytes."""

    def __init__(self, path: str) -> None:
        from safetensors import safe_open

        self._file, self._path = safe_open(path, framework="numpy"), path
        self.shapes = {name: tuple(self._file.get_slice(name).get_shape()) for name in self._file.keys()}  # noqa: SIM118

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        if (kept := _BYTES.get(self._file.get_slice(name).get_dtype())) is not None:
            return self._read_bytes(name, index).view(kept)
        return self._file.get_slice(name)[index] if index else self._file.get_tensor(name)

    @cached_property
    def _torch_file(self) -> Any:
        from safetensors import safe_open

        return safe_open(self._path, framework="pt")

    def _read_bytes(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Of types that safetensors knows in torch alone."""
        import torch

        file = self._torch_file
        tensor = file.get_slice(name)[index] if index else file.get_tensor(name)
        return tensor.contiguous().view(torch.uint8).numpy()


class _TorchFile:
    """`torch.save`d state dict, memory-mapped where the file's format allows."""

    def __init__(self, path: str) -> None:
        import torch

        self._tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        import torch

        tensor = self._tensors[name].detach()[index].contiguous()
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        if tensor.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
            return tensor.view(torch.uint8).numpy().view(str(tensor.dtype).removeprefix("torch."))
        return tensor.numpy()


class Checkpoint:
    """The tensors of several files."""

    def __init__(self, files: Iterable[str]) -> None:
        """Opens every file. Raises CheckpointError that names all that are missing, truncated or not of their format."""
        self.files = sorted(files)
        self.where = str(Path(self.files[0]).parent) if self.files else "(no files)"
        self._file_of: dict[str, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._with_nans: set[str] = set()
        problems = self._missing_files()
        for path in self.files:
            opener = _SafetensorsFile if path.endswith(".safetensors") else _TorchFile
            try:
                file = opener(path)
            except Exception as error:  # each reader has its own kinds
                problems.append(
                    f"{Path(path).name} is missing, corrupt or truncated: {(str(error) or type(error).__name__).splitlines()[0]}"
                )
                continue
            self._file_of.update(dict.fromkeys(file.shapes, file))
            self.shapes.update(file.shapes)
        if problems:
            raise CheckpointError(self.where, problems)

    def _missing_files(self) -> list[str]:
        """Files that the checkpoint's index names and that are not there."""
        problems, have = [], {Path(path).name for path in self.files}
        for index in (Path(self.where) / name for name in INDEX_FILES):
            suffix = ".safetensors" if "safetensors" in index.name else ".bin"
            if index.exists() and any(name.endswith(suffix) for name in have):
                named = set(json.loads(index.read_text())["weight_map"].values())
                problems += [f"{name} is named in {index.name} but missing" for name in sorted(named - have)]
        return problems

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """`tensor[index]`, in the dtype of the file. What of it is no number is remembered: `refuse_nans`."""
        array = self._file_of[name].read(name, index)
        if has_nan_bytes(array):
            self._with_nans.add(name)
        return array

    def refuse_nans(self) -> None:
        """Raises CheckpointError that names the tensors of e4m3 in which NaN was read."""
        if self._with_nans:
            raise CheckpointError(self.where, [nan_problem(name) for name in sorted(self._with_nans)])
