"""
Tests in fresh environments: older versions of transformers, and the tools people train in.

nox -f recipes/environments/noxfile.py                                # all of them, in turn
nox -f recipes/environments/noxfile.py -s "core(transformers-5.6)"    # one set of versions: every family, the core's tests
nox -f recipes/environments/noxfile.py -s "tool(axolotl)"             # one tool: its integration's tests, by its own command
nox -f recipes/environments/noxfile.py -s oldest_torch deepspeed      # the oldest torch; ZeRO-2 and ZeRO-3
nox -f recipes/environments/noxfile.py -s peers                       # transformers' and PEFT's own tests, on balanced models
nox -f recipes/environments/noxfile.py -s wheel                       # the wheel with its declared dependencies and nothing else

`core` writes results/environments/NAME.json. `tool` writes results/environments/tools/NAME.xml, unless you pass
arguments for pytest after `--`. `python recipes/environments/table.py` makes the guides' tables from them. The CPU
build of torch is installed first, so that nothing else pulls in a CUDA build.
"""

import os
import shutil
import tempfile
from pathlib import Path

import nox


HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TORCH = "torch==2.13.0"
RESULTS = ROOT / "results" / "environments"
OFFLINE = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
VERSIONS = sorted(path.stem for path in HERE.glob("transformers-*.txt"))
TOOLS = {
    "axolotl": "test_axolotl.py",
    "ms-swift": "test_swift.py",
    "llamafactory": "test_llamafactory.py",
    "vllm": "test_vllm.py",
}
# Other projects whose tests run on balanced models; `PROJECT_CHECKOUT` is the folder of the checkout.
FAMILIES = "dbrx deepseek_v3 glm4_moe gpt_oss granitemoe jamba mixtral olmoe qwen2_moe qwen3_moe qwen3_next"
PEERS = {
    "transformers": [f"tests/models/{family}/test_modeling_{family}.py" for family in FAMILIES.split()],
    "peft": ["tests/test_target_parameters.py", "tests/test_integrations.py"],
}

nox.options.default_venv_backend = "venv"


def install(session: nox.Session, name: str) -> None:
    """Installs NAME.txt. Then installs NAME-alone.txt without dependencies and uninstalls NAME-without.txt, if any."""
    session.install(TORCH)
    session.install("-r", str(HERE / f"{name}.txt"), TORCH)
    alone = HERE / f"{name}-alone.txt"
    if alone.is_file():
        session.install("--no-deps", "-r", str(alone))
    without = HERE / f"{name}-without.txt"
    if without.is_file():
        session.run("pip", "uninstall", "-y", "-q", "-r", str(without))
    session.install("-e", str(ROOT))


@nox.session
@nox.parametrize("versions", VERSIONS, ids=VERSIONS)
def core(session: nox.Session, versions: str) -> None:
    """Runs every family of this transformers version, and the core's tests. Arguments after `--` go to examine.py."""
    install(session, versions)
    session.run("python", str(HERE / "examine.py"), versions, str(RESULTS), *session.posargs, env=OFFLINE)


@nox.session
@nox.parametrize("name", list(TOOLS), ids=list(TOOLS))
def tool(session: nox.Session, name: str) -> None:
    """Runs the tests of an integration with its tool."""
    install(session, name)
    for libraries in Path(session.virtualenv.location).glob("lib/*/site-packages/torchaudio/lib"):
        shutil.rmtree(libraries)  # for CUDA; torchaudio imports without them
    tests = ROOT / "tests" / "integrations" / TOOLS[name]
    report = ["-o", "junit_family=xunit1", f"--junitxml={RESULTS / 'tools' / name}.xml"]
    session.run("pytest", "-q", str(tests), *(session.posargs or report), env=OFFLINE)


@nox.session
def oldest_torch(session: nox.Session) -> None:
    """Tests steps, gradients and copies on the oldest torch in pyproject.toml (a CUDA build of several GB)."""
    session.install("torch==2.6.0", "transformers==5.24.0", "peft", "trl>=1.16,<2", "-r", str(HERE / "tests.txt"))
    session.install("-e", str(ROOT))
    files = ["test_steps.py", "test_process.py", "test_copies.py", "test_phi_gradient.py"]
    # transformers' experts have no second derivative there
    tests = [*(str(ROOT / "tests" / "balancing" / name) for name in files), "-k", "not create_graph"]
    session.run("pytest", "-q", *tests, *session.posargs, env=OFFLINE)


@nox.session
def wheel(session: nox.Session) -> None:
    """Builds the wheel and uses it without the checkout; `tests/test_package.py` does so with borrowed dependencies."""
    session.install("build", TORCH)
    with tempfile.TemporaryDirectory() as folder, session.chdir(folder):
        session.run("python", "-m", "build", "--outdir", folder, str(ROOT))
        session.install(*map(str, Path(folder).glob("*.whl")))
        session.run("python", str(ROOT / "tests" / "helpers" / "installed.py"), folder, env=OFFLINE)


@nox.session
def deepspeed(session: nox.Session) -> None:
    """Runs the recipes under ZeRO-2 and ZeRO-3, on two processes."""
    session.install(TORCH)
    session.install("-e", f"{ROOT}[dev]", "setuptools", "wheel", "hjson", "py-cpuinfo", "msgpack", "einops", "ninja")
    session.install("--no-deps", "--no-build-isolation", "deepspeed==0.19.8")
    session.run("pytest", "-q", str(ROOT / "tests" / "training" / "test_launch.py"), *session.posargs, env=OFFLINE)


@nox.session
@nox.parametrize("project", list(PEERS), ids=list(PEERS))
def peers(session: nox.Session, project: str) -> None:
    """
    Runs the tests of transformers and PEFT on balanced models (see `peers.py`). TRANSFORMERS_CHECKOUT and
    PEFT_CHECKOUT are git checkouts. Their versions are installed. Arguments after `--` go to pytest.
    """
    name = f"{project.upper()}_CHECKOUT"
    if name not in os.environ:
        session.skip(f"{name} is not set: the folder of a git checkout of {project}, with its tests")
    checkout = os.environ[name]
    session.install(TORCH)
    session.install("-r", str(HERE / "peers.txt"), checkout, "-e", str(ROOT), TORCH)
    # replace the settings of the checkout
    settings = ["addopts=", "filterwarnings=", "log_cli=false", f"cache_dir={session.create_tmp()}"]
    own = ["-q", "-p", "peers", *(part for setting in settings for part in ("-o", setting))]
    env = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(HERE)}
    session.chdir(checkout)
    for options, codes in (["--plain"], [0, 1]), ([], [0]):
        tests = [*options, *PEERS[project], *session.posargs]
        session.run("python", "-m", "pytest", *own, *tests, env=env, success_codes=codes)
