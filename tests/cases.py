"""Inputs that the tests share."""

import itertools

import pytest
import torch
from conftest import DEVICE

import kvevict


def name(value) -> str:
    """Test ids like B2-H3-S517-D64-bfloat16."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, tuple) and isinstance(value[0], tuple):
        return "-".join(map(name, value))
    if isinstance(value, tuple):
        return "-".join(f"{letter}{size}" for letter, size in zip("BHSDV", value, strict=False))
    return str(value)


def crossed(*axes):
    """Every combination; those that differ in more than one axis from the first values are for `make test-all`."""
    return [
        pytest.param(
            *values,
            id="-".join(map(name, values)),
            marks=pytest.mark.slow if sum(v != axis[0] for v, axis in zip(values, axes, strict=True)) > 1 else (),
        )
        for values in itertools.product(*axes)
    ]


def cache(shape, dtype=torch.float32, layout="BHSD", seed=0):
    """K and V for shape (B, H, S, D, Dv), as contiguous tensors, transposed [B, S, H, D], or slices of larger ones."""
    B, H, S, D, DV = shape
    generator = torch.Generator().manual_seed(seed)

    def one(width):
        x = torch.randn(B, H, S, width, generator=generator).to(dtype).to(DEVICE)
        if layout == "BSHD":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if layout == "sliced":
            larger = torch.zeros(B, H + 1, S + 3, width + 16, device=DEVICE).to(dtype)
            view = larger[:, 1:, 2 : 2 + S, 8 : 8 + width]
            as_bytes(view).copy_(as_bytes(x))
            return view
        return x

    return one(D), one(DV)


def as_bytes(x):
    """float8 has no comparison in torch; its bytes do."""
    return x.view(torch.uint8) if x.element_size() == 1 else x


def both(function):
    """[reference's result, Triton's result] of a call."""
    results = []
    for backend in ("reference", "triton"):
        with kvevict.backend(backend):
            results.append(function())
    return results


def copy_of(x):
    """A copy with the same strides."""
    base = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    as_bytes(base).copy_(as_bytes(x))
    return base


def assert_same(got, expected):
    for a, b in zip(got[:3], expected[:3], strict=True):
        assert torch.equal(as_bytes(a), as_bytes(b))
    assert (got.lengths is None) == (expected.lengths is None)
    if got.lengths is not None:
        assert torch.equal(got.lengths, expected.lengths)
