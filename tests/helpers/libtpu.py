# SPDX-License-Identifier: Apache-2.0
"""Whether the TPU compiler works on this machine."""

import os
import subprocess
import sys
from functools import cache

PROBE = "from jax.experimental import topologies; topologies.get_topology_desc(platform='tpu', topology_name='v5e:2x2')"


@cache
def why_libtpu_does_not_work() -> str:
    """Empty where it does. A process of its own asks: libtpu reads its flags once, and tests have theirs."""
    env = {**os.environ, "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    done = subprocess.run([sys.executable, "-c", PROBE], env=env, capture_output=True, text=True, timeout=300)
    if done.returncode == 0:
        return ""
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
