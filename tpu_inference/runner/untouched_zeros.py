# SPDX-License-Identifier: Apache-2.0
"""Zeros on JAX's CPU backend whose memory pages stay untouched, so that a KV cache takes memory only as it fills.

XLA writes the zeros of `jnp.zeros`, which makes every page of a cache of gigabytes resident before the first request. Here XLA allocates the
array for a custom call that writes nothing, and the kernel is asked for fresh pages, which read as zero. XLA owns the array as any other: it
can be donated and updated in place, which memory handed to it from outside cannot.
"""

import ctypes
import mmap
import sys
from functools import cache

import jax
import jax.numpy as jnp

from tpu_inference.logger import init_logger

logger = init_logger(__name__)

TARGET = "tpu_inference_untouched"
MIN_BYTES = 1 << 20
"""Of a shard; smaller ones are not worth it, and below a page there is nothing to give back."""
_METADATA_EXTENSION = 1  # XLA_FFI_Extension_Metadata
_MADV_DONTNEED = 4  # Linux: give the pages back; anonymous memory then reads as zero


# The head of XLA's FFI structures (`xla/ffi/api/c_api.h`, shipped with jaxlib): as much as a handler without work looks at.
class _Version(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        ("extension_start", ctypes.c_void_p),
        ("major", ctypes.c_int),
        ("minor", ctypes.c_int),
    ]


class _Metadata(ctypes.Structure):
    _fields_ = [("struct_size", ctypes.c_size_t), ("version", _Version)]


class _Extension(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        ("type", ctypes.c_int),
        ("next", ctypes.c_void_p),
        ("metadata", ctypes.POINTER(_Metadata)),
    ]


class _CallFrame(ctypes.Structure):
    _fields_ = [("struct_size", ctypes.c_size_t), ("extension_start", ctypes.POINTER(_Extension))]


@ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(_CallFrame))
def _handler(frame):
    """Answers XLA's question for the API version at registration, and does nothing when run. Returns no error."""
    extension = frame.contents.extension_start
    if extension and extension.contents.type == _METADATA_EXTENSION:
        version = extension.contents.metadata.contents.version
        version.major, version.minor = 0, 1
    return None


@cache
def _register() -> None:
    capsule = jax.ffi.pycapsule(ctypes.cast(_handler, ctypes.c_void_p).value)
    jax.ffi.register_ffi_target(TARGET, capsule, platform="cpu")


def _drop_pages(array: jax.Array) -> None:
    """Let every whole page of `array` read as zero, whatever its memory held before; the edges are written."""
    libc = ctypes.CDLL(None, use_errno=True)
    for shard in array.addressable_shards:
        start, size = shard.data.unsafe_buffer_pointer(), shard.data.nbytes
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (start + size) // mmap.PAGESIZE * mmap.PAGESIZE
        ctypes.memset(start, 0, first - start)
        ctypes.memset(last, 0, start + size - last)
        if libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _MADV_DONTNEED):
            raise OSError(ctypes.get_errno(), "madvise")


def _local_shape(abstract: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(abstract.sharding.shard_shape(abstract.shape), abstract.dtype)


def can_leave_untouched(abstract: jax.ShapeDtypeStruct) -> bool:
    """Whether `untouched_zeros` serves this array: large, on CPU devices of Linux."""
    local = _local_shape(abstract)
    on_cpu = all(device.platform == "cpu" for device in abstract.sharding.device_set)
    return on_cpu and sys.platform == "linux" and local.size * local.dtype.itemsize >= MIN_BYTES


def untouched_zeros(abstract: jax.ShapeDtypeStruct) -> jax.Array:
    """Zeros of a shape, dtype and named sharding; see `can_leave_untouched`."""
    local = _local_shape(abstract)
    _register()
    allocate = jax.shard_map(
        lambda: jax.ffi.ffi_call(TARGET, local)(),
        mesh=abstract.sharding.mesh, in_specs=(), out_specs=abstract.sharding.spec, check_vma=False,
    )  # fmt: skip
    array = jax.block_until_ready(jax.jit(allocate, out_shardings=abstract.sharding)())
    _drop_pages(array)
    return array


def zeros(abstract: jax.ShapeDtypeStruct) -> jax.Array:
    """Zeros of a shape, dtype and sharding, made where they stay; untouched where that can be had."""
    if can_leave_untouched(abstract):
        try:
            return untouched_zeros(abstract)
        except (OSError, RuntimeError, ValueError) as error:  # another jaxlib's interface; memory that is locked
            logger.debug("Zeros take all of their memory at once: %s", error)
    return _zeros_program(abstract)()


@cache
def _zeros_program(abstract: jax.ShapeDtypeStruct):
    return jax.jit(lambda: jnp.zeros(abstract.shape, abstract.dtype), out_shardings=abstract.sharding)
