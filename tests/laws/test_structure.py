"""Checks the house rules on the source itself, and each rule on a snippet that breaks it.

A rule takes a path relative to the root and the file's text, and yields what is wrong, as sentences.
"""

import ast
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import long_tests
import pytest

ROOT = Path(__file__).parents[2]
LAYERS = ("pallas_kernels", "kvjax", "experiments", "tests")  # each may import those to its left
PACKAGES = LAYERS[:3]
BACKEND = "pallas_kernels/backend.py"
METHOD_FOLDERS = ("kvjax/methods/", "kvjax/sparsity/")
KERNEL_FILES = ("gpu.py", "tpu.py")
MAX_FUNCTION, MAX_KERNEL, MAX_FILE, MAX_PARAMETERS = 60, 120, 500, 8
VAGUE = re.compile(r"(^|_)(utils?|helpers?|misc|common|impl|v\d+)($|_)")

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DEFINITIONS = (*FUNCTIONS, ast.ClassDef)
AT_IMPORT = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, *DEFINITIONS)
# What a module may call to make its constants, besides classes (their names begin with a capital).
MAKERS = {
    *("dict", "frozenset", "len", "list", "max", "min", "range", "set", "sorted", "sum", "tuple", "zip"),
    *(
        "cast",
        "compile",
        "dtype",
        "field",
        "getLogger",
        "jit",
        "joinpath",
        "make_user_context",
        "namedtuple",
        "partial",
        "resolve",
    ),
    *("float", "int", "items", "keys", "split", "str", "values", "with_name"),
}
MAY_CALL = {  # a registry finds the files of its folder
    "kvjax/methods/__init__.py": {"_find"},
    "kvjax/sparsity/__init__.py": {"_find"},
}
COMPUTING = {"jnp", "lax", "os", "subprocess"}  # whose calls do something at once, whatever their name
READING = {"jnp.dtype", "jnp.finfo", "jnp.iinfo", "os.cpu_count"}

# In pieces, so that this file passes its own rule.
REGISTRIES = re.compile(
    r"\b(?:pypi|pythonhosted|npmjs|crates|rubygems|packagist|anaconda|golang)" + r"\.(?:org|io|com|cloud)\b|"
    r"\b(?:deb|security|ftp)" + r"\.debian\.org\b",
    re.IGNORECASE,
)
MACHINE_PATH = re.compile(r"(?<![\w.~$}<*])/(?:" + "work|root|home|Users|opt" + r")/[\w.-]+")


def top(module: str) -> str:
    return module.partition(".")[0]


def imported(path: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yields line and absolute name of each thing imported, at any depth of the file."""
    package = Path(path).with_suffix("").parts[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join([*base, *filter(None, [node.module])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def imports_point_one_way(path: str, text: str) -> Iterator[str]:
    layer = top(path.replace("/", "."))
    allowed = LAYERS[: LAYERS.index(layer) + 1]
    for line, name in imported(path, ast.parse(text)):
        if top(name) in LAYERS and top(name) not in allowed:
            yield f"line {line}: {layer} is below {top(name)} and may not import it"


def methods_stand_alone(path: str, text: str) -> Iterator[str]:
    for folder in METHOD_FOLDERS:
        if path.startswith(folder) and not path.endswith("/__init__.py"):
            package = folder.strip("/").replace("/", ".")
            for line, name in imported(path, ast.parse(text)):
                if name.startswith(package):
                    yield f"line {line}: a method imports no other method, got {name}"


def experimental_is_behind_backend(path: str, text: str) -> Iterator[str]:
    if path == BACKEND:
        return
    tree = ast.parse(text)
    lines = {line for line, name in imported(path, tree) if name.startswith("jax.experimental")}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "jax.experimental":
            lines.add(node.lineno)
    yield from (f"line {line}: jax.experimental is used in {BACKEND} only" for line in sorted(lines))


def is_kernel(path: str, node: ast.AST) -> bool:
    """A kernel body: a function on refs in the file of a back end."""
    in_place = path.startswith("pallas_kernels/") and Path(path).name in KERNEL_FILES
    return in_place and isinstance(node, FUNCTIONS) and any(a.arg.endswith("_ref") for a in parameters(node))


def parameters(node: ast.FunctionDef) -> list[ast.arg]:
    return [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]


def n_lines(path: str, node: ast.FunctionDef) -> int:
    """Lines of a function without its docstring and without the kernels inside, which count on their own."""
    lines = node.end_lineno - node.lineno + 1
    if ast.get_docstring(node) is not None:
        lines -= node.body[0].end_lineno - node.body[0].lineno + 1
    inside = [n for n in ast.walk(node) if n is not node and is_kernel(path, n)]
    return lines - sum(n.end_lineno - n.lineno + 1 for n in inside)


def sizes_are_within_limits(path: str, text: str) -> Iterator[str]:
    if (lines := text.count("\n")) > MAX_FILE:
        yield f"a file has up to {MAX_FILE} lines, got {lines}"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, FUNCTIONS):
            kernel, which = is_kernel(path, node), f"line {node.lineno}: {node.name}"
            limit = MAX_KERNEL if kernel else MAX_FUNCTION
            if (lines := n_lines(path, node)) > limit:
                yield f"{which} has up to {limit} lines, got {lines}"
            names = [a.arg for a in parameters(node) if a.arg not in ("self", "cls")]
            names = [name for name in names if not (kernel and name.endswith("_ref"))]
            if len(names) > MAX_PARAMETERS:
                yield f"{which} takes up to {MAX_PARAMETERS} parameters, got {len(names)}"


def names_of_files_say_something(path: str, text: str) -> Iterator[str]:
    for part in Path(path).with_suffix("").parts:
        if VAGUE.search(part):
            yield f"a file is named for what is in it, got {part!r}"


def users_get_errors_not_asserts(path: str, text: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Assert):
            yield f"line {node.lineno}: package code raises, got an assert"


def public_things_have_docstrings(path: str, text: str) -> Iterator[str]:
    tree = ast.parse(text)
    if not ast.get_docstring(tree):
        yield "a module has a docstring"
    for node in tree.body:
        if isinstance(node, DEFINITIONS) and not node.name.startswith("_") and not ast.get_docstring(node):
            yield f"line {node.lineno}: {node.name} is public and has a docstring"


def nothing_happens_at_import(path: str, text: str) -> Iterator[str]:
    allowed = {f"call of {name}" for name in MAY_CALL.get(path, ())}
    for node in ast.parse(text).body:
        yield from (f"line {line}: {what} at import" for line, what in happening(node) if what not in allowed)


def happening(node: ast.stmt) -> Iterator[tuple[int, str]]:
    """Yields line and words for what a statement of a module does beyond defining and importing."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return
    if isinstance(node, ast.If) and ast.unparse(node.test).startswith(("__name__ ==", "TYPE_CHECKING")):
        return
    if isinstance(node, ast.Try):
        for inner in [*node.body, *node.orelse, *(s for h in node.handlers for s in h.body)]:
            yield from happening(inner)
    elif isinstance(node, (ast.Assign, ast.AnnAssign)):
        yield from doing(node.value)
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield from doing(node.value, bare=True)
    elif not isinstance(node, (*AT_IMPORT, ast.Pass)):
        yield node.lineno, f"{type(node).__name__.lower()} statement"


def doing(value: ast.AST | None, bare: bool = False) -> Iterator[tuple[int, str]]:
    """Yields line and words for the calls in an expression that do more than make a constant."""
    skip = {
        n for inner in ast.walk(value or ast.Pass()) if isinstance(inner, ast.Lambda) for n in ast.walk(inner)
    }
    for node in ast.walk(value or ast.Pass()):
        if isinstance(node, ast.Call) and node not in skip:
            called = ast.unparse(node.func)
            last = re.split(r"\W+", called)[-1]
            harmless = last.startswith("register_") if bare else last in MAKERS or last[:1].isupper()
            if called not in READING and (not harmless or top(called) in COMPUTING):
                yield node.lineno, f"call of {called}"


def defined_names(body: list[ast.stmt]) -> Iterator[str]:
    """Yields the names that a module's statements define, in branches too, in functions and classes not."""
    for node in body:
        if isinstance(node, DEFINITIONS):
            yield node.name
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from ((alias.asname or alias.name).partition(".")[0] for alias in node.names)
        elif isinstance(node, (ast.If, ast.Try)):
            yield from defined_names(node.body + node.orelse)
        else:
            yield from (
                n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
            )


def exported_names_exist(path: str, text: str) -> Iterator[str]:
    body = ast.parse(text).body
    defined = set(defined_names(body))
    if path.endswith("__init__.py"):
        defined |= {p.stem for p in (ROOT / path).parent.glob("*")}
    for node in body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            missing = [name for name in ast.literal_eval(node.value) if name not in defined]
            yield from (f"line {node.lineno}: __all__ names what exists, got {name!r}" for name in missing)


def no_place_is_named(path: str, text: str) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), 1):
        for what, pattern in (("registry host", REGISTRIES), ("machine's path", MACHINE_PATH)):
            if found := pattern.search(line):
                yield f"line {number}: no {what} is committed, got {found.group()!r}"


def inheritance_is_one_level(files: dict[str, str]) -> Iterator[str]:
    """Yields the classes whose base, itself ours, has a base of ours."""
    bases, where = {}, {}
    for path, text in files.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                bases[node.name] = [ast.unparse(b).partition("[")[0].rpartition(".")[2] for b in node.bases]
                where[node.name] = f"{path}, line {node.lineno}"
    for name, its in bases.items():
        for base in its:
            if over := [b for b in bases.get(base, ()) if b in bases]:
                yield f"{where[name]}: inheritance has one level, got {name} < {base} < {over[0]}"


def python_files(*folders: str) -> dict[str, str]:
    paths = sorted(p for folder in folders for p in (ROOT / folder).rglob("*.py"))
    return {p.relative_to(ROOT).as_posix(): p.read_text(encoding="utf-8") for p in paths}


def committed_files() -> dict[str, str]:
    """Every text file that git has or would take; where there is no git, all but hidden folders."""
    listing = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    run = subprocess.run(listing, capture_output=True, text=True, check=False)
    names = run.stdout.split("\0") if run.returncode == 0 else []
    for folder, inside, files in os.walk(ROOT) if run.returncode else ():
        inside[:] = [name for name in inside if not name.startswith(".") and name != "__pycache__"]
        names += [(Path(folder) / name).relative_to(ROOT).as_posix() for name in files]
    data = {name: (ROOT / name).read_bytes() for name in names if (ROOT / name).is_file()}
    return {name: raw.decode(errors="replace") for name, raw in data.items() if b"\0" not in raw[:8192]}


ANYWHERE = (
    imports_point_one_way,
    experimental_is_behind_backend,
    sizes_are_within_limits,
    names_of_files_say_something,
)
IN_PACKAGES = (
    methods_stand_alone,
    users_get_errors_not_asserts,
    public_things_have_docstrings,
    nothing_happens_at_import,
    exported_names_exist,
)


def broken(rule, files: dict[str, str]) -> str:
    return "\n".join(f"{path}: {problem}" for path, text in files.items() for problem in rule(path, text))


@pytest.mark.parametrize("rule", [*ANYWHERE, *IN_PACKAGES], ids=lambda rule: rule.__name__)
def test_rule_holds(rule):
    files = python_files(*(LAYERS if rule in ANYWHERE else PACKAGES))
    assert len(files) > 5
    if problems := broken(rule, files):
        pytest.fail(problems, pytrace=False)


def test_inheritance_holds():
    if problems := "\n".join(inheritance_is_one_level(python_files(*PACKAGES))):
        pytest.fail(problems, pytrace=False)


def test_long_tests_exist():
    for name in long_tests.NAMES.split():
        file, _, function = name.partition("::")
        named = re.compile("def " + re.split(r"\\\[|\.\*", function)[0])
        assert named.search((ROOT / "tests" / file).read_text(encoding="utf-8")), name


def test_no_place_is_named_in_what_is_committed():
    files = committed_files()
    assert {"README.md", "pyproject.toml", "requirements/cpu.txt"} <= files.keys()
    if problems := broken(no_place_is_named, files):
        pytest.fail(problems, pytrace=False)


LONG = "\n    x = 1" * 60
KERNEL = "def kernel(q_ref, k_ref, v_ref, a, b, c, d, e, f, g, h):{}\n"
HOST, HOME = "py" + "pi.org", "/ho" + "me/someone"

BAD = [
    (imports_point_one_way, "pallas_kernels/op/gpu.py", "import kvjax.cache", "below kvjax"),
    (imports_point_one_way, "kvjax/cache.py", "def f():\n    from experiments import x", "below experiments"),
    (imports_point_one_way, "experiments/compare.py", "from tests.conftest import x", "below tests"),
    (methods_stand_alone, "kvjax/methods/h2o.py", "from kvjax.methods.snapkv import x", "no other method"),
    (methods_stand_alone, "kvjax/methods/h2o.py", "from . import snapkv", "no other method"),
    (methods_stand_alone, "kvjax/methods/h2o.py", "import kvjax.methods.tova", "no other method"),
    (experimental_is_behind_backend, "kvjax/a.py", "from jax import experimental", "backend.py only"),
    (experimental_is_behind_backend, "tests/a.py", "import jax.experimental.pallas as pl", "backend.py only"),
    (experimental_is_behind_backend, "kvjax/a.py", "import jax\nx = jax.experimental.io", "line 2"),
    (sizes_are_within_limits, "kvjax/a.py", "x = 1\n" * 501, "up to 500 lines, got 501"),
    (sizes_are_within_limits, "kvjax/a.py", f"def f():{LONG}", "up to 60 lines, got 61"),
    (sizes_are_within_limits, "kvjax/a.py", f"class A:\n  def f(self):{LONG}", "up to 60 lines, got 61"),
    (
        sizes_are_within_limits,
        "pallas_kernels/op/gpu.py",
        KERNEL.format(LONG * 2),
        "up to 120 lines, got 121",
    ),
    (
        sizes_are_within_limits,
        "pallas_kernels/op/reference.py",
        KERNEL.format("pass"),
        "up to 8 parameters, got 11",
    ),
    (
        sizes_are_within_limits,
        "kvjax/a.py",
        "def f(a, b, c, d, /, e, f, g, *, h, i): pass",
        "up to 8 parameters, got 9",
    ),
    (names_of_files_say_something, "kvjax/cache_utils.py", "", "'cache_utils'"),
    (names_of_files_say_something, "kvjax/helpers/x.py", "", "'helpers'"),
    (names_of_files_say_something, "kvjax/cache_v2.py", "", "'cache_v2'"),
    (names_of_files_say_something, "pallas_kernels/op/impl.py", "", "'impl'"),
    (users_get_errors_not_asserts, "kvjax/a.py", "def f(x):\n    assert x", "line 2"),
    (public_things_have_docstrings, "kvjax/a.py", "x = 1", "a module has"),
    (public_things_have_docstrings, "kvjax/a.py", "'''A.'''\ndef f(): pass", "f is public"),
    (public_things_have_docstrings, "kvjax/a.py", "'''A.'''\nclass A: pass", "A is public"),
    (nothing_happens_at_import, "kvjax/a.py", "print(1)", "call of print"),
    (nothing_happens_at_import, "kvjax/a.py", "x = jnp.zeros(3)", "call of jnp.zeros"),
    (nothing_happens_at_import, "kvjax/a.py", "x = {'a': jax.devices()}", "call of jax.devices"),
    (nothing_happens_at_import, "kvjax/a.py", "x: int = [f(y) for y in (1, 2)]", "call of f"),
    (nothing_happens_at_import, "kvjax/a.py", "jax.config.update('x', 1)", "call of jax.config.update"),
    (nothing_happens_at_import, "kvjax/a.py", "for x in range(3): pass", "for statement"),
    (nothing_happens_at_import, "kvjax/a.py", "if x: y = 1", "if statement"),
    (nothing_happens_at_import, "kvjax/a.py", "try:\n    f()\nexcept E: pass", "call of f"),
    (exported_names_exist, "kvjax/a.py", "__all__ = ['f', 'g']\ndef f(): pass", "got 'g'"),
    (exported_names_exist, "kvjax/a.py", "__all__ = ['f']\nclass A:\n    def f(self): pass", "got 'f'"),
    (no_place_is_named, "README.md", f"see https://{HOST}/project/x", HOST),
    (no_place_is_named, "a.json", f'{{"path": "{HOME}/x.gguf"}}', HOME),
]
GOOD = [
    (imports_point_one_way, "experiments/compare.py", "import kvjax, jax\nfrom pallas_kernels import x"),
    (methods_stand_alone, "kvjax/methods/__init__.py", "from kvjax.methods.snapkv import x"),
    (methods_stand_alone, "kvjax/methods/h2o.py", "from kvjax.method import CacheMethod"),
    (experimental_is_behind_backend, BACKEND, "from jax.experimental import pallas as pl"),
    (sizes_are_within_limits, "pallas_kernels/op/tpu.py", KERNEL.format(LONG)),
    (sizes_are_within_limits, "kvjax/a.py", f"def f():\n    '''A.{LONG}\n    '''\n    return 1"),
    (sizes_are_within_limits, "kvjax/a.py", "class A:\n    def f(self, a, b, c, d, e, f, g, h): pass"),
    (names_of_files_say_something, "kvjax/methods/a2ats.py", ""),
    (
        nothing_happens_at_import,
        "kvjax/a.py",
        "'''A.'''\nimport re\nX = re.compile('a')\nY: tuple = (Spec(1),)",
    ),
    (nothing_happens_at_import, "kvjax/a.py", "LEAST = float(jnp.finfo(jnp.float32).min)"),
    (nothing_happens_at_import, "kvjax/a.py", "f = partial(g, n=1)\nkey = lambda x: f(x)"),
    (nothing_happens_at_import, "kvjax/a.py", "if __name__ == '__main__':\n    main()"),
    (nothing_happens_at_import, "kvjax/a.py", "jax.tree_util.register_pytree_node(A, b, c)"),
    (nothing_happens_at_import, "kvjax/methods/__init__.py", "METHODS = _find()"),
    (exported_names_exist, "kvjax/a.py", "from kvjax.b import g\n__all__ = ['f', 'g']\nf = g"),
    (no_place_is_named, "Makefile", "$HOME/.pyenv/versions and ~/.cache and build/root/x"),
]


@pytest.mark.parametrize(("rule", "path", "text", "message"), BAD)
def test_rule_refuses(rule, path, text, message):
    problems = list(rule(path, text))
    assert len(problems) == 1, problems
    assert message in problems[0]


@pytest.mark.parametrize(("rule", "path", "text"), GOOD)
def test_rule_allows(rule, path, text):
    assert list(rule(path, text)) == []


def test_every_rule_is_shown_to_refuse():
    assert {rule for rule, *_ in BAD} == {*ANYWHERE, *IN_PACKAGES, no_place_is_named}


def test_inheritance_of_two_levels_is_refused():
    files = {"a.py": "class A(ABC): pass\nclass B(A): pass\nclass E(ValueError): pass"}
    assert list(inheritance_is_one_level(files)) == []
    files["b.py"] = "class C(a.B[int]): pass"
    assert list(inheritance_is_one_level(files)) == ["b.py, line 1: inheritance has one level, got C < B < A"]
