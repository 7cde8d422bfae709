"""The interpreter's short cut: functions of triton.language are replaced once in a launch, and are back after it."""

import pytest
import torch
import triton
import triton.language as tl
from conftest import HAS_GPU

import kvevict
from kvevict.kernels.primitives import INTERPRETED

pytestmark = pytest.mark.skipif(HAS_GPU, reason="about Triton's interpreter")


def test_replacements_are_made_once_a_launch(monkeypatch):
    assert INTERPRETED
    interpreter = triton.runtime.interpreter
    replace, load, calls = interpreter._patch_builtin, tl.load, []
    monkeypatch.setattr(interpreter, "_patch_builtin", lambda *args: calls.append(args[0]) or replace(*args))
    counts = []
    with kvevict.backend("triton"):
        for tokens in (100, 700):  # two tiles or twelve
            calls.clear()
            kvevict.keydiff_scores(torch.randn(1, 1, tokens, 64), anchor=torch.randn(1, 1, 64))
            counts.append(len(calls))
    assert max(counts) <= 20
    assert tl.load is load


def test_a_launch_that_failed_leaves_nothing_behind():
    @triton.jit
    def wrong_kernel(x_ptr):
        tl.static_assert(False)

    load = tl.load
    with pytest.raises(triton.runtime.errors.InterpreterError):
        wrong_kernel[(1,)](torch.zeros(1))
    assert tl.load is load
    with kvevict.backend("triton"):
        assert kvevict.key_norm_scores(torch.ones(1, 1, 3, 4)).tolist() == [[[-2.0] * 3]]
