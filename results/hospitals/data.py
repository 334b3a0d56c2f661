"""The data of the study: rows of heart disease or of adult, with their hospital or occupation as client.

`split` shuffles the rows before each client's own rows are divided, so that every split trains, validates and tests on
other people. Scales and categories are constants, never statistics of the rows.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fedpriv.data.natural_files import HOSPITALS, read_patients

OCCUPATIONS = (
    "Adm-clerical",
    "Armed-Forces",
    "Craft-repair",
    "Exec-managerial",
    "Farming-fishing",
    "Handlers-cleaners",
    "Machine-op-inspct",
    "Other-service",
    "Priv-house-serv",
    "Prof-specialty",
    "Protective-serv",
    "Sales",
    "Tech-support",
    "Transport-moving",
)
_COLUMNS = (
    "age",
    "workclass",
    "weight",
    "education",
    "education_years",
    "marital_status",
    "occupation",
    "relationship",
    "race",
    "sex",
    "gain",
    "loss",
    "hours",
    "country",
    "income",
)
_NUMERIC = {"age": (40, 15), "education_years": (10, 3), "gain": (0, 10_000), "loss": (0, 1_000), "hours": (40, 12)}
_CATEGORIES = {
    "workclass": ("Private", "Self-emp-not-inc", "Self-emp-inc", "Federal-gov", "Local-gov", "State-gov"),
    "marital_status": (
        "Never-married",
        "Married-civ-spouse",
        "Divorced",
        "Separated",
        "Widowed",
        "Married-spouse-absent",
    ),
    "relationship": ("Husband", "Wife", "Own-child", "Not-in-family", "Other-relative", "Unmarried"),
    "race": ("White", "Black", "Asian-Pac-Islander", "Amer-Indian-Eskimo", "Other"),
    "sex": ("Female", "Male"),
    "country": ("United-States",),
}


def heart(data_root: Path, split: int = 1) -> dict[str, Any]:
    """Return the patients of the four hospitals of `heart-disease`, 33 numbers each."""
    parts = [read_patients(data_root / "heart_disease" / f"processed.{name}.data") for name in HOSPITALS]
    inputs, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return _shuffled(inputs, labels, np.repeat(np.arange(len(parts)), [len(part[1]) for part in parts]), split)


def adult(data_root: Path, split: int = 1, rows: int = 10_000) -> dict[str, Any]:
    """Return the first `rows` rows of `adult.data` with a known occupation; the label is an income above 50,000."""
    table = pd.read_csv(data_root / "adult" / "adult.data", names=list(_COLUMNS), skipinitialspace=True)
    table = table[table["occupation"] != "?"].iloc[:rows]
    numbers = [(table[name].to_numpy(float) - shift) / scale for name, (shift, scale) in _NUMERIC.items()]
    one_hot = [(table[name] == value).to_numpy(float) for name, known in _CATEGORIES.items() for value in known]
    inputs = np.stack([*numbers, *one_hot], axis=1).astype(np.float32)
    ids = table["occupation"].map({name: number for number, name in enumerate(OCCUPATIONS)}).to_numpy(int)
    return _shuffled(inputs, (table["income"] == ">50K").to_numpy(int), ids, split)


def _shuffled(inputs: np.ndarray, labels: np.ndarray, ids: np.ndarray, split: int) -> dict[str, Any]:
    order = np.random.default_rng(split).permutation(len(labels))
    clients = np.arange(ids.max() + 1)
    return {"inputs": inputs[order], "labels": labels[order], "client_ids": ids[order], "clients": clients}
