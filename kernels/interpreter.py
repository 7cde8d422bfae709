"""Triton's interpreter, in which the kernels run without a GPU, made about twice as fast.

It replaces the functions of triton.language by its own at every call of a device function, and looks through all of
them to do so, although the launch has done it already. Here each module's device functions do so once in a launch.
"""

from collections.abc import Callable

from triton.runtime import interpreter

_replace: Callable = interpreter._patch_lang
_launch: Callable = interpreter.GridExecutor.__call__
_replaced: set[int] = set()  # in the launch that runs: dictionaries of modules, of which alone depends what is replaced


def _replace_once(function):
    module = id(function.__globals__)
    if module in _replaced:
        return interpreter._LangPatchScope()  # with nothing to restore
    _replaced.add(module)
    return _replace(function)


def _launch_afresh(self, *args, **options):
    _replaced.clear()
    return _launch(self, *args, **options)


def speed_up() -> None:
    interpreter._patch_lang, interpreter.GridExecutor.__call__ = _replace_once, _launch_afresh
