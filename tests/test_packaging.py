"""Wheel and sdist: what is in them, with a compiler and without, and that triton_kernels stays nested.

The native wheel is built from the checkout, so it takes over what has been compiled there already.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from fisher_kernels._library import native_module, native_reason
from tests.checkout import load_script

ROOT = Path(__file__).resolve().parents[1]
NOTE = "fisher_kernels/_native_missing.txt"

pytest.importorskip("build", reason="the build front end is missing (pip install build)")
pytest.importorskip("setuptools", minversion="77", reason="setuptools >= 77 is missing")


def run(*command: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python on a command line; the variables replace or, where empty, unset those of the environment."""
    # At run time it chooses a module for tests; a build, which has a setting of that name, is not meant.
    variables.setdefault("FISHER_KERNELS_CUDA_ON_HOST", "")
    env = {name: value for name, value in {**os.environ, **variables}.items() if value}
    return subprocess.run([sys.executable, *command], cwd=cwd, env=env, capture_output=True, text=True, check=False)


def build(kind: str, source: Path, work: Path, **variables: str) -> Path:
    """Build one distribution, with every intermediate file but CMake's in `work`."""
    work.mkdir(exist_ok=True)
    config = work / "distutils.cfg"
    config.write_text(f"[build]\nbuild_base = {work}/build\n[egg_info]\negg_base = {work}\n")
    arguments = ("-m", "build", f"--{kind}", "--no-isolation", "--outdir", work / "dist", source)
    result = run(*arguments, cwd=work, DIST_EXTRA_CONFIG=str(config), **variables)
    assert result.returncode == 0, result.stdout + result.stderr
    (distribution,) = (work / "dist").iterdir()
    return distribution


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sdist", ROOT, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def unpacked_sdist(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        if hasattr(tarfile, "data_filter"):
            archive.extraction_filter = staticmethod(tarfile.data_filter)
        archive.extractall(folder)
    return next(folder.iterdir())


@pytest.fixture(scope="module")
def pure_wheel(unpacked_sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built where no folder of the PATH has a compiler."""
    work = tmp_path_factory.mktemp("pure")
    return build(
        "wheel", unpacked_sdist, work, PATH=str(work), CXX="", FISHER_KERNELS_NATIVE="auto", FISHER_KERNELS_CUDA=""
    )


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def sources(folder: str, suffix: str = "") -> set[str]:
    """Files under a folder of the checkout, as paths from its root."""
    files = (file for file in (ROOT / folder).rglob(f"*{suffix}") if file.is_file())
    return {file.relative_to(ROOT).as_posix() for file in files if "__pycache__" not in file.parts}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "pure_wheel"])
def test_a_wheel_has_the_package_and_nothing_beside_it(kind: str, request: pytest.FixtureRequest) -> None:
    found = names(request.getfixturevalue(kind))
    package = {name for name in found if ".dist-info/" not in name}
    nested = {f"fisher_kernels/{name}" for name in sources("triton_kernels", ".py")}
    assert "fisher_kernels/triton_kernels/__init__.py" in nested
    assert {name for name in package if name.endswith(".py")} == sources("fisher_kernels", ".py") | nested
    assert {"fisher_kernels/triton_kernels/configs.json", "fisher_kernels/auto.json"} <= package
    assert {name.split("/")[0] for name in package} == {"fisher_kernels"}
    assert any(re.fullmatch(r"fisher_kernels-[^/]+/licenses/LICENSE", name) for name in found)


@pytest.mark.slow
def test_a_wheel_has_the_native_module(wheel: Path) -> None:
    if native_module() is None:
        pytest.skip(str(native_reason()))
    assert [name for name in names(wheel) if re.fullmatch(r"fisher_kernels/_native\..*\.so", name)]
    assert NOTE not in names(wheel)
    assert not [name for name in names(wheel) if "_cuda_on_host" in name]
    assert "none-any" not in wheel.name


@pytest.mark.slow
def test_a_wheel_says_what_it_is(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (info,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        metadata = archive.read(f"{info}/METADATA").decode()
        scripts = archive.read(f"{info}/entry_points.txt").decode()
    assert "License-Expression: BSD-3-Clause\n" in metadata
    assert "Requires-Python: >=3.10\n" in metadata
    assert "Requires-Dist: torch>=2.11\n" in metadata
    assert "fisher-kernels = fisher_kernels.__main__:main\n" in scripts


@pytest.mark.slow
def test_an_sdist_has_all_that_builds_and_tests_it(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        found = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert {"CMakeLists.txt", "LICENSE", "Makefile", "pyproject.toml", "setup.py"} <= found
    for folder, suffix in (("csrc", ""), ("fisher_kernels", ".py"), ("triton_kernels", ""), ("tests", ".py")):
        assert sources(folder, suffix)
        assert sources(folder, suffix) <= found
    assert not [name for name in found if name.endswith((".so", ".pyc")) or name == NOTE]


@pytest.mark.slow
def test_without_a_compiler_the_package_imports_and_says_so(pure_wheel: Path, tmp_path: Path) -> None:
    assert pure_wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in names(pure_wheel) if name.endswith(".so")]
    with zipfile.ZipFile(pure_wheel) as archive:
        archive.extractall(tmp_path)
    assert "missing: a C++17 compiler (c++ or g++ or clang++)" in (tmp_path / NOTE).read_text()
    script = (
        "import fisher_kernels, fisher_kernels.triton_kernels; from fisher_kernels import backends;"
        "print(fisher_kernels.__file__, fisher_kernels.triton_kernels.__file__, backends.reasons()['cpu'])"
    )
    # Without site (-S) no editable install can stand in for what this wheel lacks.
    path = os.pathsep.join([str(tmp_path), *(entry for entry in sys.path if entry and Path(entry) != ROOT)])
    defaults = {"FISHER_KERNELS_BACKEND": "", "FISHER_KERNELS_CUDA_ON_HOST": ""}
    result = run("-S", "-c", script, cwd=tmp_path, PYTHONPATH=path, **defaults)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(str(tmp_path)) == 2
    assert "a C++17 compiler (c++ or g++ or clang++)" in result.stdout


@pytest.mark.slow
def test_asking_for_the_native_module_without_a_compiler_is_an_error(unpacked_sdist: Path) -> None:
    variables = {"FISHER_KERNELS_NATIVE": "on", "CXX": "/nonexistent/g++"}
    result = run("setup.py", "build_ext", cwd=unpacked_sdist, **variables)
    assert result.returncode != 0
    assert "missing: a C++17 compiler (/nonexistent/g++)" in result.stderr


@pytest.mark.slow
def test_asking_for_cuda_without_a_compiler_is_an_error_too(unpacked_sdist: Path) -> None:
    variables = {"FISHER_KERNELS_NATIVE": "auto", "FISHER_KERNELS_CUDA": "on", "CXX": "/nonexistent/g++"}
    result = run("setup.py", "build_ext", cwd=unpacked_sdist, **variables)
    assert result.returncode != 0
    assert "missing: a C++17 compiler (/nonexistent/g++)" in result.stderr
    variables["FISHER_KERNELS_NATIVE"] = "off"
    result = run("setup.py", "build_ext", cwd=unpacked_sdist, **variables)
    assert result.returncode != 0
    assert "FISHER_KERNELS_CUDA is 'on' and FISHER_KERNELS_NATIVE 'off'" in result.stderr


@pytest.mark.slow
def test_a_compiler_that_fails_is_an_error(unpacked_sdist: Path) -> None:
    result = run("setup.py", "build_ext", cwd=unpacked_sdist, FISHER_KERNELS_NATIVE="auto", CXX="false")
    if "missing: " in result.stderr:
        pytest.skip(result.stderr.strip())
    assert result.returncode != 0
    assert re.search(r"cmake -S .* failed", result.stderr)


@pytest.mark.slow
def test_the_native_choice_is_checked(unpacked_sdist: Path) -> None:
    result = run("setup.py", "--version", cwd=unpacked_sdist, FISHER_KERNELS_NATIVE="yes")
    assert result.returncode != 0
    assert "FISHER_KERNELS_NATIVE is 'yes', expected 'auto', 'on' or 'off'" in result.stderr


def test_triton_kernels_is_not_importable_at_the_top_level() -> None:
    result = run("-c", "import triton_kernels", cwd=ROOT)
    assert result.returncode != 0
    assert "ImportError: this folder was imported as 'triton_kernels'" in result.stderr
    assert "import 'fisher_kernels.triton_kernels'" in result.stderr


ONE_RUNTIME = """
import re, torch, fisher_kernels
from fisher_kernels import _library
assert _library.native_module() is not None
paths = {line.split()[-1] for line in open("/proc/self/maps")}
print(*sorted(path for path in paths if re.search(r"/lib(gomp|omp|iomp5)\\b[^/]*$", path)), sep="\\n")
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="what a process has loaded is read from /proc")
def test_the_module_shares_the_openmp_runtime_of_torch() -> None:
    module = native_module()
    if module is None or not module.openmp():
        pytest.skip(str(native_reason() or "the module was built without OpenMP"))
    result = run("-c", ONE_RUNTIME, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    runtimes = result.stdout.split()
    assert len(runtimes) == 1, runtimes


def test_a_build_asks_for_no_torch() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    (requires,) = re.findall(r"^requires = \[(.*)\]$", text, re.MULTILINE)
    assert [re.match(r"[\w-]+", name)[0] for name in re.findall(r'"(.*?)"', requires)] == [
        "setuptools",
        "pybind11",
        "cmake",
        "ninja",
    ]


@pytest.fixture(scope="module")
def wheels() -> ModuleType:
    """The script behind `make wheels`."""
    return load_script("cmake/wheels.py")


def stand_in(file: Path, answer: str) -> Path:
    """An interpreter that answers what it is asked."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/bin/sh\necho '{answer}'\n")
    file.chmod(0o755)
    return file


def test_wheels_are_for_each_cpython_at_hand(
    wheels: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    on_path, pyenv = tmp_path / "bin", tmp_path / "pyenv"
    monkeypatch.setenv("PATH", str(on_path))
    monkeypatch.setenv("PYENV_ROOT", str(pyenv))
    monkeypatch.setattr(wheels.sys, "executable", str(stand_in(tmp_path / "own", '["cpython", [3, 12], false, true]')))
    monkeypatch.setenv("BASE_PYTHON", str(stand_in(tmp_path / "base", '["cpython", [3, 11], false, true]')))
    stand_in(on_path / "python3.9", '["cpython", [3, 9], false, true]')
    stand_in(on_path / "python3.11", '["cpython", [3, 11], false, true]')
    stand_in(on_path / "python3.13", '["cpython", [3, 13], true, true]')  # without the lock
    no_headers = stand_in(on_path / "python3.14", '["cpython", [3, 14], false, false]')
    stand_in(on_path / "python3.14-config", '["cpython", [3, 14], false, true]')
    oldest = stand_in(pyenv / "versions" / "3.10.4" / "bin" / "python", '["cpython", [3, 10], false, true]')
    stand_in(pyenv / "versions" / "pypy3.11" / "bin" / "python", '["pypy", [3, 11], false, true]')
    found = {"310": str(oldest), "311": str(tmp_path / "base"), "312": str(tmp_path / "own")}
    assert wheels.interpreters() == found
    assert f"left out: {no_headers}, which has no Python.h" in capsys.readouterr().out


def test_a_wheel_with_cuda_is_named_after_the_toolkit(
    wheels: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDACXX", str(stand_in(tmp_path / "nvcc", "Cuda compilation tools, release 12.9, V12.9.86")))
    assert wheels.cuda_label() == "+cu129"
    monkeypatch.setenv("CUDACXX", "")
    monkeypatch.setenv("CUDA_HOME", "")
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(SystemExit, match="no nvcc in CUDACXX, CUDA_HOME or PATH"):
        wheels.cuda_label()


@pytest.mark.slow
def test_a_wheel_is_installed_by_pip_in_isolation(unpacked_sdist: Path, tmp_path: Path) -> None:
    """With the build requirements that pip fetches, of which torch is none; from git as from a folder."""
    if shutil.which("git") is None or native_module() is None:
        pytest.skip("git or the native module's tools are missing")
    source = tmp_path / "source"
    shutil.copytree(unpacked_sdist, source)
    for command in (("init", "-q"), ("add", "."), ("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a")):
        subprocess.run(["git", *command], cwd=source, check=True)
    for url, native in ((source, "off"), (f"git+file://{source}", "on")):  # one compilation is enough
        target = tmp_path / native
        variables = {"FISHER_KERNELS_CPU": "baseline", "FISHER_KERNELS_CUDA": "off", "FISHER_KERNELS_NATIVE": native}
        arguments = ("-m", "pip", "install", "--no-deps", "--no-cache-dir", "--verbose", "--target", target, url)
        result = run(*arguments, cwd=tmp_path, **variables)
        if "No matching distribution found for setuptools" in result.stderr:
            pytest.skip("pip cannot fetch the build's requirements here")
        assert result.returncode == 0, result.stdout + result.stderr
        assert not re.search(r"^ *(Collecting|Downloading|Using cached) torch", result.stdout, re.MULTILINE)
        assert bool(list((target / "fisher_kernels").glob("_native.*.so"))) == (native == "on")
