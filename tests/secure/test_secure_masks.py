"""Masks and sealed seeds: known answers from an independent implementation, separation of inputs, uniformity."""

import hashlib
import hmac
import itertools
import struct
from dataclasses import replace

import numpy as np
import pytest
from Crypto.Cipher import AES, ChaCha20_Poly1305
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from scipy.stats import chi2, kstest
from support.secure_round import FACTS, public_key, signing_key, tape

from fedpriv.errors import UserError
from fedpriv.secure import HelperKey, Masked, RoundFacts, mask_message
from fedpriv.secure import masks as masks_module
from fedpriv.secure.masks import add_mask
from fedpriv.secure.sealing import BOX_BYTES, open_seed, seal_seed

ADDRESS = {"run": "run-1", "round": 3, "client": 7, "helper": bytes(range(32))}
SEED = bytes(range(100, 132))


def mask(size: int = 4, seed: bytes = SEED, **changes) -> np.ndarray:
    words = np.zeros(size, dtype=np.uint32)
    add_mask(words, seed, **{**ADDRESS, **changes})
    return words


def field(value: int | float | str | bytes) -> bytes:
    """Encode one field, written down from the description of the format."""
    if isinstance(value, int):
        return b"i" + struct.pack(">Q", value)
    if isinstance(value, float):
        return b"d" + struct.pack(">d", value)
    content = value.encode() if isinstance(value, str) else value
    return (b"s" if isinstance(value, str) else b"b") + struct.pack(">Q", len(content)) + content


def packed(kind: str, *values: int | float | str | bytes) -> bytes:
    return f"fedpriv secure aggregation 1 {kind}\n".encode() + b"".join(field(value) for value in values)


def hkdf(secret: bytes, info: bytes) -> bytes:
    """Derive 32 bytes as RFC 5869 says, without a salt."""
    pseudo_random_key = hmac.new(bytes(32), secret, hashlib.sha256).digest()
    return hmac.new(pseudo_random_key, info + b"\x01", hashlib.sha256).digest()


def keystream(key: bytes, size: int) -> np.ndarray:
    """Encrypt the counters one by one."""
    blocks = (size + 3) // 4
    counters = b"".join(number.to_bytes(16, "big") for number in range(blocks))
    stream = AES.new(key, AES.MODE_ECB).encrypt(counters)
    return np.array([int.from_bytes(stream[4 * k : 4 * k + 4], "little") for k in range(size)], dtype=np.uint32)


@pytest.mark.parametrize("size", [1, 4, 5, 1000])
def test_a_mask_is_the_one_of_an_independent_implementation(size: int) -> None:
    info = packed("mask", ADDRESS["run"], ADDRESS["round"], ADDRESS["client"], ADDRESS["helper"])
    np.testing.assert_array_equal(mask(size), keystream(hkdf(SEED, info), size))


DIGEST = "3ea896f4faa8fc6f7655be8b8699504ffe17399cfad8f04d6232efc4f18daa95"


def test_a_mask_never_changes() -> None:
    assert mask().tolist() == [3397990373, 1563175857, 3027242678, 427888533]
    assert hashlib.sha256(mask(100_000).astype("<u4").tobytes()).hexdigest() == DIGEST


def test_masks_do_not_depend_on_the_size_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = mask(1001)
    monkeypatch.setattr(masks_module, "_BLOCK", 64)
    np.testing.assert_array_equal(mask(1001), expected)


def test_masks_add_up_modulo_two_to_the_32() -> None:
    words = np.full(5, 2**32 - 1, dtype=np.uint32)
    add_mask(words, SEED, **ADDRESS)
    np.testing.assert_array_equal(words, ((mask(5).astype(np.int64) - 1) % 2**32).astype(np.uint32))


def test_each_part_of_an_address_gives_another_mask() -> None:
    """Every number of one mask differs from that of another with probability 1 - 2^-32 at each place."""
    runs, numbers, helpers = ["run-1", "run-11", "run-1 ", "run"], [0, 1, 3, 256], [bytes(32), bytes(range(32))]
    found = {}
    for run, round, client, helper in itertools.product(runs, numbers, numbers, helpers):
        address = (run, round, client, helper)
        found[address] = mask(8, run=run, round=round, client=client, helper=helper)
    assert len({words.tobytes() for words in found.values()}) == len(found) == 128
    for one, other in itertools.combinations(list(found.values())[:40], 2):
        assert (one != other).all()
    assert (mask(8) != mask(8, seed=SEED[::-1])).all()


BOX_DIGEST = "9c06073ed9ae600402c13e4a4ac673479b1eb39bdf119cbd6634c4676770a71f"


def test_a_box_is_opened_by_an_independent_implementation() -> None:
    private = X25519PrivateKey.from_private_bytes(bytes(range(1, 33)))
    key = private.public_key().public_bytes_raw()
    box = seal_seed(SEED, key, b"facts", tape("box"))
    shared = private.exchange(X25519PublicKey.from_public_bytes(box[:32]))
    cipher = ChaCha20_Poly1305.new(key=hkdf(shared, packed("box", box[:32], key)), nonce=bytes(12))
    cipher.update(b"facts")
    assert cipher.decrypt_and_verify(box[32:64], box[64:]) == SEED
    assert hashlib.sha256(box).hexdigest() == BOX_DIGEST


def test_a_box_opens_with_its_key_under_its_facts_and_unchanged_only() -> None:
    private, other = X25519PrivateKey.generate(), X25519PrivateKey.generate()
    box = seal_seed(SEED, private.public_key().public_bytes_raw(), b"facts")
    assert len(box) == BOX_BYTES
    assert open_seed(box, private, b"facts") == SEED
    assert open_seed(box, private, b"other facts") is None
    assert open_seed(box, other, b"facts") is None
    for position in range(BOX_BYTES):
        changed = bytearray(box)
        changed[position] ^= 1
        assert open_seed(bytes(changed), private, b"facts") is None
    assert open_seed(bytes(BOX_BYTES), private, b"facts") is None


def test_a_key_that_gives_every_client_the_same_secret_is_refused() -> None:
    with pytest.raises(UserError, match="helper's key: expected an X25519 key"):
        seal_seed(SEED, bytes(32), b"facts")


def facts_of(size: int) -> RoundFacts:
    return replace(FACTS, size=size)


def helper_key(j: int) -> HelperKey:
    private = X25519PrivateKey.from_private_bytes(bytes([j + 1] * 32))
    return HelperKey.signed("run-1", private.public_key().public_bytes_raw(), signing_key(f"helper {j}"))


def masked(values: np.ndarray, name: str = "a", helpers: int = 1) -> Masked:
    keys = [helper_key(j) for j in range(helpers)]
    pinned = [public_key(f"helper {j}") for j in range(helpers)]
    return mask_message(values, facts_of(len(values)), 0, signing_key("client 0"), keys, pinned, tape(name))


SIZE = 60_000
DATA = {
    "zero": np.zeros(SIZE, dtype=np.int64),
    "constant": np.full(SIZE, -123_456_789, dtype=np.int64),
    "small": np.arange(SIZE, dtype=np.int64) % 7,
    "alternating": np.where(np.arange(SIZE) % 2 == 0, 2**31 - 1, -(2**31)),
}


@pytest.mark.parametrize("data", DATA)
def test_a_masked_message_is_uniform_for_any_data(data: str) -> None:
    """Two-sided, with fixed seeds: no false alarms. With free seeds the rate is 1e-5."""
    words = masked(DATA[data], data).words
    assert kstest((words + 0.5) / 2.0**32, "uniform").pvalue > 1e-6
    for position in range(4):
        counts = np.bincount((words >> (8 * position)) & 255, minlength=256)
        statistic = float(((counts - SIZE / 256) ** 2).sum() / (SIZE / 256))
        assert chi2.ppf(1e-6, 255) < statistic < chi2.isf(1e-6, 255)


def test_the_same_tests_reject_masks_of_31_bits() -> None:
    words = masked(DATA["zero"], "zero").words >> 1
    assert kstest((words + 0.5) / 2.0**32, "uniform").pvalue < 1e-6


def test_masked_messages_of_different_data_differ_by_the_data_alone() -> None:
    """With the same seeds, everything but the masked numbers is equal, and these differ by the data."""
    one, other = masked(DATA["zero"][:9]), masked(DATA["constant"][:9])
    assert one.sealed == other.sealed
    assert (other.words - one.words == np.uint32(2**32 - 123_456_789)).all()


def test_two_messages_share_neither_masks_nor_boxes() -> None:
    keys = [helper_key(0)]
    pinned, zeros = [public_key("helper 0")], np.zeros(64, dtype=np.int64)
    messages = [mask_message(zeros, facts_of(64), 0, signing_key("client 0"), keys, pinned) for _ in range(8)]
    for one, other in itertools.combinations(messages, 2):
        assert (one.words != other.words).all()
        assert one.sealed[0].box[:32] != other.sealed[0].box[:32]
        assert one.sealed[0].box[32:] != other.sealed[0].box[32:]


def test_one_mask_for_each_helper() -> None:
    """Without one helper's mask, a message with two masks is still uniform."""
    words = masked(DATA["zero"], "two", helpers=2).words
    first = np.zeros(SIZE, dtype=np.uint32)
    seed = tape("two")(32)
    add_mask(first, seed, run="run-1", round=1, client=0, helper=min(public_key("helper 0"), public_key("helper 1")))
    rest = words - first
    assert kstest((rest + 0.5) / 2.0**32, "uniform").pvalue > 1e-6
    assert (rest != 0).all()


@pytest.mark.parametrize(
    "values", [np.zeros(6, dtype=np.int64), np.zeros(7), np.zeros((7, 1), dtype=np.int64), np.zeros(7, dtype=np.int32)]
)
def test_values_of_another_shape_or_type_are_refused(values: np.ndarray) -> None:
    with pytest.raises(UserError, match=r"values: expected int64 \[7\]"):
        mask_message(values, facts_of(7), 0, signing_key("client 0"), [helper_key(0)], [public_key("helper 0")])
