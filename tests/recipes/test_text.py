"""The text loader: windows against a naive loop, the vocabulary's rules, and wrong files."""

import collections

import numpy as np
import pytest

from recipes.common.text import KEPT_CHARACTERS, REPLACEMENT, load_text

TEXT = "the quick brown fox jumps over the lazy dog.\n" * 9


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file


def test_windows_are_the_text_cut_in_order(path):
    data = load_text(path, length=7, test_fraction=0.2)
    windows = (len(TEXT) - 1) // 7
    assert len(data.train["tokens"]) + len(data.test["tokens"]) == windows
    assert len(data.test["tokens"]) == round(0.2 * windows)
    row = 0
    for part in (data.train, data.test):
        assert part["tokens"].dtype == part["targets"].dtype == np.int32
        for tokens, targets in zip(part["tokens"], part["targets"], strict=True):
            assert data.decode(tokens) == TEXT[7 * row : 7 * row + 7]
            assert data.decode(targets) == TEXT[7 * row + 1 : 7 * row + 8]
            row += 1


def test_encode_and_decode(path):
    data = load_text(path, length=7)
    assert data.vocabulary == (REPLACEMENT, *sorted(set(TEXT)))
    assert data.encode("fox").dtype == np.int32
    assert data.decode(data.encode("lazy fox")) == "lazy fox"
    assert data.decode(data.encode("Fox \N{SNOWMAN}\ud800")) == f"{REPLACEMENT}ox {REPLACEMENT}{REPLACEMENT}"
    assert data.encode("").shape == (0,) and data.decode(data.encode("")) == ""


def test_rare_characters_become_one(tmp_path):
    rng = np.random.RandomState(0)
    characters = [chr(0x4E00 + i) for i in rng.zipf(1.3, 4000) % 600] + ["\N{GRINNING FACE}"] * 50
    train = "".join(characters)
    file = tmp_path / "text.txt"
    file.write_text(train + "X" * 2000, encoding="utf-8")  # X only occurs at the end, in the test windows
    data = load_text(file, length=10, test_fraction=0.34)
    assert len(data.train["tokens"]) * 10 < len(train) and len(data.vocabulary) == KEPT_CHARACTERS + 1

    seen = train[: len(data.train["tokens"]) * 10 + 1]
    counts = collections.Counter(seen)
    kept = sorted(counts, key=lambda c: (-counts[c], c))[:KEPT_CHARACTERS]
    assert data.vocabulary == (REPLACEMENT, *sorted(kept))
    expected = "".join(c if c in kept else REPLACEMENT for c in seen[:-1])
    assert data.decode(data.train["tokens"].ravel()) == expected and REPLACEMENT in expected
    assert not data.test["tokens"][-1].any()


def test_replacement_characters_and_line_ends_in_the_file(tmp_path):
    file = tmp_path / "text.txt"
    file.write_bytes("\N{BYTE ORDER MARK}ab\r\nab\N{REPLACEMENT CHARACTER}ab\r\nab\r\n".encode())
    data = load_text(file, length=2)
    assert data.vocabulary == (REPLACEMENT, "\n", "a", "b")
    assert data.decode(data.train["tokens"].ravel()).startswith(f"ab\nab{REPLACEMENT}a")


def test_a_text_of_replacement_characters(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(REPLACEMENT * 9, encoding="utf-8")
    data = load_text(file, length=2)
    assert data.vocabulary == (REPLACEMENT,) and not data.train["tokens"].any()


def test_standard_library():
    data = load_text()
    assert data.train["tokens"].shape[1] == 64
    assert 1_000_000 - 65 <= 64 * (len(data.train["tokens"]) + len(data.test["tokens"])) <= 1_000_000
    assert 60 < len(data.vocabulary) <= KEPT_CHARACTERS + 1
    assert "import " in data.decode(data.train["tokens"][:200].ravel())
    np.testing.assert_array_equal(data.train["tokens"], load_text().train["tokens"])


def test_each_side_gets_a_window(path):
    length = (len(TEXT) - 1) // 2
    for fraction in (0.01, 0.99):
        data = load_text(path, length=length, test_fraction=fraction)
        assert len(data.train["tokens"]) == len(data.test["tokens"]) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, r"load_text\(length=0\): a window has at least one"),
        ({"test_fraction": 1.0}, r"test_fraction=1.0\): should be between 0 and 1"),
        ({"length": 300}, "has 405 characters; one window to train and one to test need 601"),
    ],
)
def test_wrong_options(path, options, message):
    with pytest.raises(ValueError, match=message):
        load_text(path, **options)


def test_wrong_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="the file does not exist"):
        load_text(tmp_path / "nowhere.txt")
    with pytest.raises(FileNotFoundError, match="the file is a folder"):
        load_text(tmp_path)
    file = tmp_path / "text.txt"
    file.write_bytes(b"")
    with pytest.raises(ValueError, match="is empty; one window"):
        load_text(file)
    file.write_bytes(b"\x1f\x8b\x08\xff")
    with pytest.raises(ValueError, match=r"not UTF-8 text .* Unpack or convert it"):
        load_text(file)


@pytest.mark.parametrize("tokens", [[-1], [1000], [0.5], [[1]]])
def test_decode_rejects_what_is_no_token(path, tokens):
    with pytest.raises(ValueError, match=r"decode\(tokens=...\)"):
        load_text(path, length=7).decode(np.array(tokens))
