# SPDX-License-Identifier: Apache-2.0
"""What the planner's process is told before JAX and vLLM are imported."""

import os


def prepare() -> None:
    """The planner compiles for a TPU, and takes none; and its answer is not to be looked for among log lines."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
