"""Packages that import torchvision, in a process in which fedpriv was imported before them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

NET = """
import timm
import flwr_datasets
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import ViTConfig, ViTForImageClassification


class Logits(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, inputs):
        return self.inner(pixel_values=inputs).logits


def adapted(classes: int, rank: int = 2):
    sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    config = ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=classes, **sizes)
    lora = LoraConfig(r=rank, target_modules="all-linear", modules_to_save=["classifier"])
    return Logits(get_peft_model(ViTForImageClassification(config), lora))


def network(classes: int):
    sizes = dict(img_size=8, patch_size=4, in_chans=1, embed_dim=8, depth=1, num_heads=2)
    return timm.models.VisionTransformer(num_classes=classes, **sizes)
"""

EXPERIMENT = """
name = "third-party"
seed = 1
data = { name = "./data.py:load", partition = "natural", test = "within" }
model = { name = "./net.py:adapted" }
method = { name = "dp-fedavg" }
training = { rounds = 1 }
"""

DATA = """
import numpy as np


def load():
    rng = np.random.default_rng(0)
    return {"inputs": rng.random((40, 1, 8, 8)), "labels": np.arange(40) % 2, "client_ids": np.arange(40) // 10}
"""

PROGRAM = """
from fedpriv import load_config
from fedpriv.experiment.dry_run import try_experiment

for name in ("adapted", "network"):
    print(try_experiment(load_config("own.toml", [f"model.name=./net.py:{name}"])).parameters)
"""


@pytest.mark.slow
def test_models_of_transformers_peft_and_timm_are_checked_beside_this_torch(tmp_path: Path) -> None:
    for name, text in (("net.py", NET), ("data.py", DATA), ("own.toml", EXPERIMENT)):
        (tmp_path / name).write_text(text)
    known = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=tmp_path,
        env=os.environ | known,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    adapted, network = map(int, done.stdout.split())
    assert 8 * 2 + 2 < adapted < 300
    assert network > 900
