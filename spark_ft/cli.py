"""The command `spark-ft doctor | plan | data | parity | bench | export | labs`; imports come late."""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path


def _doctor(arguments: list[str]) -> int:
    argparse.ArgumentParser(prog="spark-ft doctor", description=COMMANDS["doctor"][1]).parse_args(arguments)
    from spark_ft.doctor import describe, look

    machine = look()
    print(describe(machine))
    for fault in machine.faults:  # in the report too; here for who looks at errors alone
        print(f"spark-ft doctor: {fault}", file=sys.stderr)
    return 0


def _plan(arguments: list[str]) -> int:
    from spark_ft.memory.plan import METHODS, TASKS
    from spark_ft.memory.shapes import DTYPES, SHAPES, plan_report

    parser = argparse.ArgumentParser(
        prog="spark-ft plan",
        description="The memory of a training step, term by term; nothing is loaded.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="models:\n  " + "\n  ".join(SHAPES),
    )
    add, number = parser.add_argument, {"type": int, "metavar": "N"}
    add("model", help="a name below, its hub id, or a folder with a config.json")
    add("--method", choices=METHODS, default="lora", help="default lora")
    add("--task", choices=TASKS, default="sft", help="default sft; a preference pair is two rows")
    add("--batch", **number, default=1, help="rows or pairs at once (default 1)")
    add("--seq", **number, default=2048, help="tokens per row (default 2048)")
    add("--rank", **number, default=16, help="of the adapters (default 16)")
    add("--dtype", choices=DTYPES, default="bf16", help="of weights that are not 4-bit (default bf16)")
    add("--adapter-dtype", choices=DTYPES, default="fp32", help="of adapters, gradients, moments (fp32)")
    add("--accumulation", **number, default=1, help="parts that a step is computed in (default 1)")
    add("--no-checkpointing", action="store_true", help="keep all activations for backward")
    try:
        print(plan_report(**vars(parser.parse_args(arguments))))
    except ValueError as error:
        print(f"spark-ft plan: {error}", file=sys.stderr)
        return 1
    return 0


def _data(arguments: list[str]) -> int:
    from spark_ft.data.cleaning import CLEAN_UPS
    from spark_ft.data.own import own_rows
    from spark_ft.models import load_tokenizer

    parser = argparse.ArgumentParser(prog="spark-ft data", description=COMMANDS["data"][1])
    add = parser.add_argument
    add("file", type=Path, help=".jsonl, .json, .csv, .tsv, .parquet or .txt, each also as .gz")
    add("--model", metavar="NAME", help="whose template and tokens; default the embedded model's")
    add("--held-out", type=Path, metavar="FILE", help="test rows in any such format; none may be in FILE")
    add("--keep", nargs="+", default=(), choices=CLEAN_UPS, metavar="FAULT", help=", ".join(CLEAN_UPS))
    add("--out", type=Path, metavar="PATH", help="the clean rows; default FILE's name with .clean.jsonl")
    options = parser.parse_args(arguments)
    stem = Path(options.file.name.removesuffix(".gz")).stem
    out = options.out or options.file.with_name(f"{stem}.clean.jsonl")
    try:
        rows = own_rows(options.file)
        held_out = options.held_out and own_rows(options.held_out)
        tokenizer = load_tokenizer(options.model)
        rows = rows.rendered(tokenizer).cleaned(held_out, options.keep)
        report = f"{rows}\n\n{rows.samples(tokenizer)}\n"
        if rows.records:
            rows.write(out)  # first: `spark-ft data FILE | head` ends here
        print(report, flush=True)
        if not rows.records:
            raise ValueError("no row is left to write; mend what is named above")
    except ValueError as error:
        print(f"spark-ft data: {error}", file=sys.stderr)
        return 1
    if not held_out:
        print("Leaks were not looked for: name your test rows with --held-out FILE")
    print(f'{len(rows.records)} rows are in {out}; read_records("{out}", "{rows.kind}") reads them')
    return 0


def _rows_parser(command: str, rows: str) -> argparse.ArgumentParser:
    from spark_ft.bench.cases import ROWS

    parser = argparse.ArgumentParser(
        prog=f"spark-ft {command}",
        description=COMMANDS[command][1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="rows:\n" + "\n".join(f"  {row.name:<20} {row.says}" for row in ROWS.values()),
    )
    parser.add_argument("rows", nargs="*", metavar="row", help=f"which rows; default {rows}")
    return parser


def _parse_rows(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    from spark_ft.bench.cases import ROWS

    options = parser.parse_args(arguments)
    if unknown := [name for name in options.rows if name not in ROWS]:
        parser.error(f'no row is called "{unknown[0]}"; there are {", ".join(ROWS)}')
    return options


def _parity(arguments: list[str]) -> int:
    from spark_ft.bench.cases import PARITY, ROWS
    from spark_ft.bench.harness import check_equal, start_process

    options = _parse_rows(_rows_parser("parity", ", ".join(PARITY)), arguments)
    start_process()
    wrong = 0
    for row in [ROWS[name] for name in options.rows or PARITY]:
        try:
            loss, gradient = check_equal(row.name, row.ours(), row.theirs())
            print(
                f"{row.name:<20} equal: loss to {loss:.0e}, gradient to {gradient:.0e} ({row.says})",
                flush=True,
            )
        except ValueError as error:
            print(f"{error} ({row.says})", flush=True)
            wrong += 1
    return 1 if wrong else 0


def _bench(arguments: list[str]) -> int:
    from spark_ft.bench.cases import ROWS
    from spark_ft.bench.harness import compare, machine, start_process, table
    from spark_ft.files import write_atomically

    parser = _rows_parser("bench", "all")
    parser.add_argument("--pairs", type=int, default=7, help="how often each side is timed (default 7)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write every single measurement here")
    options = _parse_rows(parser, arguments)
    if options.pairs < 1:
        parser.error(f"--pairs is {options.pairs}; at least one pair is needed")
    if options.json and not options.json.parent.is_dir():
        parser.error(f"--json: there is no folder {options.json.parent}; make it first")
    start_process()
    where, results = machine(), []
    for name in options.rows or ROWS:
        print(f"{name} …", file=sys.stderr, flush=True)
        try:
            results.append(compare(ROWS[name], options.pairs))
        except ValueError as error:
            print(f"spark-ft bench: {error}; nothing was timed", file=sys.stderr)
            return 1
    print(table(results, where))
    if options.json:
        text = json.dumps({**where, "rows": [asdict(result) for result in results]}, indent=1) + "\n"
        write_atomically(options.json, lambda path: path.write_text(text, encoding="utf-8"))
    return 0


def _export(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="spark-ft export",
        description="Merge an adapter into its base's original weights and write one file, or a folder.",
    )
    add = parser.add_argument
    add("path", type=Path, help="NAME.gguf for llama.cpp and Ollama; any other name is a transformers folder")
    add("--model", metavar="NAME", help="the base: a folder or hub id (default: the embedded model)")
    add("--adapter", type=Path, metavar="FOLDER", help="in PEFT's format; without it the base is exported")
    add("--dtype", help="f16, bf16, q8_0, q5_0, q4_0, q4_1 (default f16); f32, f16, bf16 for a folder")
    add("--alone", action="store_true", help="write the LoRA adapter alone, as GGUF")
    add("--modelfile", action="store_true", help="write Ollama's Modelfile beside it")
    add("--no-verify", action="store_true", help="skip asking llama.cpp and the model the same 20 questions")
    options = parser.parse_args(arguments)
    whole = options.path.suffix == ".gguf" and not options.alone
    if options.alone and not (options.adapter and options.path.suffix == ".gguf"):
        parser.error("--alone writes the adapter of --adapter FOLDER into NAME.gguf")
    if options.modelfile and not whole:
        parser.error("--modelfile needs a whole model in NAME.gguf")
    try:
        return _exported(options, whole)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(f"spark-ft export: {error}", file=sys.stderr)
        return 1


def _exported(options: argparse.Namespace, whole: bool) -> int:
    from spark_ft import adapters, export_adapter, export_gguf, export_safetensors, models
    from spark_ft.export.ollama import commands, write_modelfile
    from spark_ft.export.verify import verify_gguf

    base = options.model, options.adapter
    if options.alone:
        export_adapter(*base, options.path)
    elif whole:
        export_gguf(*base, options.path, options.dtype or "f16", progress=True)
    else:
        export_safetensors(*base, options.path, options.dtype, progress=True)
    print(f"{options.path} is written", flush=True)
    if not whole or (options.no_verify and not options.modelfile):
        return 0
    if options.modelfile:
        tokenizer = models.load_tokenizer(options.model)
        print(commands(options.path.stem, write_modelfile(options.path, tokenizer)), flush=True)
    if options.no_verify:
        return 0
    import torch

    model, tokenizer = models.load_model(options.model, dtype=torch.float32)
    if options.adapter:
        adapters.load_adapters(model, options.adapter)
    found = verify_gguf(options.path, model, tokenizer)
    print(found)
    return 0 if found.ok else 1


def _labs(arguments: list[str]) -> int:
    from spark_ft.lab.run import main  # `make labs` runs it as a module, so that it has its own parser

    return main(arguments)


COMMANDS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "doctor": (_doctor, "look at this machine: memory, versions, and the traps that apply here"),
    "plan": (_plan, "count the memory of a training run, and say whether it fits"),
    "data": (_data, "check rows of your own, show what a template makes of them, write a clean file"),
    "parity": (_parity, "compare loss and gradient with PEFT, TRL and bitsandbytes; nothing is timed"),
    "bench": (_bench, "measure training steps side by side with PEFT and TRL, after checking their equality"),
    "export": (_export, "write a tuned model as GGUF or safetensors, and let llama.cpp check it"),
    "labs": (_labs, "execute the labs headless and print a closing table"),
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
    return COMMANDS[options.command][0](options.arguments)


if __name__ == "__main__":
    sys.exit(main())
