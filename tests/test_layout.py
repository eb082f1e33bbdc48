"""The promises of the layout: arrows run one way, files stay short, imports are cheap, no pickles."""

import ast
import inspect
import subprocess
import sys

import pytest

import spark_ft
from spark_ft.files import ROOT

PACKAGE = ROOT / "spark_ft"
TREES = {
    path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text())
    for path in sorted(PACKAGE.rglob("*.py"))
}
# Each layer may import its own modules and those below it; data/ and methods/ stand side by side.
LAYERS = {"lab": 4, "cli": 4, "shapes": 4, "bench": 3, "data": 1, "methods": 1}
GROUND = {"files", "lazy", "stats", "version"}
MODULES = 2  # every other file and folder of the package
PEERS = {"bench/peers.py", "lab/parity.py"}


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


def called(node):
    return ast.unparse(node.func)


def every_import():
    return [(name, other) for name, tree in TREES.items() for other in sorted(imported(tree))]


def part(dotted):
    """The folder or file directly in spark_ft: "spark_ft.data.chat.render" → "data"."""
    return dotted.removesuffix(".py").replace("/", ".").removeprefix("spark_ft.").split(".")[0]


def level(name):
    return 0 if name in GROUND else LAYERS.get(name, MODULES)


def lines(*paths):
    return sum(len(path.read_text().splitlines()) for path in paths)


def none(offenders):
    assert not offenders, "\n".join(offenders)


def test_the_reader_of_imports_sees_all_kinds():
    code = "import a.b\nfrom c import d\nfrom . import x\ndef f():\n  import e\n  import_module('g.h')\n"
    assert imported(ast.parse(code)) == {"a.b", "c.d", ".x", "e", "g.h"}


def test_arrows_run_one_way():
    """lab and cli → bench → modules → data and methods → files, stats, lazy; nothing imports upwards."""
    up = []
    for name, other in every_import():
        if other.startswith("spark_ft.") and name != "__init__.py":
            mine, theirs = part(name), part(other)
            beside = mine == theirs or level(mine) == level(theirs) in (MODULES, LAYERS["lab"])
            if level(mine) <= level(theirs) and not beside:
                up.append(f"{name} imports {other}")
    none(up)


def test_imports_are_written_in_full():
    none([f"{name} imports {other}" for name, other in every_import() if other.startswith(".")])


def test_methods_import_torch_jaxtyping_the_standard_library_and_their_siblings_alone():
    allowed = {"torch", "jaxtyping", *sys.stdlib_module_names}
    none(
        [
            f"{name} imports {other}"
            for name, other in every_import()
            if name.startswith("methods/")
            and other.split(".")[0] not in allowed
            and not other.startswith("spark_ft.methods.")
        ]
    )


def test_peft_trl_and_bitsandbytes_are_imported_by_the_peers_and_parity_alone():
    none(
        [
            f"{name} imports {other}"
            for name, other in every_import()
            if other.split(".")[0] in ("peft", "trl", "bitsandbytes") and name not in PEERS
        ]
    )


def test_nothing_reads_pickles_or_trusts_remote_code():
    wrong = [
        f"{name} imports {other}"
        for name, other in every_import()
        if other.split(".")[0] in ("pickle", "dill", "joblib", "shelve", "cloudpickle")
    ]
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                if called(node) in ("torch.load", "torch.save", "numpy.load", "np.load"):
                    wrong.append(f"{name}:{node.lineno} calls {called(node)}")
                if "trust_remote_code" in [keyword.arg for keyword in node.keywords]:
                    wrong.append(f"{name}:{node.lineno} mentions trust_remote_code")
    none(wrong)


def test_every_file_is_read_in_one_sitting():
    package = [PACKAGE / name for name in TREES if not name.startswith(("lab/", "bench/"))]
    found = {
        # 900 once the preference losses are there
        "methods/ is over 780 lines": lines(*(PACKAGE / "methods").glob("*.py")) - 780,
        "methods/lora.py is over 125 lines": lines(PACKAGE / "methods/lora.py") - 125,
        "methods/dora.py is over 140 lines": lines(PACKAGE / "methods/dora.py") - 140,
        "the package without lab/ and bench/ is over 5,200 lines": lines(*package) - 5200,
        "tests/ is over 9,500 lines": lines(*(ROOT / "tests").glob("*.py")) - 9500,
    }
    for module, layer in (("lora", "LoRALinear"), ("dora", "DoRALinear")):
        body = next(n.body for n in TREES[f"methods/{module}.py"].body if getattr(n, "name", "") == layer)
        for node in body:
            if getattr(node, "name", "") == "forward":
                found[f"{layer}.forward is over 16 lines"] = node.end_lineno - node.lineno + 1 - 16
        found[f"{layer} has no forward of its own"] = f"{layer}.forward is over 16 lines" not in found
    none([f"{promise}, by {over}" for promise, over in found.items() if over > 0])


def test_every_public_name_says_what_it_is_and_names_its_arguments():
    wrong = []
    for name in set(spark_ft.__all__) - {"__version__", "NF4_CODE"}:
        thing = getattr(spark_ft, name)
        doc = inspect.getdoc(thing) or ""
        if not doc or doc.startswith(f"{name}("):  # the latter is what dataclass writes
            wrong.append(f"{name} has no docstring of its own")
        if not thing.__module__.startswith("spark_ft."):
            wrong.append(f"{name} comes from {thing.__module__}")
        if inspect.isfunction(thing):
            kinds = {parameter.kind for parameter in inspect.signature(thing).parameters.values()}
            if inspect.Parameter.VAR_KEYWORD in kinds:
                wrong.append(f"{name} takes **options")
    none(wrong)
    assert spark_ft.NF4_CODE.shape == (16,)


def test_modules_and_their_public_functions_and_classes_have_docstrings():
    wrong = [name for name, tree in TREES.items() if len(tree.body) > 1 and not ast.get_docstring(tree)]
    for name, tree in TREES.items():
        if not name.startswith("lab/"):
            wrong += [
                f"{name}: {node.name}"
                for node in tree.body
                if isinstance(node, ast.FunctionDef | ast.ClassDef)
                and not node.name.startswith("_")
                and not ast.get_docstring(node)
            ]
    none(wrong)


def test_unknown_names_are_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'spark_ft' has no attribute 'lorra'"):
        _ = spark_ft.lorra
    assert set(spark_ft.__all__) <= set(dir(spark_ft))


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        (["spark_ft", "spark_ft.data"], ("torch", "transformers", "numpy", "peft", "trl")),
        (
            [f"spark_ft.methods.{path.stem}" for path in (PACKAGE / "methods").glob("[!_]*.py")],
            ("transformers", "peft", "trl", "accelerate"),
        ),
    ],
    ids=["the package", "methods"],
)
def test_importing_imports_nothing_heavy(modules, heavy):
    code = f"import sys, {', '.join(modules)}; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"


def test_the_version_is_one_and_the_package_metadata_reads_it():
    from importlib.metadata import version

    assert spark_ft.__version__ == version("spark-ft")
