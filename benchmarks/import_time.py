# SPDX-License-Identifier: Apache-2.0
"""Seconds that `import tpu_inference` takes, and that it loads neither JAX nor torch: `python benchmarks/import_time.py`."""

import subprocess
import sys

BAR_S = 0.1
CODE = """
import sys, time
start = time.perf_counter()
import tpu_inference
seconds = time.perf_counter() - start
print(seconds, *[name for name in ("jax", "torch", "vllm") if name in sys.modules])
"""


def main() -> int:
    lines = [
        subprocess.run([sys.executable, "-c", CODE], check=True, capture_output=True, text=True).stdout.split()
        for _ in range(7)
    ]
    seconds, loaded = min(float(line[0]) for line in lines), sorted({name for line in lines for name in line[1:]})
    good = seconds <= BAR_S and not loaded
    print(
        f"import tpu_inference: {1000 * seconds:.1f} ms (bar {1000 * BAR_S:.0f} ms), loads {loaded or 'nothing heavy'}"
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
