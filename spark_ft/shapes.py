"""The former address of `spark_ft.memory.shapes` and of the command `spark-ft plan`."""

from spark_ft import cli
from spark_ft.memory.shapes import SHAPES, known_config

__all__ = ["SHAPES", "known_config", "main"]


def main(arguments: list[str]) -> int:
    """`spark-ft plan` with these arguments; returns the exit status."""
    return cli.main(["plan", *arguments])
