# SPDX-License-Identifier: Apache-2.0
"""A seeded fuzzer of the server: `make fuzz N=1000 SEED=1`, and a slice of it in tests/e2e/test_fuzz.py."""
