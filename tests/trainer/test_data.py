"""Batches are a pure function of (seed, step); evaluation sees every example once."""

import grain
import numpy as np
import pytest
from tiny import examples

from curvtrain.trainer import distributed
from curvtrain.trainer.data import (
    CURVATURE,
    TRAIN,
    ArrayData,
    GrainData,
    check_arrays,
    checksum,
    eval_batches,
    make_train_data,
    map_arrays,
    own_positions,
    rows_checksum,
    saved_positions,
)

ROWS = {"x": np.arange(20)}  # a batch's rows are their own names


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def rows(batches):
    return np.concatenate([batch["x"] for batch in batches])


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


class Elements:
    """A grain source of the elements of a list."""

    def __init__(self, elements):
        self._elements = elements

    def __len__(self):
        return len(self._elements)

    def __getitem__(self, index):
        return self._elements[index]


def dataset(elements):
    return grain.MapDataset.source(Elements(elements))


def singles(n):
    """n examples, one an element."""
    return dataset([{"x": np.float32(i), "label": i % 3} for i in range(n)])


# -- arrays ------------------------------------------------------------------------------------------------------------


def test_a_batch_is_a_function_of_seed_and_step():
    data = ArrayData(examples(), 16, seed=3)
    first, again = take(data.iterator(), 9), take(ArrayData(examples(), 16, seed=3).iterator(), 9)
    assert all(map(same, first, again))
    other = take(ArrayData(examples(), 16, seed=4).iterator(), 9)
    assert not any(map(same, first, other))
    assert same(data.first(), first[0])


def test_examples_stay_together():
    arrays = examples()
    label_of = {row.tobytes(): label for row, label in zip(arrays["x"], arrays["label"], strict=True)}
    batch = ArrayData(arrays, 16, seed=0).first()
    assert [label_of[row.tobytes()] for row in batch["x"]] == batch["label"].tolist()


def test_epochs_cover_the_data_and_reshuffle():
    batches = take(ArrayData(ROWS, 5, seed=0).iterator(), 8)
    one, two = rows(batches[:4]), rows(batches[4:])
    assert sorted(one) == sorted(two) == list(range(20))
    assert not np.array_equal(one, two)


def test_what_does_not_fill_a_batch_is_left_to_the_next_shuffle():
    batches = take(ArrayData(ROWS, 8, seed=0).iterator(), 60)
    epochs = [rows(pair) for pair in zip(batches[::2], batches[1::2], strict=True)]
    assert all(len(set(epoch)) == 16 for epoch in epochs)  # none twice in an epoch
    assert set(np.concatenate(epochs)) == set(range(20))  # none left out for good


@pytest.mark.parametrize("stream", [TRAIN, CURVATURE])
def test_a_position_is_restored(stream):
    data = ArrayData(examples(), 16, seed=0)
    straight = take(data.iterator(stream), 10)
    iterator = data.iterator(stream)
    take(iterator, 6)
    resumed = ArrayData(examples(), 16, seed=0).iterator(stream)
    resumed.set_state(iterator.get_state())
    assert all(map(same, take(resumed, 4), straight[6:]))


@pytest.mark.parametrize("shards", [2, 4])
def test_processes_take_their_rows_of_one_global_batch(shards):
    whole = take(ArrayData(ROWS, 8, seed=1).iterator(), 5)
    parts = [take(ArrayData(ROWS, 8, 1, shard, shards).iterator(), 5) for shard in range(shards)]
    for step, batch in enumerate(whole):
        shares = [part[step]["x"] for part in parts]
        assert {len(share) for share in shares} == {8 // shards}
        assert sorted(np.concatenate(shares)) == sorted(batch["x"])


def test_a_run_is_the_same_on_any_number_of_processes():
    alone, shared = ArrayData(ROWS, 8, seed=1), ArrayData(ROWS, 8, 1, shard=1, shards=2)
    assert alone.description() == shared.description()
    iterator = alone.iterator()
    take(iterator, 3)
    share = shared.iterator()
    share.set_state(iterator.get_state())
    assert set(next(share)["x"]) < set(next(iterator)["x"])


def test_curvature_batches_have_a_stream_of_their_own():
    data = ArrayData(examples(), 16, seed=0)
    train, wide = data.iterator(TRAIN), data.iterator(CURVATURE, 2)
    expected = take(data.iterator(TRAIN), 6)
    seen = []
    for _ in range(6):  # drawing from one does not move the other
        assert next(wide)["x"].shape[0] == 32
        seen.append(next(train))
    assert all(map(same, seen, expected))
    assert not same(next(data.iterator(CURVATURE)), expected[0])


def test_too_few_examples():
    with pytest.raises(ValueError, match=r"train_data has 20 examples, fewer than TrainerConfig\(batch_size=32\)"):
        ArrayData(ROWS, 32, seed=0)
    with pytest.raises(ValueError, match=r"CurvatureSchedule\(batch_size=24\) is more than the 20 examples"):
        ArrayData(ROWS, 8, seed=0).iterator(CURVATURE, 3)


def test_the_description_tells_data_apart():
    described = lambda arrays, size=8, seed=0: ArrayData(arrays, size, seed).description()
    assert described(ROWS) == described({"x": np.arange(20)})
    others = [
        described({"x": np.arange(20) + 1}),
        described({"x": np.arange(20.0)}),
        described({"y": np.arange(20)}),
        described(ROWS, size=4),
        described(ROWS, seed=1),
    ]
    assert all(other != described(ROWS) for other in others)


# -- grain -------------------------------------------------------------------------------------------------------------


def test_grain_batches_come_as_they_are_and_positions_are_restored():
    source = singles(12).seed(5).shuffle().repeat().batch(4, drop_remainder=True)
    for data in (GrainData(source, 4), GrainData(source.to_iter_dataset(grain.ReadOptions(1, 2)), 4)):
        straight = take(data.iterator(), 8)
        assert all(np.array_equal(batch["x"], source[i]["x"]) for i, batch in enumerate(straight))
        assert same(data.first(), straight[0])
        iterator = data.iterator()
        take(iterator, 3)
        resumed = data.iterator()
        resumed.set_state(iterator.get_state())
        assert all(map(same, take(resumed, 5), straight[3:]))


def test_a_wide_grain_batch_is_several_batches():
    data = GrainData(singles(12).repeat().batch(4, drop_remainder=True), 4)
    wide = next(data.iterator(CURVATURE, 3))
    np.testing.assert_array_equal(wide["x"], rows(take(data.iterator(), 3)))


def test_elements_become_arrays():
    lists = dataset([{"x": [1.0, 2.0], "label": [0, 1]}]).repeat()
    batch = next(GrainData(lists, 2).iterator())
    assert isinstance(batch["x"], np.ndarray)


def test_a_dataset_that_ends_says_what_to_do():
    iterator = GrainData(singles(8).batch(4), 4).iterator()
    take(iterator, 2)
    with pytest.raises(ValueError, match=r"train_data ended before the run did.*dataset\.repeat\(\)\.batch"):
        next(iterator)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (singles(12).batch(3), ValueError, r"batches of 3 examples, but TrainerConfig\(batch_size=4\).*\.batch\(4,"),
        (dataset([]).batch(4), ValueError, "train_data is an empty grain dataset"),
        (dataset([np.zeros(4)]), TypeError, "train_data should yield batches, dicts of arrays, not ndarray"),
        (dataset([{"x": np.zeros(4), "label": np.zeros(3)}]), ValueError, "one length"),
        (singles(12), TypeError, r"train_data\['x'\] should be an array of numbers, a row per example; it is a scalar"),
    ],
    ids=["size", "empty", "not a dict", "unequal", "not batched"],
)
def test_grain_errors(source, error, message):
    with pytest.raises(error, match=message):
        GrainData(source, 4)


def test_two_processes_need_half_a_batch_each():
    assert GrainData(singles(12).repeat().batch(4), 8, shards=2).first()["x"].shape == (4,)
    with pytest.raises(ValueError, match=r"over 2 processes needs 2"):
        GrainData(singles(12).repeat().batch(4), 4, shards=2)


def test_a_grain_run_is_the_same_run_whichever_process_holds_which_rows():
    """Like the sum over processes that each take every second example."""
    order = singles(16).seed(5).shuffle()
    whole = GrainData(order.repeat().batch(8, drop_remainder=True), 8)
    first = [order[i::2].repeat().batch(4, drop_remainder=True)[0] for i in range(2)]
    total = sum(rows_checksum({name: np.asarray(a) for name, a in batch.items()}) for batch in first)
    assert whole.description()["checksum"] == f"{total % 2**32:08x}"
    other = GrainData(order.seed(6).shuffle().repeat().batch(8, drop_remainder=True), 8)
    assert other.description() != whole.description()


def test_positions_of_processes(monkeypatch):
    own, other = {"train": {"next_index": 3}}, {"train": {"next_index": 4}}
    assert own_positions(saved_positions(own)) == own
    monkeypatch.setattr(distributed, "gather", lambda value: [value, other])
    assert saved_positions(other) == other and saved_positions(own) == [own, other]
    with pytest.raises(ValueError, match="positions of train_data on 2 processes, which differ, and this run has 1"):
        own_positions([own, other])
    monkeypatch.setattr("jax.process_count", lambda: 2)
    monkeypatch.setattr("jax.process_index", lambda: 1)
    assert own_positions([own, other]) == other and own_positions(own) == own


def test_processes_that_begin_with_the_same_examples(monkeypatch):
    monkeypatch.setattr(distributed, "gather", lambda value: [(0, value[1]), (1, value[1])])
    with pytest.warns(RuntimeWarning, match=r"same examples on several processes.*jax\.process_index\(\) ::"):
        GrainData(singles(12).repeat().batch(4), 8, shard=0, shards=2)


def test_make_train_data():
    assert isinstance(make_train_data(examples(), 16, 0), ArrayData)
    assert isinstance(make_train_data(singles(8).repeat().batch(4), 4, 0), GrainData)
    with pytest.raises(TypeError, match=r"train_data should be a dict of numpy arrays or a grain dataset.*not list"):
        make_train_data([1, 2], 4, 0)


# -- nested batches ----------------------------------------------------------------------------------------------------


def pair_of_images(n):
    """Two images and a label, the images in a dict of their own."""
    left = np.arange(n, dtype=np.float32)
    return {"image": {"left": left, "deep": {"right": 2 * left}}, "label": np.arange(n) % 3}


def flat(batch):
    return {"left": batch["image"]["left"], "right": batch["image"]["deep"]["right"], "label": batch["label"]}


def test_a_nested_batch_is_shuffled_like_a_flat_one():
    nested, plain = ArrayData(pair_of_images(20), 8, seed=1), ArrayData(flat(pair_of_images(20)), 8, seed=1)
    for ours, theirs in zip(take(nested.iterator(), 6), take(plain.iterator(), 6), strict=True):
        assert same(flat(ours), theirs)
    share = next(ArrayData(pair_of_images(20), 8, 1, shard=1, shards=2).iterator())
    assert same(flat(share), {name: a[4:] for name, a in next(plain.iterator()).items()})


def test_nested_batches_of_grain():
    elements = [map_arrays(lambda a, i=i: a[i], pair_of_images(12)) for i in range(12)]
    source = dataset(elements).repeat().batch(4, drop_remainder=True)
    data = GrainData(source, 4)
    first, second = take(data.iterator(), 2)
    np.testing.assert_array_equal(first["image"]["deep"]["right"], [0, 2, 4, 6])
    np.testing.assert_array_equal(second["image"]["left"], [4, 5, 6, 7])
    wide = next(data.iterator(CURVATURE, 2))
    assert wide["image"]["left"].shape == (8,)
    assert data.description() != GrainData(dataset(elements).seed(1).shuffle().repeat().batch(4), 4).description()


@pytest.mark.parametrize("kind", ["arrays", "grain"])
def test_nested_batches_are_evaluated(kind):
    arrays = pair_of_images(11)
    elements = [map_arrays(lambda a, i=i: a[i], arrays) for i in range(11)]
    batches = list(eval_batches(arrays if kind == "arrays" else dataset(elements).batch(3), 4))
    assert [real.sum() for _, real in batches] == [4, 4, 3] and set(batches[0][0]["image"]) == {"left", "deep"}
    right = np.concatenate([batch["image"]["deep"]["right"][real] for batch, real in batches])
    np.testing.assert_array_equal(right, arrays["image"]["deep"]["right"])


def test_fingerprints_of_nested_batches():
    batch = pair_of_images(4)
    assert checksum(batch) == checksum(dict(reversed(batch.items())))
    moved = {"image": {"left": batch["image"]["deep"]["right"], "deep": {"right": batch["image"]["left"]}}}
    assert len({checksum(batch), checksum({**batch, **moved}), checksum(flat(batch))}) == 3
    swapped = map_arrays(lambda a: a[::-1], batch)
    assert rows_checksum(batch) == rows_checksum(swapped) and checksum(batch) != checksum(swapped)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"image": {"left": 3.0}},
            TypeError,
            r"train_data\['image/left'\] should be an array of numb.*it is a scalar",
        ),
        ({"image": {"left": ["a"] * 4}}, TypeError, r"train_data\['image/left'\].*of type <U1"),
        (
            {"image": {"left": np.zeros(3)}},
            ValueError,
            r"The arrays of train_data should have one length.*'image/left': 3, 'label': 4",
        ),
        ({"image": {}, "label": {}}, ValueError, r"train_data has no examples"),
    ],
    ids=["scalar", "text", "unequal", "nothing"],
)
def test_errors_name_paths(change, error, message):
    with pytest.raises(error, match=message):
        check_arrays("train_data", pair_of_images(4) | change)


# -- evaluation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 7, 8, 9, 20])
@pytest.mark.parametrize("kind", ["arrays", "grain", "grain in other pieces"])
def test_every_example_is_evaluated_once(kind, n):
    arrays = {"x": np.arange(n, dtype=np.float32), "label": np.arange(n) % 3}
    pieces = {"arrays": None, "grain": 8, "grain in other pieces": 3}[kind]
    data = arrays if pieces is None else singles(n).batch(pieces)
    batches = list(eval_batches(data, 8))
    assert len(batches) == -(-n // 8)
    assert all(len(batch["x"]) == len(real) == 8 for batch, real in batches)
    taken = [{name: a[real] for name, a in batch.items()} for batch, real in batches]
    assert np.array_equal(rows(taken), arrays["x"])
    assert np.array_equal(np.concatenate([batch["label"] for batch in taken]), arrays["label"])
    # padding repeats the data: finite, with valid labels
    assert np.all(np.isin(rows([batch for batch, _ in batches]), arrays["x"]))


@pytest.mark.parametrize("name", ["mask", "weights"])
@pytest.mark.parametrize("values", [np.array([1, 0, 1], bool), np.array([[1, 2], [1, 0], [0, 3]]), np.ones((3, 2, 2))])
def test_entries_of_the_data_keep_their_names_and_values(name, values):
    """What is real is said beside a batch: `mask` may be what is to be predicted."""
    ((batch, real),) = eval_batches({"x": np.arange(3), name: values}, 4)
    assert set(batch) == {"x", name} and batch[name].dtype == values.dtype
    assert np.array_equal(batch[name], np.concatenate([values, values[-1:]]))
    assert np.array_equal(real, [True, True, True, False])


def test_eval_errors():
    with pytest.raises(
        TypeError, match="eval_data should be a dict of numpy arrays or a finite grain dataset, not int"
    ):
        next(eval_batches(3, 8))
    with pytest.raises(TypeError, match="eval_data should yield batches, dicts of arrays, not ndarray"):
        next(eval_batches(dataset([np.zeros(4)]), 8))
    with pytest.raises(ValueError, match="mine has no examples"):
        next(eval_batches({"x": np.zeros((0, 2))}, 8, "mine"))
    assert list(eval_batches(dataset([]).batch(4), 8)) == []


# -- checks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arrays", "error", "message"),
    [
        ({}, ValueError, "train_data is an empty dict; it should hold arrays such as"),
        ({"x": np.zeros(4), "label": np.zeros(3)}, ValueError, "should have one length.*{'x': 4, 'label': 3}"),
        ({"x": np.zeros((0, 3))}, ValueError, "train_data has no examples"),
        ({"x": [[1, 2], [3]]}, TypeError, r"train_data\['x'\] should be an array of numbers.*it is ragged"),
        ({"x": np.array([[1, 2], [3]], object)}, TypeError, r"train_data\['x'\].*of type object \(ragged"),
        ({"x": ["a", "b"]}, TypeError, r"train_data\['x'\].*of type <U1 \(ragged, or not numbers\)"),
        ({"x": 3.0}, TypeError, r"train_data\['x'\].*it is a scalar"),
    ],
    ids=["nothing", "unequal", "no rows", "ragged lists", "ragged objects", "text", "scalar"],
)
def test_check_arrays(arrays, error, message):
    with pytest.raises(error, match=message):
        check_arrays("train_data", arrays)


def test_checked_arrays_are_arrays():
    checked = check_arrays("train_data", {"x": [[1.0, 2.0]], "flag": [True]})
    assert checked["x"].shape == (1, 2) and checked["flag"].dtype == bool


def test_checksum():
    batch = {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "label": np.arange(2)}
    assert checksum(batch) == checksum(dict(reversed(batch.items())))  # not of the order of the names
    assert checksum(batch) == checksum({**batch, "x": np.asfortranarray(batch["x"])})
    changes = [{"x": batch["x"] + 1}, {"x": batch["x"].reshape(3, 2)}, {"x": batch["x"].astype(np.int32)}]
    assert len({checksum(batch), *(checksum({**batch, **change}) for change in changes)}) == 4
