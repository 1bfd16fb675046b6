"""No code path runs what a checkpoint, an engine directory or the working directory holds."""

import ast
from collections.abc import Iterator

import pytest
from test_imports import ROOMS, ROOT, files

BUILTINS = {"eval", "exec", "__import__"}
UNPICKLING = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml"}
KEYWORDS = {
    "trust_remote_code": False,
    "custom_pipeline": None,
    "allow_pickle": False,
    "weights_only": True,
    "use_safetensors": True,
    "shell": False,
}
"""Keywords by which libraries are told to run code, or not to, and their only value."""

REQUIRED = {"torch.load": "weights_only", "from_pretrained": "use_safetensors"}
"""Calls that read pickles unless a keyword is given."""

WITHOUT_PICKLES = ("Tokenizer", "ORTDiffusionPipeline", "OVDiffusionPipeline")
"""Classes that read vocabularies, or graphs."""

STARTERS = {"run", "Popen", "call", "check_call", "check_output", "system", "popen", "startfile"}
PICKLE_ERRORS = "measure/quality/networks.py"  # catches torch's pickle.UnpicklingError
RUNPY = "runtime/launcher.py"


def offences(tree: ast.AST, path: str) -> Iterator[str]:
    """Yield what might run foreign code in a file, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from (f"{path}:{node.lineno} {what}" for what in _imported(node, path))
        if isinstance(node, ast.Call):
            yield from (f"{path}:{node.lineno} {what}" for what in _called(node))


def _imported(node: ast.Import | ast.ImportFrom, path: str) -> Iterator[str]:
    module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
    for alias in node.names:
        name = (module or alias.name).partition(".")[0]
        if name in UNPICKLING and (path, name) != (PICKLE_ERRORS, "pickle"):
            yield f"imports {name}"
        if name == "runpy" and path != RUNPY:
            yield "imports runpy"


def _called(node: ast.Call) -> Iterator[str]:
    name = ast.unparse(node.func)
    given = {keyword.arg: keyword.value for keyword in node.keywords}
    if name in BUILTINS or name.startswith("pickle."):
        yield f"calls {name}"
    for keyword, only in KEYWORDS.items():
        if keyword in given and not _is(given[keyword], only):
            yield f"passes {keyword}={ast.unparse(given[keyword])}"
    for call, keyword in REQUIRED.items():
        if any(kind in name for kind in WITHOUT_PICKLES):
            continue
        if name.endswith(call) and keyword not in given:
            yield f"calls {name} without {keyword}"
    if name.split(".")[-1] in STARTERS and node.args and _is_relative(node.args[0]):
        yield f"starts {ast.unparse(node.args[0])}, which is searched for"
    if name.endswith("import_module") and not _is_known(node.args[0]):
        yield f"imports {ast.unparse(node.args[0])}"


def _is(value: ast.expr, only: object) -> bool:
    return isinstance(value, ast.Constant) and value.value is only


def _is_relative(command: ast.expr) -> bool:
    """Return True for a program that the code names without its folder."""
    first = command.elts[0] if isinstance(command, ast.List | ast.Tuple) else command
    text = first.value if isinstance(first, ast.Constant) else None
    return isinstance(text, str) and not text.startswith("/")


def _is_known(module: ast.expr) -> bool:
    """Return True for a name in the code, in one of its tables, or within the package."""
    if isinstance(module, ast.JoinedStr):
        return ast.unparse(module)[2:].startswith("latentforge.")
    text = ast.unparse(module)
    return isinstance(module, ast.Constant) or text.endswith(".library") or text.isupper()


@pytest.mark.parametrize("room", ROOMS)
def test_nothing_foreign_is_run(room: str) -> None:
    found: list[str] = []
    for path in files(room):
        name = path.relative_to(ROOT).as_posix()
        found += offences(ast.parse(path.read_text("utf-8")), name)
    assert [line for line in found if "_ON_FIRST_USE" not in line] == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from yaml import load",
        "import runpy",
        "eval(text)",
        "exec(text)",
        "__import__(name)",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=given)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "Model.from_pretrained(path)",
        "Model.from_pretrained(path, use_safetensors=True, trust_remote_code=True)",
        "Pipeline.from_pretrained(path, use_safetensors=True, custom_pipeline=path)",
        "subprocess.run(['c++', path])",
        "subprocess.Popen('strip')",
        "subprocess.run(command, shell=True)",
        "os.system('ls')",
        "import_module(name)",
    ],
)
def test_offences_are_found(line: str) -> None:
    assert list(offences(ast.parse(line), "x.py")) != []
