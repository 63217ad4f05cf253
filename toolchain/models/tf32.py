"""Choose how an NVIDIA GPU multiplies float32 numbers: exactly, or rounded to TF32."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def float32_products(*, tf32: bool) -> Iterator[None]:
    """In the block, round the factors of float32 matrix products and convolutions on a GPU to TF32, or do not.

    TF32 keeps 10 of the 23 bits of a mantissa and has float32's range; tensor cores then do the work.  PyTorch's own
    default rounds those of convolutions and not those of matrix products.  Neither changes anything on a CPU, or in 16
    bits.
    """
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    _set(tf32, tf32)
    try:
        yield
    finally:
        _set(*before)


def _set(products: bool, convolutions: bool) -> None:
    # PyTorch's newer fields (fp32_precision) cannot be mixed with these, which torch.compile of 2.11 still reads
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = products, convolutions
