# SPDX-License-Identifier: Apache-2.0
"""vLLM's source distribution, and the packages that only its tests need."""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from vllm_tests.environment import ROOT, VERSION, Workplace

REQUIREMENTS = ROOT / "requirements" / "vllm_tests.txt"


def _pip(*arguments: str) -> None:
    # pip builds metadata even to download: without a device, as scripts/install.sh builds vLLM.
    env = {**os.environ, "VLLM_TARGET_DEVICE": "empty", "VLLM_VERSION_OVERRIDE": VERSION, "PIP_USER": "0"}
    subprocess.run([sys.executable, "-m", "pip", "-q", *arguments], check=True, env=env)


def sources(place: Workplace) -> None:
    """Unpack the source distribution, unless that is done, without vLLM's package: tests would import that one."""
    if place.sources.exists():
        return
    with tempfile.TemporaryDirectory(dir=place.directory) as directory:
        _pip(
            "download", "--no-deps", "--no-build-isolation", "--no-binary", "vllm", f"vllm=={VERSION}", "-d", directory
        )  # fmt: skip
        (archive,) = Path(directory).glob("vllm-*.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(directory, filter="data")
        unpacked = Path(directory) / place.sources.name
        shutil.rmtree(unpacked / "vllm")
        unpacked.rename(place.sources)


def packages(place: Workplace) -> None:
    """Install the packages beside the environment, which stays as its pins say."""
    stamp = place.packages / "requirements.txt"
    wanted = REQUIREMENTS.read_text()
    if stamp.exists() and stamp.read_text() == wanted:
        return
    shutil.rmtree(place.packages, ignore_errors=True)
    _pip("install", "--no-deps", "--target", str(place.packages), "-r", str(REQUIREMENTS))
    stamp.write_text(wanted)
