# SPDX-License-Identifier: Apache-2.0
"""The process environment in which libtpu compiles without a TPU and leaves its schedules in files."""

import atexit
import os
import shutil
import sys
import tempfile
from functools import cache
from pathlib import Path

from tpu_inference.errors import TpuInferenceError

_DEFAULTS = {
    # With libtpu installed and no TPU, JAX would first look for one for a while.
    "JAX_PLATFORMS": "cpu",
    # It asks a metadata server that is not there.
    "TPU_SKIP_MDS_QUERY": "1",
    # Else a second process dies on libtpu's lock file.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
HLO = "hlo"
"""Below the directory of schedules: XLA's texts of the programs."""
_FLAGS = {
    "LIBTPU_INIT_ARGS": "--xla_jf_dump_to={} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=^final "
    "--xla_jf_dump_category_filter=codegen,utilization",
    "XLA_FLAGS": f"--xla_dump_to={{}}/{HLO} --xla_dump_hlo_as_text=true",
}
_found: dict[str, str] = {}
"""What the user had in these variables, once they are changed."""


class ScheduleError(TpuInferenceError):
    """A schedule cannot be recorded or followed."""


def set_defaults() -> None:
    """What any ahead-of-time compile wants, with schedules or without; what the user set stays."""
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    jax = sys.modules.get("jax")  # where it is imported already, it has read the variable
    if jax is not None and not jax.config.jax_platforms:
        jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])


def _libtpu_is_loaded() -> bool:
    return "libtpu.so" in Path("/proc/self/maps").read_text(encoding="utf-8")


@cache
def prepare() -> Path:
    """Have libtpu write the schedules of this process's compiles into a private directory, which is removed at exit.

    To be called before libtpu is loaded (by `topologies.get_topology_desc`, say), which reads its flags once. Later calls do nothing.

    Returns:
        The directory.

    Raises:
        ScheduleError: libtpu is loaded already.
    """
    if _libtpu_is_loaded():
        raise ScheduleError(
            "libtpu is loaded in this process already, and reads its flags once: call schedule.prepare() before the first TPU topology "
            "or device is asked for, or measure in a process of its own."
        )
    directory = Path(tempfile.mkdtemp(prefix="tpu_schedule_"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    set_defaults()
    for name, flags in _FLAGS.items():
        _found[name] = os.environ.get(name, "")
        os.environ[name] = f"{_found[name]} {flags.format(directory)}".strip()
    return directory


def without_recording() -> dict[str, str]:
    """The environment for a child process that compiles at its usual speed."""
    return {**os.environ, **_found}
