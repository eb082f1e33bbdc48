"""Public names that are imported only when they are asked for, so that `import spark_ft` is instant."""

from collections.abc import Callable
from importlib import import_module
from typing import Any


def lazy_names(
    package: str, home: dict[str, tuple[str, ...]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a package whose names live in the modules of `home`.

    Args:
        package: the package's `__name__`.
        home: module, relative to the package → the public names it holds.
    """
    module_of = {name: module for module, names in home.items() for name in names}

    def __getattr__(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{module_of[name]}"), name)

    names = sorted(module_of)
    return __getattr__, lambda: names, names  # one list, so that dir() shows what a package appends
