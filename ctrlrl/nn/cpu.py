"""What PyTorch has to be told to run small networks at the speed of a CPU."""

from __future__ import annotations

import contextlib
import ctypes
import platform
from collections.abc import Iterator

import torch

SMALL = 2**20
"""Multiplications of a product up to which the default BLAS is quicker than oneDNN, which takes longer to set it up."""

_BY_ONEDNN = "bf16"
_switched = False
"""Whether the setting is ours and not the user's."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def prepare_cpu(threads: int | None = None) -> None:
    """Set the whole process up for training and acting on a CPU; the results stay those of float32.

    Called by every command and function that trains or evaluates; call it yourself around an agent of your own loop.

    Args:
        threads: that one tensor operation may use; None leaves PyTorch's choice.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    _keep_freed_memory()
    _products_by_onednn()


@contextlib.contextmanager
def products_of(rows: int, width: int = 256) -> Iterator[None]:
    """Inside, products of `rows` rows by layers of `width` units are made the quicker way: small ones by the default
    BLAS."""
    setting = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    if (
        rows * width * width > SMALL or not _switched or setting.fp32_precision != _BY_ONEDNN
    ):  # or the user has decided since
        yield
        return
    setting.fp32_precision = "none"
    try:
        yield
    finally:
        setting.fp32_precision = _BY_ONEDNN


def _keep_freed_memory() -> None:
    """Have freed memory reused instead of handed back to the kernel.

    An update frees a few MiB of temporaries. Where they lie at the end of the heap, glibc returns them to the kernel
    and faults them in again page by page at the next update.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)  # the largest value allowed; larger blocks are mapped one by one
        libc.mallopt(_M_TRIM_THRESHOLD, 1 * 2**30)


def _products_by_onednn() -> None:
    """Have oneDNN multiply float32 matrices where it does so in float32.

    PyTorch's default is MKL, which takes twice as long on AMD processors as oneDNN. The one public setting that leads
    to oneDNN allows it to round the factors to bfloat16, which it does on processors with matrix units (Intel AMX;
    there MKL is fast anyway) and nowhere else. So it is tried, and taken back where precision is lost.
    """
    global _switched
    setting = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    if not torch.backends.mkldnn.is_available() or setting.fp32_precision not in ("none", "ieee"):  # type: ignore[no-untyped-call]
        return  # not there, or the user has decided
    before = setting.fp32_precision
    factor = torch.rand(256, 256, generator=torch.Generator().manual_seed(0))
    exact = factor.double() @ factor.double()
    setting.fp32_precision = _BY_ONEDNN
    _switched = True
    if (factor @ factor - exact).abs().max() > 1e-3:  # 4e-5 in float32, 0.05 with factors in bfloat16
        setting.fp32_precision, _switched = before, False
