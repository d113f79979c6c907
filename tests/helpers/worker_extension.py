# SPDX-License-Identifier: Apache-2.0
"""What `--worker-extension-cls` adds to the worker, for tests."""


class CountDevices:
    def count_devices(self) -> int:
        return len(self.devices)
