"""Find tensors with NaN or infinite values: comparisons with NaN are False, so they pass most checks unnoticed."""

from collections.abc import Mapping

from torch import Tensor

_NAMED = 3  # number of tensors that a message lists


def describe_non_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return which tensors have values that float32 holds as NaN or infinity, and how many; None if all are finite."""
    found: dict[str, str] = {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            wrong = tensor.numel() - int(tensor.float().isfinite().sum())
            if wrong:
                found[name] = f"{name} ({wrong:,} of {tensor.numel():,} values)"
    if not found:
        return None
    more = ", …" if len(found) > _NAMED else ""
    return (
        f"NaN or infinity in {len(found)} of {len(tensors)} tensors: {', '.join(list(found.values())[:_NAMED])}{more}"
    )
