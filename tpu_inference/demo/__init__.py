# SPDX-License-Identifier: Apache-2.0
"""The demo checkpoint, and a minute with it: `python -m tpu_inference.demo`."""

from pathlib import Path

MODEL = str(Path(__file__).parent / "model")
"""Directory of the demo checkpoint."""
