"""Builds wheels for people without a compiler, and installs wheels where there is nothing but torch.

    python cmake/wheels.py build --cuda 311   # into dist/: every CPython at hand; this one with CUDA as well
    python cmake/wheels.py check dist/*.whl   # for the Python that runs this: a fresh environment, and the self-test

What is compiled follows the same variables as any build; `make wheels` and `make dist` set them to everything.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "wheels"
DIST = ROOT / "dist"
OLDEST = (3, 10)

# One OpenMP runtime in the process: the module finds by its name the one that torch has loaded. A copy in the wheel
# would have another name, and threads of its own.
NOT_IN_THE_WHEEL = "libgomp.so.1"

ASK_PYTHON = """
import json, pathlib, sys, sysconfig
print(json.dumps([sys.implementation.name, sys.version_info[:2], bool(sysconfig.get_config_var("Py_GIL_DISABLED")),
                  pathlib.Path(sysconfig.get_path("include"), "Python.h").exists()]))
"""

# The module neither links nor includes torch, so that it loads where there is none.
LOAD_MODULE = """
import importlib.machinery, importlib.util, sys
loader = importlib.machinery.ExtensionFileLoader("_native", sys.argv[1])
module = importlib.util.module_from_spec(importlib.util.spec_from_loader("_native", loader))
loader.exec_module(module)
print("loaded without torch:", *module.capabilities(), "| OpenMP" if module.openmp() else "| no OpenMP",
      "|", module.why_no_cuda() or "CUDA")
"""

TRAIN_A_STEP = """
import re, sys
import torch
import fisher_kernels
from fisher_kernels import backends, optim
assert "cpu" in backends.available(), backends.reasons()
model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1))
optimizer = optim.AdaFisher(model)
loss = model(torch.randn(16, 8)).square().mean()
loss.backward()
optimizer.step()
assert all(parameter.isfinite().all() for parameter in model.parameters())
assert "numpy" not in sys.modules
if sys.platform == "linux":
    paths = {line.split()[-1] for line in open("/proc/self/maps")}
    runtimes = sorted(path for path in paths if re.search(r"/lib(gomp|omp|iomp5)\\b[^/]*$", path))
    assert len(runtimes) == 1, f"not one OpenMP runtime but {runtimes}"
    print("OpenMP:", *runtimes)
print("fisher_kernels", fisher_kernels.__version__, "trains with torch", torch.__version__)
"""


def run(*command: str | Path, **variables: str) -> None:
    """Run a command outside the checkout, whose packages it must not see, and stop where it fails."""
    shown = ["..." if "\n" in str(part) else str(part) for part in command]
    print("+", shlex.join(shown), flush=True)
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    subprocess.run([str(part) for part in command], cwd=WORK, env={**os.environ, "PATH": path, **variables}, check=True)


def pip(python: Path | str, *arguments: str | Path, **variables: str) -> None:
    """This environment's pip for another Python, which needs none of its own."""
    run(sys.executable, "-m", "pip", "--python", python, *arguments, **variables)


def candidates() -> list[str]:
    """Interpreters worth asking: BASE_PYTHON, this one, those on PATH, pyenv's."""
    names = [os.environ.get("BASE_PYTHON") or sys.executable, sys.executable]
    for folder in os.environ.get("PATH", os.defpath).split(os.pathsep):
        names += [str(file) for file in Path(folder or ".").glob("python3.[0-9]*") if file.name[8:].isdigit()]
    versions = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    return names + [str(file) for file in sorted(versions.glob("*/bin/python"))]


def interpreters() -> dict[str, str]:
    """Every CPython at hand that can be built for, by its tag; of two of one version, the first."""
    found: dict[str, str] = {}
    for name in dict.fromkeys(candidates()):
        answer = subprocess.run([name, "-I", "-c", ASK_PYTHON], capture_output=True, text=True, check=False)
        if answer.returncode:
            continue  # a pyenv shim of a version that is not chosen, say
        implementation, version, free_threaded, has_headers = json.loads(answer.stdout)
        tag = f"{version[0]}{version[1]}"
        if implementation != "cpython" or tuple(version) < OLDEST or free_threaded or tag in found:
            continue
        if has_headers:
            found[tag] = name
        else:
            print(f"left out: {name}, which has no Python.h")
    return dict(sorted(found.items(), key=lambda item: int(item[0])))


def unpacked_sdist() -> Path:
    """The sources as the sdist has them: what wheels are built from, so that they prove it."""
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", WORK / "sdist", ROOT)
    (sdist,) = (WORK / "sdist").iterdir()
    with tarfile.open(sdist) as archive:
        if hasattr(tarfile, "data_filter"):
            archive.extraction_filter = staticmethod(tarfile.data_filter)
        archive.extractall(WORK / "source")
    (source,) = (WORK / "source").iterdir()
    return source


def build(source: Path, tag: str, python: str, label: str = "") -> Path:
    """A wheel for one Python, tagged for the oldest distributions that can load it."""
    raw = WORK / f"raw-{tag}{label}"
    config = WORK / "setup.cfg"
    config.write_text(f"[egg_info]\ntag_build = {label}\n")
    choices = {"FISHER_KERNELS_NATIVE": "on", "FISHER_KERNELS_CUDA": "on" if label else "off"}
    pip(python, "wheel", "--no-deps", "--wheel-dir", raw, source, DIST_EXTRA_CONFIG=str(config), **choices)
    (built,) = raw.iterdir()
    repaired = WORK / f"repaired-{tag}{label}"
    arguments = ("--exclude", NOT_IN_THE_WHEEL, "--wheel-dir", repaired, built)
    run(sys.executable, "-m", "auditwheel", "repair", *arguments)
    (wheel,) = repaired.iterdir()
    with zipfile.ZipFile(wheel) as archive:
        if beside := [name for name in archive.namelist() if ".libs/" in name]:
            raise SystemExit(f"{wheel.name} carries libraries of its own: {beside}")
    DIST.mkdir(exist_ok=True)
    return Path(shutil.copy2(wheel, DIST))


def cuda_label() -> str:
    """The local version of a wheel with CUDA, as torch's has it: +cu130."""
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc", path=path_with_cuda_home())
    if nvcc is None:
        raise SystemExit("no nvcc in CUDACXX, CUDA_HOME or PATH; --cuda none builds the wheels without CUDA alone")
    answer = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", answer)
    if release is None:
        raise SystemExit(f"{nvcc} --version names no release")
    return f"+cu{release[1]}{release[2]}"


def path_with_cuda_home() -> str:
    """PATH, after the toolkit that CUDA_HOME names."""
    home = os.environ.get("CUDA_HOME")
    return os.pathsep.join([*([f"{home}/bin"] if home else []), os.environ.get("PATH", os.defpath)])


def check(wheel: Path, torch: str) -> None:
    """Install a wheel beside torch alone and train; then with `[cli]`, and run the self-test."""
    WORK.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=WORK) as folder:
        run(sys.executable, "-m", "venv", "--without-pip", folder)
        python = Path(folder, "bin", "python")
        pip(python, "install", "--quiet", *shlex.split(torch))
        pip(python, "install", "--quiet", wheel)
        run(python, "-I", "-W", "ignore:Failed to initialize NumPy", "-c", TRAIN_A_STEP)
        pip(python, "install", "--quiet", f"{wheel}[cli]")
        run(Path(folder, "bin", "fisher-kernels"), "selftest")


def load(wheel: Path, python: str) -> None:
    """Load the native module of a wheel in a Python for which no torch is fetched."""
    with tempfile.TemporaryDirectory(dir=WORK) as folder, zipfile.ZipFile(wheel) as archive:
        (module,) = (name for name in archive.namelist() if re.fullmatch(r"fisher_kernels/_native\..*\.so", name))
        run(python, "-I", "-c", LOAD_MODULE, archive.extract(module, folder))


def build_all(only: str, with_cuda: str, torch: str) -> None:
    """Wheels of every Python, then what can be shown of each."""
    found = interpreters()
    own = f"{sys.version_info[0]}{sys.version_info[1]}"
    chosen = [tag for tag in found if only == "all" or tag in only.split(",")]
    cuda = [] if with_cuda == "none" else [tag for tag in found if with_cuda == "all" or tag in with_cuda.split(",")]
    print("CPython", *(f"{tag} ({found[tag]})" for tag in chosen), "| with CUDA:", *(cuda or ["none"]))
    label = cuda_label() if cuda else ""
    source = unpacked_sdist()
    wheels = [(tag, build(source, tag, found[tag])) for tag in chosen]
    wheels += [(tag, build(source, tag, found[tag], label)) for tag in cuda]
    run(sys.executable, "-m", "twine", "check", "--strict", *(wheel for _, wheel in wheels))
    shown = []
    for tag, wheel in wheels:
        load(wheel, found[tag])
        if tag == own:
            check(wheel, torch)
        how = "installed, trains, passes the self-test" if tag == own else "its module loads; not tried with torch"
        shown.append(f"{wheel.name}: {how}")
    print(*shown, sep="\n")


def main() -> None:
    """Parse the arguments; one command each."""
    own = f"{sys.version_info[0]}{sys.version_info[1]}"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", default="torch", help="what pip installs as torch in a fresh environment")
    commands = parser.add_subparsers(dest="command", required=True)
    building = commands.add_parser("build", help="wheels of every CPython at hand, into dist/")
    building.add_argument("--python", default="all", metavar="TAGS", help="for which: all, or a list (310,312)")
    building.add_argument("--cuda", default=own, metavar="TAGS", help=f"with CUDA too: all, none or a list ({own})")
    checking = commands.add_parser("check", help="a fresh environment and the self-test")
    checking.add_argument("wheel", type=Path, nargs="+")
    arguments = parser.parse_args()
    if arguments.command == "build":
        build_all(arguments.python, arguments.cuda, arguments.torch)
    else:
        for wheel in arguments.wheel:
            check(wheel.resolve(), arguments.torch)


if __name__ == "__main__":
    main()
