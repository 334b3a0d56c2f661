"""Modules that are imported late, checked in one new process, since the import of PyTorch takes seconds."""

import json
import subprocess
import sys
from pathlib import Path

WORDS = """
from torch import nn


def words(classes):
    layer = nn.Linear(4, classes)
    nn.init.normal_(layer.weight)
    nn.init.kaiming_normal_(layer.weight)
    return nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), layer)
"""

# Each step, and the packages that it may not have imported; nor may those before it.
STEPS = {
    "import fedpriv.data.federation": ["torchvision", "sklearn", "matplotlib", "pandas"],
    "from fedpriv.data.datasets import Digits; Digits().load(None)": ["sklearn"],
    # Normal numbers for a tensor without values, as in every embedding, would import PyTorch's compiler.
    "from fedpriv.tasks.models import MODELS; "
    "assert MODELS.resolve('words.py:words', 'model.name')().parameters((1,), 3) == 7 * 4 + 4 * 3 + 3": [
        "torch._dynamo"
    ],
    "import fedpriv, fedpriv.engines, fedpriv.cli": ["ray"],
    "import fedpriv.flower.messages": ["strategies", "clients"],
}

PROGRAM = """
import json, sys
found = {}
for step, late in json.loads(sys.argv[1]).items():
    exec(step)
    found[step] = [name for name in late if name in sys.modules]
print(json.dumps(found))
"""


def test_nothing_is_imported_before_it_is_needed(tmp_path: Path) -> None:
    (tmp_path / "words.py").write_text(WORDS)
    command = [sys.executable, "-c", PROGRAM, json.dumps(STEPS)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {step: [] for step in STEPS}
