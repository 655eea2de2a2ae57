"""What is given away: the wheel and the source distribution are complete, and work without the checkout."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from paths import HELPERS, ROOT


pytest.importorskip("hatchling", reason='builds the wheel: pip install -e ".[dev]"')
pytestmark = pytest.mark.slow
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}


def run(*command, **options):
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=ENVIRONMENT, **options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel and the source distribution that it is built from."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    (wheel,), (source,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, source


def test_both_hold_the_package_and_nothing_else(built):
    wheel, source = built
    package = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "hf_phibalance").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {"hf_phibalance/py.typed", "hf_phibalance/__init__.pyi", "hf_phibalance/hub/model_card.md"} <= package
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name for name in names if ".dist-info/" not in name} == package
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names == package | {"LICENSE", "PKG-INFO", "README.md", "pyproject.toml", ".gitignore"}


def test_their_metadata_are_valid(built):
    assert run(sys.executable, "-m", "twine", "check", "--strict", *built).count("PASSED") == 2


def test_the_wheel_works_without_the_checkout(built, tmp_path):
    """In a new environment that borrows torch and transformers from this one: the doctor, and a model card."""
    venv.create(tmp_path / "venv", symlinks=True)
    paths = sysconfig.get_paths(vars={"base": str(tmp_path / "venv"), "platbase": str(tmp_path / "venv")})
    borrowed = [path for path in sys.path if path.endswith("site-packages")]
    Path(paths["purelib"], "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    python = Path(paths["scripts"], "python")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--disable-pip-version-check"]
    run(*pip, "--no-index", "--no-deps", "--ignore-installed", built[0])
    shown = run(python, HELPERS / "installed.py", tmp_path, cwd=tmp_path)
    assert "All well" in shown
    card = ModelCard.load(tmp_path / "upload" / "README.md")
    assert "## Expert balance" in card.text and (tmp_path / "upload" / "phi_balance.state").is_file()
