# SPDX-License-Identifier: Apache-2.0
"""The environment that every test runs in, and tiny checkpoints shared by all."""

import os
import sys
import tempfile
import warnings
from pathlib import Path

# Before JAX and vLLM are imported, which read these once.
os.environ.update(
    JAX_PLATFORMS="cpu",
    JAX_NUM_CPU_DEVICES="8",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_XLA_CHECK_RECOMPILATION="1",
    VLLM_NO_USAGE_STATS="1",
    TRANSFORMERS_VERBOSITY="error",
    HF_HUB_OFFLINE="1",
)
os.environ.setdefault("VLLM_XLA_CACHE_PATH", str(Path(tempfile.gettempdir()) / f"tpu-inference-tests-{os.getuid()}"))
sys.path.insert(0, str(Path(__file__).parent))

import pytest


@pytest.fixture(scope="session")
def zoo(tmp_path_factory):
    """name -> directory of a tiny checkpoint (see helpers.tiny_models), made when first asked for."""
    from helpers import tiny_models

    directory = tmp_path_factory.mktemp("zoo")
    return lambda name, **options: tiny_models.save(name, directory, **options)


@pytest.fixture(autouse=True)
def libtpu(request):
    """Without a libtpu that works, tests marked `aot` say nothing: they are skipped with a warning, and in continuous integration they fail."""
    if not request.node.get_closest_marker("aot"):
        return
    from helpers.libtpu import why_libtpu_does_not_work

    if reason := why_libtpu_does_not_work():
        message = f"libtpu does not compile here, so nothing is known of TPUs: {reason}"
        if os.environ.get("CI"):
            pytest.fail(message)
        warnings.warn(message, stacklevel=1)
        pytest.skip(message)
