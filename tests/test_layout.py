"""The promises of the layout: arrows run one way, methods stand alone and stay small, importing is instant, no pickles."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import spark_ft

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "spark_ft"
METHODS = sorted((PACKAGE / "methods").glob("*.py"))
MODULES = sorted(PACKAGE.rglob("*.py"))
MAY_IMPORT_PEFT_OR_TRL = {"bench.py", "lab/parity.py"}


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def imported(path: Path) -> set[str]:
    """Full dotted names of everything a file imports, at its top or inside a function."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import; write the whole name"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in (
            "import_module",
            "__import__",
        ):
            names |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
    return names


def test_the_reader_of_imports_sees_all_kinds(tmp_path):
    (tmp_path / "x.py").write_text(
        "import a.b\nfrom c import d\ndef f():\n    import e\n    importlib.import_module('g.h')\n"
    )
    assert imported(tmp_path / "x.py") == {"a.b", "c.d", "e", "g.h"}


def test_methods_import_torch_jaxtyping_the_standard_library_and_their_siblings_alone():
    allowed = {"torch", "jaxtyping", *sys.stdlib_module_names}
    for path in METHODS:
        for name in imported(path):
            assert name.split(".")[0] in allowed or name.startswith("spark_ft.methods."), (
                f"{path.name} imports {name}"
            )
    assert len(METHODS) > 3


def test_methods_are_under_800_lines():
    assert sum(len(path.read_text().splitlines()) for path in METHODS) < 800


def test_peft_and_trl_are_imported_by_the_bench_and_parity_alone():
    for path in MODULES:
        if name_of(path) not in MAY_IMPORT_PEFT_OR_TRL:
            theirs = {name for name in imported(path) if name.split(".")[0] in ("peft", "trl")}
            assert not theirs, f"{name_of(path)} imports {', '.join(theirs)}"


def test_only_the_commands_look_up_into_lab():
    for path in MODULES:
        if not name_of(path).startswith(("lab/", "cli.py")):
            up = {name for name in imported(path) if name.startswith(("spark_ft.lab", "spark_ft.cli"))}
            assert not up, f"{name_of(path)} imports {', '.join(up)}; arrows run from lab to the modules"


def test_nothing_reads_or_writes_pickles():
    for path in MODULES:
        tree = ast.parse(path.read_text())
        roots = {name.split(".")[0] for name in imported(path)}
        assert not roots & {"pickle", "dill", "joblib", "shelve", "cloudpickle"}, name_of(path)
        calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert not calls & {"torch.load", "torch.save", "numpy.load", "np.load"}, name_of(path)
        trusting = [
            keyword
            for node in ast.walk(tree)
            if isinstance(node, ast.Call)
            for keyword in node.keywords
            if keyword.arg == "trust_remote_code"
        ]
        assert not trusting, f"{name_of(path)} mentions trust_remote_code"


def test_constants_are_public_too():
    assert spark_ft.NF4_CODE.shape == (16,)


@pytest.mark.parametrize(
    "name", [name for name in spark_ft.__all__ if name not in ("__version__", "NF4_CODE")]
)
def test_every_public_name_imports_and_says_what_it_is(name):
    thing = getattr(spark_ft, name)
    assert thing.__module__.startswith("spark_ft.")
    doc = inspect.getdoc(thing)
    assert doc, f"{name} has no docstring"
    assert not doc.startswith(f"{name}("), f"{name} has only the docstring that dataclass makes"
    if inspect.isfunction(thing):
        for parameter in inspect.signature(thing).parameters.values():
            assert parameter.kind is not parameter.VAR_KEYWORD, f"{name} takes **{parameter.name}"


@pytest.mark.parametrize("path", [p for p in MODULES if p.stat().st_size > 50], ids=name_of)
def test_public_functions_and_classes_have_docstrings(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), f"{name_of(path)} has no docstring"
    if name_of(path).startswith("lab/"):
        return
    for node in tree.body:
        if (
            isinstance(node, ast.FunctionDef | ast.ClassDef)
            and not node.name.startswith("_")
            and node.name != "sha256"
        ):
            assert ast.get_docstring(node), f"{name_of(path)}: {node.name} has no docstring"


def test_unknown_names_are_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'spark_ft' has no attribute 'lorra'"):
        _ = spark_ft.lorra
    assert set(spark_ft.__all__) <= set(dir(spark_ft))


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, spark_ft; print([m for m in ('torch', 'transformers', 'numpy', 'peft', 'trl') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"


def test_methods_alone_import_neither_transformers_nor_peft():
    names = [f"spark_ft.methods.{path.stem}" for path in METHODS if path.stem != "__init__"]
    heavy = ("transformers", "peft", "trl", "accelerate")
    code = f"import sys, {', '.join(names)}; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"


def test_the_version_is_one_and_the_package_metadata_reads_it():
    from importlib.metadata import version

    assert spark_ft.__version__ == version("spark-ft")
