"""Wheel and sdist: what is in them, with a compiler and without, and that triton_kernels stays nested.

The native wheel is built from the checkout, so it takes over what has been compiled there already.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from fisher_kernels._library import native_module, native_reason

ROOT = Path(__file__).resolve().parents[1]
NOTE = "fisher_kernels/_native_missing.txt"

pytest.importorskip("build", reason="the build front end is missing (pip install build)")
pytest.importorskip("setuptools", minversion="77", reason="setuptools >= 77 is missing")


def run(*command: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python on a command line; the variables replace or, where empty, unset those of the environment."""
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
    assert "fisher-kernels = fisher_kernels.cli:main\n" in scripts


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
