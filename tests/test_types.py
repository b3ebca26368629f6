"""A user's script passes a strict type checker, and wrong names of choices do not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = Path(__file__).with_name("typed_script.py")

WRONG = """
from torch import nn
from fisher_kernels import MBF, SOFIM, AdaFisher, use_backend

model = nn.Linear(2, 1)
AdaFisher(model, variant="papers")
MBF(model, linear_blocks="each")
MBF(model, sequence="sum")
MBF(model, loss_reduction="none")
MBF(model, inverse_storage="float16")
SOFIM(model.parameters(), direction="up")
use_backend("fpga")
SOFIM(model)
AdaFisher(model, lr="1e-3")
AdaFisher(model).step(lambda: "loss")
"""


@pytest.mark.slow  # mypy reads torch first
def test_a_users_script_passes_mypy_strict_and_wrong_choices_do_not(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    path = tmp_path / "wrong.py"
    path.write_text(WRONG)
    # As if the package were installed: what is wrong inside it is not the user's.
    options = ["--strict", "--no-error-summary", "--follow-imports", "silent", "--config-file", ""]
    command = [sys.executable, "-m", "mypy", *options, "--cache-dir", str(tmp_path / "cache"), str(SCRIPT), str(path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    wrong = {number for number, text in enumerate(WRONG.splitlines(), start=1) if number > 5 and text}
    errors = [text for text in result.stdout.splitlines() if ": error: " in text]
    assert {int(text.split(":")[1]) for text in errors if "wrong.py" in text} == wrong, result.stdout
    assert [text for text in errors if "wrong.py" not in text] == [], result.stdout
    assert result.returncode == 1
