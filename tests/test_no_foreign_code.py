"""Nothing in a file is run: no unpickling, no evaluation of text, and remote code only where the user has asked for it."""

import ast

import pytest
from paths import ROOT, sources


SOURCES = sources("hf_phibalance", "recipes")
SOURCES = [path for path in SOURCES if ".nox" not in path.parts]  # environments made by nox are others' code
# what runs code: functions by their last name, and where they are allowed, with the reason
RUNS = {"eval", "exec", "Unpickler", "unsafe_load", "full_load", "run_path"}
ALLOWED = {"hf_phibalance/evaluation/runner.py": "generated code and its checks, in the sandbox"}
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def calls(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            parts = []
            function = node.func
            while isinstance(function, ast.Attribute):
                parts.append(function.attr)
                function = function.value
            parts.append(getattr(function, "id", "?"))
            yield ".".join(reversed(parts)), node


def problems_in(text):
    """What in a source could run what it reads: `["line 3: ..."]`."""
    found, tree = [], ast.parse(text)
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found += [f"line {node.lineno}: imports {name}" for name in names if name.split(".")[0] in PICKLES]
    for name, node in calls(tree):
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        if name.rpartition(".")[2] in RUNS and not name.startswith(("model.", "re.")):
            found.append(f"line {node.lineno}: {name}()")
        if name in ("torch.load", "numpy.load", "np.load"):
            safe = name == "torch.load"  # also what it does if nothing is said, in torch 2.6 and later
            said = keywords.get("weights_only" if safe else "allow_pickle", ast.Constant(safe))
            if not (isinstance(said, ast.Constant) and said.value is safe):
                found.append(f"line {node.lineno}: {name}() may unpickle")
        if name == "yaml.load":
            found.append(f"line {node.lineno}: yaml.load()")
        trust = keywords.get("trust_remote_code")
        if isinstance(trust, ast.Constant) and trust.value is not False:
            found.append(f"line {node.lineno}: sets trust_remote_code")
    for node in ast.walk(tree):  # the default of a field or an argument
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "").endswith("trust_remote_code"):
            default = next((k.value for k in getattr(node.value, "keywords", ()) if k.arg == "default"), node.value)
            if not (isinstance(default, ast.Constant) and default.value is False):
                found.append(f"line {node.lineno}: trust_remote_code is on by default")
        if isinstance(node, ast.Assign) and any("trust_remote_code" in ast.dump(target) for target in node.targets):
            found.append(f"line {node.lineno}: sets trust_remote_code")
        if isinstance(node, ast.Dict) and any(
            getattr(key, "value", "") == "trust_remote_code" and isinstance(value, ast.Constant)
            for key, value in zip(node.keys, node.values)
        ):
            found.append(f"line {node.lineno}: sets trust_remote_code")
    return found


@pytest.mark.slow
def test_no_source_runs_what_it_reads():
    found = {str(path.relative_to(ROOT)): problems_in(path.read_text(encoding="utf-8")) for path in SOURCES}
    assert {name: problems for name, problems in found.items() if problems and name not in ALLOWED} == {}


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(path, weights_only=False)",
        "yaml.load(text, Loader=yaml.Loader)",
        "eval(text)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "settings['trust_remote_code'] = True",
        "args.trust_remote_code = True",
        "settings = {'trust_remote_code': True}",
        "class A:\n    trust_remote_code: bool = field(default=True)",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_it_would_be_seen(text):
    assert problems_in(text)


@pytest.mark.parametrize("name", ALLOWED)
def test_what_is_allowed_is_there(name):
    assert problems_in((ROOT / name).read_text(encoding="utf-8"))


def test_the_flag_of_the_commands_is_off_unless_it_is_given():
    source = (ROOT / "hf_phibalance" / "cli" / "parser.py").read_text(encoding="utf-8")
    flags = [
        node for name, node in calls(ast.parse(source)) if "--trust_remote_code" in ast.unparse(node).split(",")[0]
    ]
    flags = [node for node in flags if getattr(node.func, "attr", "") == "add_argument"]
    assert flags and all("action='store_true'" in ast.unparse(node) for node in flags)
