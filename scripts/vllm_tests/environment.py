# SPDX-License-Identifier: Apache-2.0
"""Where things are, and the environment that vLLM's tests run in."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
VERSION = "0.32.0"


@dataclass(frozen=True)
class Workplace:
    """Everything that is fetched and made, below one directory."""

    directory: Path

    @property
    def sources(self) -> Path:
        """vLLM's source distribution without its package: the installed one is tested."""
        return self.directory / f"vllm-{VERSION}"

    @property
    def packages(self) -> Path:
        """What vLLM's tests import and the pinned environment does not have."""
        return self.directory / "packages"

    @property
    def hub(self) -> Path:
        return self.directory / "huggingface" / "hub"

    @property
    def raw_results(self) -> Path:
        """Of the process that runs now."""
        return self.directory / "results" / f"running-{os.getpid()}.jsonl"

    def results(self, file: str) -> Path:
        return self.directory / "results" / (file.removeprefix("tests/").replace("/", "__") + ".jsonl")

    def log(self, file: str) -> Path:
        return self.results(file).with_suffix(".log")

    def environment(self) -> dict[str, str]:
        # The sources first: servers, too, are to find vLLM's package "tests", not this project's.
        path = os.pathsep.join(map(str, (self.sources, ROOT / "scripts", ROOT, self.packages)))
        return {
            **os.environ,
            "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))),
            "PYTHONPATH": path,
            "HF_HOME": str(self.hub.parent),
            "HF_HUB_OFFLINE": "1",
            "JAX_PLATFORMS": "cpu",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_XLA_CACHE_PATH": str(self.directory / "xla"),
            "VLLM_CACHE_ROOT": str(self.directory / "vllm"),
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
        }
