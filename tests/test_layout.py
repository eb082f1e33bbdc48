"""The promises of the layout: arrows run one way, files stay short, imports are cheap, no pickles."""

import ast
import importlib
import inspect
import subprocess
import sys
from importlib.metadata import version

import pytest

import spark_ft
from spark_ft.files import ROOT

PACKAGE = ROOT / "spark_ft"
TREES = {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}
# Each layer may import itself and the layers below it; data/ and methods/ stand side by side.
LAYERS = {"lab": 4, "cli": 4, "shapes": 4, "bench": 3, "data": 1, "methods": 1}
GROUND = {"files", "lazy", "stats", "version"}
MODULES = 2  # every other file and folder of the package
PEERS = {"bench/peers.py", "lab/parity.py"}
PICKLES = {"pickle", "dill", "joblib", "shelve", "cloudpickle"}


def called(node):
    return ast.unparse(node.func)


def imported(tree):
    """Full dotted names of everything a file imports, at its top or inside a function."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            origin = "." * node.level or f"{node.module}."
            names |= {f"{origin}{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and called(node).endswith(("import_module", "__import__")):
            names |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
    return names


def no_imports(wrong):
    """Fail with every import for which wrong(file, full dotted name) is true."""
    found = [(name, other) for name, tree in TREES.items() for other in sorted(imported(tree))]
    none(f"{name} imports {other}" for name, other in found if wrong(name, other))


def none(offenders):
    lines = "\n".join(offenders)
    assert not lines, lines


def layer(dotted):
    """The folder or file directly in spark_ft, and its layer: "spark_ft.data.chat.render" → ("data", 1)."""
    name = dotted.removesuffix(".py").replace("/", ".").removeprefix("spark_ft.").split(".")[0]
    return name, 0 if name in GROUND else LAYERS.get(name, MODULES)


def length(*paths):
    return sum(len(path.read_text().splitlines()) for path in paths)


def test_the_reader_of_imports_sees_all_kinds():
    code = "import a.b\nfrom c import d\nfrom . import x\ndef f():\n  import e\n  import_module('g.h')\n"
    assert imported(ast.parse(code)) == {"a.b", "c.d", ".x", "e", "g.h"}


def test_arrows_run_one_way():
    """lab and cli → bench → modules → data and methods → files, stats, lazy; nothing imports upwards."""

    def up(name, other):
        (mine, from_layer), (theirs, to_layer) = layer(name), layer(other)
        beside = mine == theirs or from_layer == to_layer in (MODULES, LAYERS["lab"])
        ours = other.startswith("spark_ft.") and name != "__init__.py"
        return other.startswith(".") or (ours and from_layer <= to_layer and not beside)

    no_imports(up)


def test_methods_import_torch_and_siblings_alone_and_only_the_peers_and_parity_import_others():
    allowed = {"torch", "jaxtyping", *sys.stdlib_module_names}

    def foreign(other):
        return other.split(".")[0] not in allowed and not other.startswith("spark_ft.methods.")

    no_imports(lambda name, other: name.startswith("methods/") and foreign(other))
    theirs = {"peft", "trl", "bitsandbytes"}
    no_imports(lambda name, other: other.split(".")[0] in theirs and name not in PEERS)


def test_nothing_reads_pickles_or_trusts_remote_code():
    no_imports(lambda name, other: other.split(".")[0] in PICKLES)
    calls = [(name, n) for name, tree in TREES.items() for n in ast.walk(tree) if isinstance(n, ast.Call)]
    unsafe = {"torch.load", "torch.save", "numpy.load", "np.load"}
    none(f"{name}:{node.lineno} calls {called(node)}" for name, node in calls if called(node) in unsafe)
    given = [(name, k) for name, call in calls for k in call.keywords if k.arg == "trust_remote_code"]
    trusts = [(name, k.value.lineno) for name, k in given if ast.unparse(k.value) != "False"]
    none(f"{name}:{line} may trust remote code" for name, line in trusts)


def test_every_file_is_read_in_one_sitting():
    outside = [PACKAGE / name for name in TREES if not name.startswith(("lab/", "bench/", "export/"))]
    answers = set(ROOT.glob("tests/test_checks_*.py"))  # wrong and right answers to the labs' exercises
    limits = {
        "methods/": (length(*PACKAGE.glob("methods/*.py")), 900),
        "methods/lora.py": (length(PACKAGE / "methods/lora.py"), 125),
        "methods/dora.py": (length(PACKAGE / "methods/dora.py"), 140),
        "the package without lab/, bench/ and export/": (length(*outside), 8000),  # the aim, 5,200, is missed
        "export/": (length(*PACKAGE.glob("export/*.py")), 1750),
        "tests/ without the labs' answers": (length(*set(ROOT.glob("tests/*.py")) - answers), 12000),
        **{path.name: (length(path), 950) for path in answers},
    }
    for module, name in (("lora", "LoRALinear"), ("dora", "DoRALinear")):
        body = next(n.body for n in TREES[f"methods/{module}.py"].body if getattr(n, "name", "") == name)
        forward = [n for n in body if getattr(n, "name", "") == "forward"]
        lines = forward[0].end_lineno - forward[0].lineno + 1 if forward else float("inf")
        limits[f"{name}.forward"] = (lines, 16)
    none(f"{what}: {lines} lines, more than {most}" for what, (lines, most) in limits.items() if lines > most)


def test_public_names_say_what_they_are_and_modules_functions_and_classes_have_docstrings():
    wrong = []
    for name in set(spark_ft.__all__) - {"__version__", "NF4_CODE"}:
        thing = getattr(spark_ft, name)
        doc = inspect.getdoc(thing) or ""
        if not doc or doc.startswith(f"{name}("):  # which is what dataclass writes
            wrong.append(f"{name} has no docstring of its own")
        if not thing.__module__.startswith("spark_ft."):
            wrong.append(f"{name} comes from {thing.__module__}")
        parameters = inspect.signature(thing).parameters.values() if inspect.isfunction(thing) else []
        if inspect.Parameter.VAR_KEYWORD in {parameter.kind for parameter in parameters}:
            wrong.append(f"{name} takes **options")
    none(wrong)
    assert spark_ft.NF4_CODE.shape == (16,)
    wrong = [name for name, tree in TREES.items() if len(tree.body) > 1 and not ast.get_docstring(tree)]
    for name, tree in TREES.items():
        defined = [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
        public = [n for n in defined if not n.name.startswith("_") and not name.startswith("lab/")]
        wrong += [f"{name}: {node.name}" for node in public if not ast.get_docstring(node)]
    none(wrong)


# Module → names that others rely on; each is importable from `spark_ft` too.
CONTRACT = {
    "methods.lora": "LoRALinear",
    "methods.dora": "DoRALinear row_norm",
    "methods.neftune": "neftune neftune_noise",
    "methods.nf4": "NF4_CODE NF4Linear NF4Tensor quantize_nf4",
    "methods.logprobs": "token_logps",
    "methods.preference": "dpo_loss implicit_reward ipo_loss kto_loss orpo_loss simpo_loss",
    "adapters": "AdapterConfig add_adapters adapters_disabled merge_adapters "
    "load_adapters save_adapters use_adapter",
    "models": "load_model profile",
    "data": "collate_feedback collate_preferences collate_sft read_records render",
    "scoring": "completion_logps sequence_logps",
    "training": "History TrainConfig sft_loss train",
    "memory": "MemoryBudget MemoryPlan budget known_config measure plan_training",
    "export": "export_gguf verify_gguf write_modelfile",
}


@pytest.mark.parametrize(("module", "names"), CONTRACT.items())
def test_names_that_others_rely_on_are_in_their_module_and_in_the_package(module, names):
    home = importlib.import_module(f"spark_ft.{module}")
    none(name for name in names.split() if getattr(home, name) is not getattr(spark_ft, name))


def test_the_version_is_the_metadatas_and_unknown_names_are_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'spark_ft' has no attribute 'lorra'"):
        _ = spark_ft.lorra
    assert set(spark_ft.__all__) <= set(dir(spark_ft))
    assert spark_ft.__version__ == version("spark-ft")


def test_importing_the_package_or_its_methods_imports_nothing_heavy():
    methods = [f"spark_ft.methods.{path.stem}" for path in PACKAGE.glob("methods/[!_]*.py")]
    for modules, heavy in (
        (["spark_ft", "spark_ft.data"], ("torch", "transformers", "numpy", "peft", "trl")),
        (methods, ("transformers", "peft", "trl", "accelerate")),
    ):
        code = f"import sys, {', '.join(modules)}; print([m for m in {heavy} if m in sys.modules])"
        assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT).strip() == "[]"
