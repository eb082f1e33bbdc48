"""What only the notebooks use: checks, plots, builder and runner; importing it silences two messages."""

from contextlib import suppress
from typing import Any

from spark_ft.bench import quiet_known_messages

HEADLINE_TYPE = "application/vnd.spark-ft.headline+json"

quiet_known_messages()


def _plain(value: Any) -> bool | int | float | str:
    if hasattr(value, "item"):
        with suppress(RuntimeError, ValueError):  # more than one element: refused below
            value = value.item()
    if not isinstance(value, bool | int | float | str):
        raise TypeError(
            f"a headline holds numbers, booleans and strings, not {type(value).__name__}: {value!r}"
        )
    return value


def _shown(value: bool | int | float | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class Headline(dict):
    """A lab's closing numbers: a dict that displays as a table and that `make labs` reads."""

    def __repr__(self) -> str:
        return "; ".join(f"{name} {_shown(value)}" for name, value in self.items())

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        from html import escape

        rows = "".join(
            f"<tr><th>{escape(str(k))}</th><td>{escape(_shown(v))}</td></tr>" for k, v in self.items()
        )
        return {HEADLINE_TYPE: dict(self), "text/html": f"<table>{rows}</table>", "text/plain": repr(self)}


def headline(numbers: dict[str, Any]) -> Headline:
    """Return a lab's headline numbers; make it the last expression of the lab's last code cell.

    Args:
        numbers: name with unit → number, boolean or short string; the most important one first, since the
            table of `make labs` shows as many as fit. One-element tensors and NumPy scalars become numbers.
    """
    if not numbers:
        raise ValueError("headline({}): a lab ends with at least one number")
    return Headline({name: _plain(value) for name, value in numbers.items()})
