"""Image classification data sets as numpy arrays, standardised and split.

| name            | content                               | source                                                 |
|-----------------|---------------------------------------|--------------------------------------------------------|
| `digits`        | 1,437 + 360 of 8x8x1, 10 classes      | bundled with scikit-learn (UCI, Alpaydin & Kaynak)     |
| `fashion_mnist` | 60,000 + 10,000 of 28x28x1, 10 classes| Xiao, Rasul & Vollgraf 2017, arXiv:1708.07747          |
| `cifar10`       | 50,000 + 10,000 of 32x32x3, 10 classes| Krizhevsky 2009, "Learning Multiple Layers of Features"|

Nothing is downloaded: `digits` needs no files, the other two read the files in which they are published.
"""

import difflib
import gzip
import math
import os
import pickle
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

Folder = str | os.PathLike[str]
Raw = tuple[np.ndarray, np.ndarray]  # images uint8 (N, H, W, C), labels uint8 or int (N,)

DIGITS_TRAIN = 1437  # of 1,797: four fifths
FASHION_MNIST_FOLDER = "/usr/share/datasets/fashion-mnist"  # where the Debian package dataset-fashion-mnist puts them
CIFAR10_FOLDER = "cifar-10-batches-py"
CIFAR10_TRAIN = tuple(f"data_batch_{i}" for i in range(1, 6))
CIFAR10_TEST = ("test_batch",)


@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set for classification, in memory.

    `train` and `test` are `{"image": float32 (N, H, W, C), "label": int32 (N,)}`. Images have mean 0 and variance 1
    per channel over the *training* set; the test set is shifted and scaled by the same numbers.
    """

    train: dict[str, np.ndarray]
    test: dict[str, np.ndarray]
    classes: int  # labels are in 0..classes-1
    shape: tuple[int, int, int]  # (H, W, C) of one image


def load_images(name: str, folder: Folder | None = None) -> ImageData:
    """Load the data set called `name`.

    Args:
        name: "digits", "fashion_mnist" or "cifar10".
        folder: where the files are. "digits" has none. "fashion_mnist" wants the four IDX files
            `{train,t10k}-{images-idx3,labels-idx1}-ubyte`, each with or without `.gz` (default: where the Debian
            package `dataset-fashion-mnist` installs them). "cifar10" wants the unpacked "python version":
            `cifar-10-batches-py` or the folder that contains it (no default).

    Returns:
        The data set; the same arrays, in the same order, on every call and every machine.

    Raises:
        ValueError: an unknown name, a folder given to "digits" or not given to "cifar10", a damaged file.
        FileNotFoundError: the folder or one of the files is missing.
        ModuleNotFoundError: "digits" without scikit-learn.
    """
    if name not in _READERS:
        close = difflib.get_close_matches(name.lower().replace("-", "_"), _READERS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"load_images(name={name!r}): unknown data set.{hint} Known: {', '.join(_READERS)}.")
    read, classes = _READERS[name]
    (train_images, train_labels), (test_images, test_labels) = read(folder)
    mean, std = _channel_statistics(train_images)
    return ImageData(
        train=_standardise(train_images, train_labels, mean, std),
        test=_standardise(test_images, test_labels, mean, std),
        classes=classes,
        shape=train_images.shape[1:],
    )


def _channel_statistics(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation per channel, float32 (C,) each, of uint8 images (N, H, W, C).

    Squares of uint8 are exact in uint16 and are summed in float64, so E[x^2] - E[x]^2 loses nothing. The deviation of a
    constant channel is given as 1, which leaves that channel at zero.
    """
    mean = images.mean(axis=(0, 1, 2), dtype=np.float64)
    mean_square = np.square(images, dtype=np.uint16).mean(axis=(0, 1, 2), dtype=np.float64)
    std = np.sqrt(np.maximum(mean_square - mean**2, 0.0))
    constant = images.min(axis=(0, 1, 2)) == images.max(axis=(0, 1, 2))
    return mean.astype(np.float32), np.where(constant, 1.0, std).astype(np.float32)


def _standardise(images: np.ndarray, labels: np.ndarray, mean: np.ndarray, std: np.ndarray) -> dict[str, np.ndarray]:
    x = images.astype(np.float32, order="C")
    x -= mean
    x /= std
    return {"image": x, "label": labels.astype(np.int32)}


# ---------------------------------------------------------------------------------------------------------- digits


def _read_digits(folder: Folder | None) -> tuple[Raw, Raw]:
    if folder is not None:
        raise ValueError(
            f"load_images('digits', folder={os.fspath(folder)!r}): digits comes with scikit-learn and reads no folder; "
            f"leave `folder` out."
        )
    try:
        from sklearn.datasets import load_digits  # here, so that the other data sets do not need scikit-learn
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("load_images('digits') needs scikit-learn: pip install scikit-learn") from error
    pixels, labels = load_digits(return_X_y=True)
    images = pixels.astype(np.uint8).reshape(-1, 8, 8, 1)  # integers 0..16
    # RandomState and not default_rng: numpy promises its stream for ever (NEP 19), so the split never changes.
    order = np.random.RandomState(0).permutation(len(images))
    train, test = order[:DIGITS_TRAIN], order[DIGITS_TRAIN:]
    return (images[train], labels[train]), (images[test], labels[test])


# ---------------------------------------------------------------------------------------------------- Fashion-MNIST


def _read_fashion_mnist(folder: Folder | None) -> tuple[Raw, Raw]:
    root = Path(FASHION_MNIST_FOLDER if folder is None else folder)
    if not root.is_dir():
        raise FileNotFoundError(
            f"load_images('fashion_mnist'): no folder {str(root)!r}. Install the Debian package dataset-fashion-mnist, "
            f"or pass folder= with the four files {{train,t10k}}-{{images-idx3,labels-idx1}}-ubyte (.gz or not)."
        )
    train, test = _read_idx_pair(root, "train"), _read_idx_pair(root, "t10k")
    if train[0].shape[1:] != test[0].shape[1:]:
        raise ValueError(f"{root}: training images are {train[0].shape[1:3]}, test images are {test[0].shape[1:3]}.")
    return train, test


def _read_idx_pair(root: Path, split: str) -> Raw:
    image_path, label_path = (
        _find_idx(root, f"{split}-images-idx3-ubyte"),
        _find_idx(root, f"{split}-labels-idx1-ubyte"),
    )
    images, labels = read_idx(image_path, axes=3), read_idx(label_path, axes=1)
    if len(images) != len(labels) or not images.size:
        raise ValueError(f"{image_path} holds {len(images)} images, {label_path} holds {len(labels)} labels.")
    _check_labels(labels, 10, label_path)
    return images[..., None], labels


def _find_idx(root: Path, stem: str) -> Path:
    for path in (root / f"{stem}.gz", root / stem):
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"load_images('fashion_mnist', folder={str(root)!r}): looked for {stem}.gz and {stem}, found neither. The "
        f"folder should hold {{train,t10k}}-{{images-idx3,labels-idx1}}-ubyte, each with or without .gz."
    )


def read_idx(path: Path, axes: int) -> np.ndarray:
    """Read an IDX file of unsigned bytes, compressed if its name ends in `.gz`.

    The format: two zero bytes, the type (8: unsigned byte), the number of axes, each axis' length as a big-endian
    uint32, then the values in C order.

    Args:
        path: the file.
        axes: the number of axes that it should have.

    Returns:
        uint8, of the shape that the file states; read-only.

    Raises:
        ValueError: not gzip although called `.gz`, another magic number, or fewer or more bytes than the shape needs.
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a complete gzip file ({error}). Copy or download it again.") from error
    magic, wanted = raw[:4], bytes([0, 0, 8, axes])
    if magic != wanted:
        raise ValueError(
            f"{path}: starts with the bytes {magic.hex(' ') or '(none)'}, but an IDX file of unsigned bytes with "
            f"{axes} axes starts with {wanted.hex(' ')}."
        )
    start = 4 + 4 * axes
    if len(raw) < start:
        raise ValueError(f"{path}: cut short, {len(raw)} bytes are fewer than the {start} of the header.")
    shape = tuple(int(n) for n in np.frombuffer(raw, ">u4", count=axes, offset=4))
    size = math.prod(shape)
    if len(raw) - start != size:
        raise ValueError(f"{path}: the header says {shape}, {size} bytes, but {len(raw) - start} bytes follow it.")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


# --------------------------------------------------------------------------------------------------------- CIFAR-10


def _read_cifar10(folder: Folder | None) -> tuple[Raw, Raw]:
    unpack = (
        "Unpack cifar-10-python.tar.gz (the 'python version') and pass folder= with cifar-10-batches-py or its parent."
    )
    if folder is None:
        raise ValueError(f"load_images('cifar10') has no default folder. {unpack}")
    given = Path(folder)
    root = given / CIFAR10_FOLDER if (given / CIFAR10_FOLDER).is_dir() else given
    missing = [name for name in CIFAR10_TRAIN + CIFAR10_TEST if not (root / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"load_images('cifar10', folder={str(given)!r}): looked in {str(root)!r}, missing: "
            f"{', '.join(missing)}. {unpack}"
        )
    return _read_cifar_batches(root, CIFAR10_TRAIN), _read_cifar_batches(root, CIFAR10_TEST)


def _read_cifar_batches(root: Path, names: tuple[str, ...]) -> Raw:
    images, labels = zip(*(read_cifar_batch(root / name) for name in names), strict=True)
    return np.concatenate(images), np.concatenate(labels)


def read_cifar_batch(path: Path) -> Raw:
    """Read one file of `cifar-10-batches-py`: a pickled dict with b"data" uint8 (N, 3072) and b"labels" (N ints).

    Args:
        path: the file.

    Returns:
        Images uint8 (N, 32, 32, 3) and labels int64 (N,). In the file, a row is the red plane, the green, the blue.

    Raises:
        ValueError: not a pickle, one that asks for anything but numpy arrays, or one with other content.
    """
    with path.open("rb") as file:
        try:
            content = _ArrayUnpickler(file, encoding="bytes").load()
        except Exception as error:  # a damaged pickle can raise nearly anything, see the notes on `pickle.Unpickler`
            raise ValueError(f"{path}: not a CIFAR-10 python batch ({type(error).__name__}: {error}).") from error
    if not isinstance(content, dict) or not {b"data", b"labels"} <= content.keys():
        found = sorted(map(repr, content)) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path}: should be a dict with b'data' and b'labels' (CIFAR-10, python version), is {found}.")
    data, labels = content[b"data"], content[b"labels"]
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3 * 32 * 32:
        what = f"{data.dtype} {data.shape}" if isinstance(data, np.ndarray) else type(data).__name__
        raise ValueError(f"{path}: b'data' should be uint8 (N, 3072), is {what}.")
    labels = np.asarray(labels)
    if labels.shape != data.shape[:1] or not np.issubdtype(labels.dtype, np.integer) or not labels.size:
        raise ValueError(
            f"{path}: b'labels' should be {len(data)} integers, one per image, is {labels.dtype} {labels.shape}."
        )
    _check_labels(labels, 10, path)
    return data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels.astype(np.int64)


def _array_builders() -> Iterator[tuple[tuple[str, str], Any]]:
    """The names that pickled numpy arrays refer to, from numpy 1 and 2, in protocols 2 to 5."""
    reconstruct, frombuffer = np.zeros(1).__reduce__()[0], np.zeros(1).__reduce_ex__(5)[0]
    for core in ("numpy.core", "numpy._core"):
        yield (f"{core}.multiarray", "_reconstruct"), reconstruct
        yield (f"{core}.numeric", "_frombuffer"), frombuffer
    yield ("numpy", "ndarray"), np.ndarray
    yield ("numpy", "dtype"), np.dtype


class _ArrayUnpickler(pickle.Unpickler):
    """Builds numpy arrays and Python's own containers, and refuses every other name: a pickle is a program."""

    allowed: ClassVar[dict[tuple[str, str], Any]] = dict(_array_builders())

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes in protocol 2
            return _encode_latin1
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"refused {module}.{name}: only numpy arrays are read")
        return self.allowed[module, name]


def _encode_latin1(text: str, encoding: str | bytes) -> bytes:
    if encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError(f"refused the encoding {encoding!r}")
    return text.encode("latin1")


def _check_labels(labels: np.ndarray, classes: int, path: Path) -> None:
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise ValueError(f"{path}: labels go from {low} to {high}, but should be in 0..{classes - 1}.")


_READERS: dict[str, tuple[Callable[[Folder | None], tuple[Raw, Raw]], int]] = {  # name: reader, classes
    "digits": (_read_digits, 10),
    "fashion_mnist": (_read_fashion_mnist, 10),
    "cifar10": (_read_cifar10, 10),
}
