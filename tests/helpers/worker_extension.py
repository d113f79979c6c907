# SPDX-License-Identifier: Apache-2.0
"""What `--worker-extension-cls` adds to the worker, for tests."""


class ForTests:
    def count_devices(self) -> int:
        return len(self.devices)

    def lose_device(self) -> None:
        """From now on the device fails whatever it is asked."""

        def fails(_):
            raise RuntimeError("the chip is gone")

        self.probe._programs = [(device, fails) for device, _ in self.probe._programs]
