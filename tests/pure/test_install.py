"""What the installer would run: MindSpore must not touch the interpreter that ComfyUI lives in."""
import sys

import pytest

from tools import install


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """The commands of a step, which are not run; a folder of its own takes what they would make."""
    ran = []
    monkeypatch.setattr(install, "LOCAL", tmp_path)
    monkeypatch.setattr(install, "MINDSPORE", tmp_path / "mindspore")
    monkeypatch.setattr(install, "run", lambda *command: ran.append([str(part) for part in command]))
    (tmp_path / "mindspore/lib/python3.11/site-packages/mindspore/lib/plugin/gpu11.6").mkdir(parents=True)
    monkeypatch.setattr(install.shutil, "rmtree", lambda *_, **__: None)
    return ran


def test_mindspore_gets_an_environment_of_its_own(commands, tmp_path):
    install.install_mindspore()
    made, installed = commands
    assert made[1:] == ["-m", "venv", str(tmp_path / "mindspore")]
    assert installed[:4] == [str(tmp_path / "mindspore/bin/python"), "-m", "pip", "install"]
    assert "--no-deps" in installed          # else mindone's numpy or OpenCV would pull a numpy that MindSpore cannot use


def test_its_packages_are_pinned_and_numpy_is_below_2():
    lines = (install.HERE / "requirements-mindspore.txt").read_text().splitlines()
    packages = [line.split("#")[0].strip() for line in lines if line.split("#")[0].strip()]
    assert all("==" in package for package in packages)
    assert [package for package in packages if package.startswith("numpy==1.")]


def test_a_python_that_mindspore_has_no_wheel_for_is_said_in_one_sentence(monkeypatch):
    monkeypatch.setattr(install, "MINDSPORE_PYTHONS", ("3.5",))
    with pytest.raises(SystemExit, match=rf"needs Python 3.5 .* this is {sys.version.split()[0]}"):
        install.mindspore_python()
