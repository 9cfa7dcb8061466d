"""The image loaders: values against the files they came from, and every way in which the files can be wrong."""

import gzip
import io
import pickle
import struct
import sys

import numpy as np
import pytest

from recipes.common.images import CIFAR10_TEST, CIFAR10_TRAIN, load_images, read_cifar_batch, read_idx

# ---------------------------------------------------------------------------------------------------- writing files


def idx_bytes(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_fashion(folder, *, train=6, test=4, size=5, seed=0):
    """Four small IDX files, images compressed and labels not; returns the arrays by file name without `.gz`."""
    rng, arrays = np.random.RandomState(seed), {}
    for split, n in (("train", train), ("t10k", test)):
        arrays[f"{split}-images-idx3-ubyte"] = rng.randint(0, 256, (n, size, size)).astype(np.uint8)
        arrays[f"{split}-labels-idx1-ubyte"] = rng.randint(0, 10, n).astype(np.uint8)
    for name, array in arrays.items():
        if array.ndim == 3:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx_bytes(array), mtime=0))
        else:
            (folder / name).write_bytes(idx_bytes(array))
    return arrays


class Python2Pickler(pickle._Pickler):
    """Writes text and bytes as Python 2 did: both as BINSTRING. The published CIFAR-10 files look like this."""

    dispatch = dict(pickle._Pickler.dispatch)  # noqa: RUF012

    def save_string(self, value):
        raw = value if isinstance(value, bytes) else value.encode("latin1")
        self.write(pickle.BINSTRING + struct.pack("<i", len(raw)) + raw)
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = save_string


def python2_pickle(value):
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(value)
    return file.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def cifar_content(n=3, seed=0):
    rng = np.random.RandomState(seed)
    return {
        b"batch_label": b"a batch",
        b"labels": rng.randint(0, 10, n).tolist(),
        b"data": rng.randint(0, 256, (n, 3072)).astype(np.uint8),
    }


def write_cifar(folder):
    folder.mkdir()
    contents = {name: cifar_content(seed=i) for i, name in enumerate(CIFAR10_TRAIN + CIFAR10_TEST)}
    for name, content in contents.items():
        (folder / name).write_bytes(python2_pickle(content))
    return contents


# ------------------------------------------------------------------------------------------------------ right files


def check_standard(data):
    """What every data set promises."""
    for part in (data.train, data.test):
        assert part["image"].dtype == np.float32 and part["image"].shape == (len(part["label"]), *data.shape)
        assert part["label"].dtype == np.int32 and set(part["label"]) <= set(range(data.classes))
        assert part["image"].flags.c_contiguous and part["image"].flags.writeable
    mean = data.train["image"].mean(axis=(0, 1, 2), dtype=np.float64)
    std = data.train["image"].std(axis=(0, 1, 2), dtype=np.float64)
    np.testing.assert_allclose(mean, 0, atol=1e-5)
    np.testing.assert_allclose(std, 1, atol=1e-5)


def test_digits():
    data = load_images("digits")
    check_standard(data)
    assert data.shape == (8, 8, 1) and data.classes == 10
    assert (len(data.train["label"]), len(data.test["label"])) == (1437, 360)
    assert data.train["label"][:8].tolist() == load_images("digits").train["label"][:8].tolist()
    assert set(data.test["label"]) == set(range(10))

    from sklearn.datasets import load_digits

    # The split is a partition: every image of the source occurs once (a few are equal, so count them).
    def key(images):
        return sorted(x.tobytes() for x in images)

    source = load_digits().images[..., None].astype(np.float32)
    pixels = np.concatenate([data.train["image"], data.test["image"]])
    low, high = pixels.min(), pixels.max()
    restored = np.round((pixels - low) / (high - low) * 16).astype(np.float32)
    assert key(restored) == key(source)


def test_fashion_mnist_round_trip(tmp_path):
    arrays = write_fashion(tmp_path)
    data = load_images("fashion_mnist", tmp_path)
    check_standard(data)
    assert data.shape == (5, 5, 1)
    train, test = arrays["train-images-idx3-ubyte"], arrays["t10k-images-idx3-ubyte"]
    np.testing.assert_allclose(data.test["image"][..., 0], (test - train.mean()) / train.std(), rtol=1e-5)
    np.testing.assert_array_equal(data.test["label"], arrays["t10k-labels-idx1-ubyte"])


def test_a_constant_channel_becomes_zero(tmp_path):
    write_fashion(tmp_path)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(np.full((6, 5, 5), 7, np.uint8))))
    assert not load_images("fashion_mnist", tmp_path).train["image"].any()


@pytest.mark.parametrize("parent", [False, True])
def test_cifar10_round_trip(tmp_path, parent):
    contents = write_cifar(tmp_path / "cifar-10-batches-py")
    data = load_images("cifar10", tmp_path if parent else tmp_path / "cifar-10-batches-py")
    check_standard(data)
    assert data.shape == (32, 32, 3) and len(data.train["label"]) == 15
    raw = np.concatenate([contents[name][b"data"] for name in CIFAR10_TRAIN]).reshape(15, 3, 32, 32)
    blue = raw[:, 2]
    np.testing.assert_allclose(data.train["image"][..., 2], (blue - blue.mean()) / blue.std(), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(data.test["label"], contents["test_batch"][b"labels"])


@pytest.mark.parametrize("protocol", range(2, 6))
def test_cifar_batch_of_any_pickle_protocol(tmp_path, protocol):
    content, path = cifar_content(), tmp_path / "batch"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    images, labels = read_cifar_batch(path)
    np.testing.assert_array_equal(images.transpose(0, 3, 1, 2).reshape(3, 3072), content[b"data"])
    assert labels.tolist() == content[b"labels"]


# ------------------------------------------------------------------------------------------------------ wrong usage


@pytest.mark.parametrize(
    ("name", "message"),
    [("fashion-mnist", "Did you mean 'fashion_mnist'"), ("cifar", "Did you mean 'cifar10'"), ("x", "Known: digits, ")],
)
def test_unknown_name(name, message):
    with pytest.raises(ValueError, match=message):
        load_images(name)


def test_digits_takes_no_folder(tmp_path):
    with pytest.raises(ValueError, match="leave `folder` out"):
        load_images("digits", tmp_path)


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match="pip install scikit-learn"):
        load_images("digits")


def test_fashion_mnist_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*dataset-fashion-mnist, or pass folder="):
        load_images("fashion_mnist", tmp_path / "nowhere")
    write_fashion(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match=r"looked for t10k-labels-idx1-ubyte\.gz and t10k-labels-idx1-ubyte,"):
        load_images("fashion_mnist", tmp_path)


def test_cifar10_missing(tmp_path):
    with pytest.raises(ValueError, match=r"no default folder\. Unpack cifar-10-python\.tar\.gz"):
        load_images("cifar10")
    write_cifar(tmp_path / "cifar-10-batches-py")
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").unlink()
    with pytest.raises(FileNotFoundError, match=r"missing: data_batch_3\. Unpack"):
        load_images("cifar10", tmp_path)


# ---------------------------------------------------------------------------------------------------- damaged files


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.gz", b"plain", "not a complete gzip file"),
        ("a.gz", gzip.compress(bytes(1000), mtime=0)[:-9], "not a complete gzip file"),
        ("a", b"", r"starts with the bytes \(none\)"),
        ("a", b"\0\0\x0d\1", "starts with the bytes 00 00 0d 01, .* starts with 00 00 08 01"),
        ("a", b"\0\0\x08\1\0", "cut short, 5 bytes are fewer than the 8 of the header"),
        ("a", idx_bytes(np.zeros(4, np.uint8))[:-1], r"header says \(4,\), 4 bytes, but 3 bytes follow"),
        ("a", idx_bytes(np.zeros(4, np.uint8)) + b"!", r"header says \(4,\), 4 bytes, but 5 bytes follow"),
    ],
)
def test_damaged_idx(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_idx(path, axes=1)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("train-labels-idx1-ubyte", np.zeros(5, np.uint8), "holds 6 images, .* holds 5 labels"),
        ("train-labels-idx1-ubyte", np.full(6, 10, np.uint8), r"labels go from 10 to 10, but should be in 0\.\.9"),
        ("t10k-images-idx3-ubyte.gz", np.zeros((4, 6, 6), np.uint8), r"are \(5, 5\), test images are \(6, 6\)"),
    ],
)
def test_inconsistent_idx(tmp_path, name, array, message):
    write_fashion(tmp_path)
    content = idx_bytes(array)
    (tmp_path / name).write_bytes(gzip.compress(content, mtime=0) if name.endswith(".gz") else content)
    with pytest.raises(ValueError, match=message):
        load_images("fashion_mnist", tmp_path)


class Malicious:
    def __reduce__(self):
        return print, ("this must never be printed",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a pickle", "not a CIFAR-10 python batch"),
        (pickle.dumps(cifar_content())[:-100], "not a CIFAR-10 python batch"),
        (pickle.dumps({b"data": Malicious()}), "refused builtins.print: only numpy arrays are read"),
        (b"\x80\x02c_codecs\nencode\nX\x01\0\0\0aX\x05\0\0\0rot13\x86R.", "refused the encoding 'rot13'"),
        (pickle.dumps([1, 2]), "should be a dict .*, is list"),
        (pickle.dumps({b"data": 1, b"fine_labels": 2}), "should be a dict .*fine_labels"),
        (pickle.dumps(cifar_content() | {b"data": [1]}), r"b'data' should be uint8 \(N, 3072\), is list"),
        (pickle.dumps(cifar_content() | {b"data": np.zeros((3, 4))}), r"is float64 \(3, 4\)"),
        (pickle.dumps(cifar_content() | {b"labels": [1, 2]}), "b'labels' should be 3 integers, one per image"),
        (pickle.dumps(cifar_content() | {b"labels": [1, 2, 12]}), r"labels go from 1 to 12, but should be in 0\.\.9"),
    ],
)
def test_damaged_cifar(tmp_path, capsys, content, message):
    path = tmp_path / "data_batch_1"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_cifar_batch(path)
    assert not capsys.readouterr().out
