"""The command `spark-ft`; each subcommand is imported only when it is called."""

import argparse
import sys
from collections.abc import Callable


def _labs(arguments: list[str]) -> int:
    from spark_ft.lab.run import main

    return main(arguments)


def _bench(arguments: list[str]) -> int:
    from spark_ft.bench.harness import main

    return main(arguments)


def _plan(arguments: list[str]) -> int:
    from spark_ft.memory.shapes import main

    return main(arguments)


def _doctor(arguments: list[str]) -> int:
    from spark_ft.doctor import main

    return main(arguments)


COMMANDS: dict[str, tuple[Callable[[list[str]], int | None], str]] = {
    "doctor": (_doctor, "look at this machine: memory, versions, and the traps that apply here"),
    "plan": (_plan, "count the memory of a training run, and say whether it fits"),
    "labs": (_labs, "execute the labs headless and print a closing table"),
    "bench": (_bench, "measure training steps side by side with PEFT and TRL"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run `spark-ft COMMAND …`; what follows the command goes to the command's own parser."""
    from spark_ft.version import __version__

    parser = argparse.ArgumentParser(prog="spark-ft", formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=__version__)
    parser.epilog = "commands:\n" + "\n".join(f"  {name:<8}{says}" for name, (_, says) in COMMANDS.items())
    parser.add_argument("command", choices=COMMANDS, metavar="command")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="see: spark-ft COMMAND --help")
    options = parser.parse_args(arguments)
    return COMMANDS[options.command][0](options.arguments) or 0


if __name__ == "__main__":
    sys.exit(main())
