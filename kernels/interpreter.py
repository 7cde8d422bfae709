"""Triton's interpreter, in which the kernels run without a GPU, made about twice as fast.

It replaces the functions of triton.language by its own at every call of a device function, and looks through all of
them to do so, although the launch has done it already. Here each module's device functions do so once in a launch.
"""

from triton.runtime import interpreter

_replace = interpreter._patch_lang
_replaced: set[int] = set()  # in the launch that runs: dictionaries of modules, of which alone depends what is replaced


class _Launch(interpreter._LangPatchScope):
    """What the interpreter restores when the launch is over."""

    def __init__(self, scope: interpreter._LangPatchScope) -> None:
        self._scope = scope

    def restore(self) -> None:
        self._scope.restore()
        _replaced.clear()


def _replace_once(function) -> interpreter._LangPatchScope:
    module = id(function.__globals__)
    if module in _replaced:
        return interpreter._LangPatchScope()  # with nothing to restore
    scope = _replace(function)
    if not _replaced:  # the launch itself; what device functions replace, nobody restores
        scope = _Launch(scope)
    _replaced.add(module)
    return scope


def speed_up() -> None:
    interpreter._patch_lang = _replace_once
