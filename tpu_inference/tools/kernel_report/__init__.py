# SPDX-License-Identifier: Apache-2.0
"""`python -m tpu_inference.tools.kernel_report`: what an op costs on a named shape, from the compiler's schedule. See docs/measuring_a_kernel.md."""
