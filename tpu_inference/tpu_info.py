# SPDX-License-Identifier: Apache-2.0
"""What is known about TPU chips, as data, and which device this machine has, without starting JAX.

Sources of `CHIPS`:
- HBM, bandwidth, FLOP/s, ICI of v4, v5e, v5p, v6e, tpu7x: the "TPU v4", "TPU v5e", "TPU v5p", "TPU v6e" and "TPU7x (Ironwood)" pages of
  https://docs.cloud.google.com/tpu/docs (per chip; ICI summed over the links, both directions). The v4 page gives 2400 Gbit/s one way.
- v3: the same site and Jouppi et al., "A domain-specific supercomputer for training deep neural networks", CACM 63(7), 2020 (four ICI links of
  656 Gbit/s one way).
- VMEM and int8 rates of v5p and v6e (twice bf16): `jax.experimental.pallas.tpu.get_tpu_info`. PCI ids: JAX's `hardware_utils`.

What the number in an accelerator type counts: TensorCores for v2 to v4, v5p and tpu7x ("v4-8" and "tpu7x-8" are 4 chips on one host), chips for
v5e ("v5litepod-8") and v6e. A slice of more chips than one host can hold has 4 chips on each host, on every generation.
"""

import functools
import importlib.util
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tpu_inference import envs
from tpu_inference.errors import ConfigError

GIB = 2**30
MIB = 2**20
_CHIPS_PER_HOST_OF_MANY = 4
_METADATA_URL = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/accelerator-type"
_GOOGLE_PCI_VENDOR = "0x1ae0"


@dataclass(frozen=True)
class ChipSpec:
    """One generation, per chip unless said otherwise."""

    name: str
    vllm_name: str
    """Selects vLLM's default batch sizes ("V5E", "V5P" and "V6E" are known to it)."""
    type_names: tuple[str, ...]
    """How accelerator types begin."""
    pci_ids: tuple[str, ...]
    cores: int
    devices: int
    """JAX devices: one a core where cores do not share a program (v3, tpu7x), else one a chip."""
    type_counts_cores: bool
    max_chips_on_one_host: int
    hbm_bytes: int
    hbm_bytes_per_s: float
    flops: dict[str, float]
    """Dense peak by dtype, only of dtypes that the matrix unit takes."""
    vmem_bytes_per_core: int
    ici_bytes_per_s: float

    @property
    def hbm_bytes_per_device(self) -> int:
        """HBM of one JAX device."""
        return self.hbm_bytes // self.devices


CHIPS: dict[str, ChipSpec] = {
    chip.name: chip
    for chip in (
        ChipSpec(
            name="v3", vllm_name="V3", type_names=("v3",), pci_ids=("0x0027",),
            cores=2, devices=2, type_counts_cores=True, max_chips_on_one_host=4,
            hbm_bytes=32 * GIB, hbm_bytes_per_s=900e9, flops={"bfloat16": 123e12},
            vmem_bytes_per_core=16 * MIB, ici_bytes_per_s=656e9,
        ),
        ChipSpec(
            name="v4", vllm_name="V4", type_names=("v4",), pci_ids=("0x005e",),
            cores=2, devices=1, type_counts_cores=True, max_chips_on_one_host=4,
            hbm_bytes=32 * GIB, hbm_bytes_per_s=1200e9, flops={"bfloat16": 275e12},
            vmem_bytes_per_core=16 * MIB, ici_bytes_per_s=600e9,
        ),
        ChipSpec(
            name="v5e", vllm_name="V5E", type_names=("v5litepod", "v5e"), pci_ids=("0x0063",),
            cores=1, devices=1, type_counts_cores=False, max_chips_on_one_host=8,
            hbm_bytes=16 * GIB, hbm_bytes_per_s=819e9, flops={"bfloat16": 197e12, "int8": 393e12},
            vmem_bytes_per_core=128 * MIB, ici_bytes_per_s=400e9,
        ),
        ChipSpec(
            name="v5p", vllm_name="V5P", type_names=("v5p",), pci_ids=("0x0062",),
            cores=2, devices=1, type_counts_cores=True, max_chips_on_one_host=4,
            hbm_bytes=95 * GIB, hbm_bytes_per_s=2765e9, flops={"bfloat16": 459e12, "int8": 918e12},
            vmem_bytes_per_core=64 * MIB, ici_bytes_per_s=1200e9,
        ),
        ChipSpec(
            name="v6e", vllm_name="V6E", type_names=("v6e",), pci_ids=("0x006f",),
            cores=1, devices=1, type_counts_cores=False, max_chips_on_one_host=8,
            hbm_bytes=32 * GIB, hbm_bytes_per_s=1638e9,
            flops={"bfloat16": 918e12, "int8": 1836e12, "float8_e5m2": 918e12},
            vmem_bytes_per_core=128 * MIB, ici_bytes_per_s=800e9,
        ),
        ChipSpec(
            name="tpu7x", vllm_name="TPU7X", type_names=("tpu7x",), pci_ids=("0x0076",),
            cores=2, devices=2, type_counts_cores=True, max_chips_on_one_host=4,
            hbm_bytes=192 * GIB, hbm_bytes_per_s=7380e9,
            flops={"bfloat16": 2307e12, "float8_e4m3fn": 4614e12, "float8_e5m2": 4614e12},
            vmem_bytes_per_core=64 * MIB, ici_bytes_per_s=1200e9,
        ),
    )
}  # fmt: skip
_BY_TYPE_NAME = {name: chip for chip in CHIPS.values() for name in chip.type_names}
_BY_PCI_ID = {pci: chip for chip in CHIPS.values() for pci in chip.pci_ids}


@dataclass(frozen=True)
class Slice:
    """What an accelerator type names."""

    chip: ChipSpec
    num_chips: int
    num_hosts: int


@dataclass(frozen=True)
class Detection:
    """The device to use, and why. `num_chips` is of this host."""

    platform: Literal["tpu", "cpu"]
    reason: str
    chip: ChipSpec | None = None
    num_chips: int | None = None


def parse_accelerator_type(text: str) -> Slice:
    """Chips and hosts of a Cloud TPU accelerator type ("v5litepod-16", "v6e-8", "tpu7x-8").

    Raises:
        ConfigError: Not an accelerator type, a generation that is not served, or an impossible size.
    """
    match = re.fullmatch(r"([a-z0-9]+)-(\d+)", text.strip().lower())
    chip = _BY_TYPE_NAME.get(match[1]) if match else None
    if match is None or chip is None:
        raise ConfigError(
            f"accelerator type {text!r} is not known: allowed is one of {', '.join(_BY_TYPE_NAME)}, a dash, a size."
        )
    per_chip = chip.cores if chip.type_counts_cores else 1
    num_chips, rest = divmod(int(match[2]), per_chip)
    one_host = 0 < num_chips <= chip.max_chips_on_one_host
    if rest or not (one_host or (num_chips and num_chips % _CHIPS_PER_HOST_OF_MANY == 0)):
        unit = "TensorCores" if chip.type_counts_cores else "chips"
        raise ConfigError(
            f"accelerator type {text!r} is not possible: {chip.name} counts {unit} ({per_chip} a chip), on one host of up to "
            f"{chip.max_chips_on_one_host} chips or on several of {_CHIPS_PER_HOST_OF_MANY}."
        )
    return Slice(chip, num_chips, 1 if one_host else num_chips // _CHIPS_PER_HOST_OF_MANY)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip().lower()
    except OSError:
        return ""


def _pci_chips(root: Path) -> Counter[str]:
    """TPU chips on the PCI bus, by name."""
    devices = root.glob("sys/bus/pci/devices/*")
    ids = (_read(d / "device") for d in devices if _read(d / "vendor") == _GOOGLE_PCI_VENDOR)
    return Counter(_BY_PCI_ID[pci].name for pci in ids if pci in _BY_PCI_ID)


def _ask_metadata() -> str | None:
    """The accelerator type as the GCE metadata server tells it; None where it does not answer."""
    import urllib.request  # heavy, and rarely asked for

    request = urllib.request.Request(_METADATA_URL, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=2) as reply:
            return reply.read().decode().strip()
    except (OSError, ValueError):
        return None


def _find_tpu(root: Path) -> Detection | None:
    """The machine's TPU, whatever JAX_PLATFORMS says."""
    accelerator_type = envs.TPU_ACCELERATOR_TYPE
    declared = parse_accelerator_type(accelerator_type) if accelerator_type else None
    on_bus = _pci_chips(root)
    accel, vfio = list(root.glob("dev/accel[0-9]*")), list(root.glob("dev/vfio/[0-9]*"))
    # Any device can be bound to VFIO: its files tell of a TPU only together with something that names one.
    files = accel or (vfio if on_bus or declared else [])
    if files:
        chip = declared.chip if declared else CHIPS[on_bus.most_common(1)[0][0]] if on_bus else None
        where = "/dev/accel*" if accel else "/dev/vfio/*"
        return Detection("tpu", f"{len(files)} device files {where}", chip, on_bus.total() or len(files))
    source = "TPU_ACCELERATOR_TYPE"
    if declared is None and envs.TPU_USE_METADATA and (accelerator_type := _ask_metadata()):
        source, declared = "the GCE metadata server's accelerator type", parse_accelerator_type(accelerator_type)
    if declared is None:
        return None
    return Detection("tpu", f"{source} is {accelerator_type}", declared.chip, declared.num_chips // declared.num_hosts)


def _has_libtpu() -> bool:
    return importlib.util.find_spec("libtpu") is not None


def detect(root: str | Path = "/") -> Detection:
    """The device to serve on: this machine's TPU, or the CPU, as JAX_PLATFORMS allows.

    Raises:
        ConfigError: JAX_PLATFORMS allows neither, or demands a TPU that is not there, or a TPU is there without libtpu.
    """
    allowed = envs.JAX_PLATFORMS
    if allowed and not {"tpu", "cpu"} & set(allowed):
        raise ConfigError(
            f"JAX_PLATFORMS={','.join(allowed)} allows neither device that is served here: set it to tpu or cpu, or unset it."
        )
    tpu = _find_tpu(Path(root))
    if tpu is None and allowed and "cpu" not in allowed:
        raise ConfigError(
            f"JAX_PLATFORMS={','.join(allowed)} demands a TPU, but there is none (no /dev/accel* and no Google device behind /dev/vfio/*; "
            "TPU_ACCELERATOR_TYPE is not set): set JAX_PLATFORMS=cpu or unset it to serve on the CPU."
        )
    if tpu is None:
        return Detection("cpu", "no TPU: no device files, and TPU_ACCELERATOR_TYPE is not set")
    if allowed and "tpu" not in allowed:
        return Detection("cpu", f"JAX_PLATFORMS={','.join(allowed)}, though there is a TPU ({tpu.reason})")
    if not _has_libtpu():
        raise ConfigError(
            f"There is a TPU ({tpu.reason}) but libtpu is not installed: `pip install 'tpu-inference[tpu]'`, or set JAX_PLATFORMS=cpu."
        )
    return tpu


@functools.cache
def _detected() -> Detection:
    return detect()


_assumed: list[Detection] = []


def detect_once() -> Detection:
    """`detect` of this machine, for the life of the process; or what `assuming` says."""
    return _assumed[-1] if _assumed else _detected()


@contextmanager
def assuming(detection: Detection) -> Iterator[None]:
    """Have this process configure itself for a device that is not here."""
    _assumed.append(detection)
    try:
        yield
    finally:
        _assumed.pop()
