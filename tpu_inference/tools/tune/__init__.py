# SPDX-License-Identifier: Apache-2.0
"""`python -m tpu_inference.tools.tune`: searches block sizes of the kernels on the emulator. See docs/measuring_a_kernel.md."""
