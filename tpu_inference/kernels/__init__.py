# SPDX-License-Identifier: Apache-2.0
"""Kernels: one public op a package. They know jax and numpy only."""
