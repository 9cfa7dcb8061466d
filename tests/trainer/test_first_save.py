"""What keeps a run from being saved is found as it begins; what checkpoints remember beside arrays comes back alike."""

import enum
import json

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from test_checkpoint import DAMAGE
from tiny import Noisy, assert_trees_equal, examples, losses_of, trainer

from curvtrain.trainer import Call, CheckpointError, Hook, read_jsonl
from curvtrain.trainer.disk.plain import from_plain, to_plain

pytestmark = [
    pytest.mark.usefixtures("quick_compile"),
    # orbax leaves coroutines behind whose read of a damaged file failed: that they are collected is no concern here
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


class Remembers(Hook):
    """A hook with any memory, which says at which steps it was called."""

    def __init__(self, memory):
        self.memory, self.steps, self.found = memory, [], None

    def __call__(self, run):
        self.steps.append(run.step)

    def state_dict(self):
        return self.memory

    def load_state_dict(self, state):
        self.found = state


# -- the first save ----------------------------------------------------------------------------------------------------


def test_a_disk_that_is_full_from_the_beginning(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    hook = Remembers({})
    with monkeypatch.context() as patch:
        patch.setattr(ocp.StandardCheckpointHandler, "async_save", refuse)
        run = trainer(workdir=tmp_path, save_every=2, hooks=[hook])
        message = (
            r"TrainerConfig\(workdir=.*first save, tried before training begins, failed: .*No space left.*Make room"
        )
        with pytest.raises(CheckpointError, match=message):
            run.fit()
        assert hook.steps == [] and not any(run._plan.programs.is_compiled(kind) for kind in run._plan.programs.kinds)
        assert not list(tmp_path.glob("*tmp*")) and not list(tmp_path.glob("[0-9]*"))
    assert run.fit().step == 4 and hook.steps == [1, 2, 3, 4]
    with monkeypatch.context() as patch:
        patch.setattr(ocp.StandardCheckpointHandler, "async_save", refuse)
        assert trainer(workdir=tmp_path, steps=4).fit().step == 4  # it is finished: there is nothing to be saved
        with pytest.raises(CheckpointError, match="first save"):
            trainer(workdir=tmp_path, steps=5).fit()
    assert sorted(path.name for path in tmp_path.glob("[0-9]*")) == ["2", "4"]


def test_it_leaves_nothing_behind(tmp_path):
    seen = []
    look = Call(lambda run: seen.append(sorted(path.name for path in tmp_path.iterdir() if path.name != "compiled")))
    trainer(workdir=tmp_path, save_every=3, hooks=[look]).fit()
    assert seen[0] == [".lock", "metrics.jsonl"]


# -- memories ----------------------------------------------------------------------------------------------------------


class Odd(enum.IntEnum):
    one = 1


VALUES = {
    "numbers": {"a": 1, "b": -2.5, "c": None, "d": True, "e": "text", "f": float("inf")},
    "NumPy's": {
        "a": np.int64(5),
        "b": np.float32(0.1),
        "c": np.bool_(True),
        "d": np.uint32(2**32 - 1),
        "e": np.str_("x"),
    },
    "arrays": [np.arange(6).reshape(2, 3), np.array(2.5), np.zeros((0, 2), np.float16), np.array([1 + 2j])],
    "containers": {"tuple": (1, [2, (3,)]), "by number": {1: "a", np.int32(2): "b"}, "bytes": b"\x00\xff"},
    "the mark itself": {"__curvtrain__": "array", "x": 1},
    "grain's": {"next_index": 7, "iterators_in_use_states": [None, {"i": np.int64(3)}]},
}


@pytest.mark.parametrize("name", VALUES)
def test_memories_come_back_alike(name):
    value = VALUES[name]
    back = from_plain(json.loads(json.dumps(to_plain(value, name))))
    assert jax.tree.structure(back, is_leaf=lambda x: x is None) == jax.tree.structure(
        value, is_leaf=lambda x: x is None
    )
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(value), strict=True):
        assert type(a) is type(b) and getattr(a, "dtype", None) == getattr(b, "dtype", None)
        np.testing.assert_array_equal(a, b)


def test_arrays_of_jax_come_back_as_numpy_s_and_enums_as_numbers():
    back = from_plain(to_plain({"a": jnp.arange(3), "b": Odd.one}, "x"))
    assert type(back["a"]) is np.ndarray and back["a"].tolist() == [0, 1, 2] and back["b"] == 1


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        (
            {"a": [1, {"b": {1, 2}}]},
            r"Remembers\.state_dict\(\)\['a'\]\[1\]\['b'\] is \{1, 2\} of type set, which does not",
        ),
        ({"key": jax.random.key(0)}, r"Remembers\.state_dict\(\)\['key'\] is a random key.*keep its seed"),
        ({"a": np.array([object()])}, r"state_dict\(\)\['a'\] is .* of type ndarray"),
    ],
)
def test_a_memory_that_cannot_be_saved_is_told_before_the_first_step(memory, message, tmp_path):
    hook = Remembers(memory)
    with pytest.raises(TypeError, match=message):
        trainer(workdir=tmp_path, save_every=100, hooks=[hook]).fit()
    assert hook.steps == []


def test_a_hook_s_memory_of_arrays_is_restored(tmp_path):
    hook = Remembers({"best": np.float32(0.25), "history": np.arange(3.0)})
    trainer(workdir=tmp_path, hooks=[hook]).fit()
    again = Remembers({})
    trainer(workdir=tmp_path, steps=6, hooks=[again]).fit()
    assert type(again.found["best"]) is np.float32 and again.found["history"].tolist() == [0, 1, 2]


class Drawing(grain.DatasetIterator):
    """Batches in an order drawn at random; its position is a number of NumPy's, an array and a tuple."""

    def __init__(self, rows):
        super().__init__()
        self._rows, self._next, self._order = rows, np.int64(0), np.random.default_rng(0).permutation(4)

    def __next__(self):
        at = slice(16 * self._order[self._next % 4], 16 * self._order[self._next % 4] + 16)
        self._next += 1
        return {name: array[at] for name, array in self._rows.items()}

    def get_state(self):
        return {"next": self._next, "order": self._order, "pair": (1, np.int32(2))}

    def set_state(self, state):
        assert isinstance(state["next"], np.int64) and isinstance(state["order"], np.ndarray)
        assert state["pair"] == (1, 2) and isinstance(state["pair"], tuple)
        self._next, self._order = state["next"], state["order"]


class Drawn(grain.IterDataset):
    def __iter__(self):
        return Drawing(examples())


def test_positions_with_numbers_of_numpy_s(tmp_path):
    make = lambda steps, folder=None: trainer(train_data=Drawn(), steps=steps, workdir=folder, log_every=1)
    whole = losses_of(make(7).fit())
    first, second = losses_of(make(3, tmp_path).fit()), losses_of(make(7, tmp_path).fit())
    assert [*first.tolist(), *second.tolist()] == whole.tolist()


# -- damage ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage",
    ["no manifest", "truncated arrays", "no array metadata", "no metadata", "truncated metadata", "empty folder"],
)
def test_a_damaged_newest_checkpoint_costs_its_steps_and_nothing_else(damage, tmp_path):
    """The run goes on from the one before, loudly, and ends as if nothing had been damaged, to the last bit."""
    options = dict(model=Noisy, optimizer=optax.adam(1e-2), ema=0.9, save_every=2, log_every=1)
    options |= dict(eval_data=examples(20), eval_every=2)
    whole = trainer(steps=9, workdir=tmp_path / "whole", **options)
    whole.fit()
    trainer(steps=6, workdir=tmp_path / "parts", **options).fit()
    DAMAGE[damage](tmp_path / "parts" / "6")
    again = trainer(steps=9, workdir=tmp_path / "parts", **options)
    with pytest.warns(RuntimeWarning, match=r"Checkpoint 6 in .* is damaged; going on from checkpoint 4\."):
        again.fit()
    assert_trees_equal(rest(again.state), rest(whole.state))
    assert (tmp_path / "parts" / "damaged-6").is_dir()
    rows = [
        [{name: value for name, value in row.items() if name != "steps_per_second"} for row in read_jsonl(path)]
        for path in (tmp_path / "whole" / "metrics.jsonl", tmp_path / "parts" / "metrics.jsonl")
    ]
    assert rows[0] == rows[1]


def rest(state):
    """Every array of a state, random keys as numbers."""
    plain = lambda a: jax.random.key_data(a) if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else a
    return jax.device_get(jax.tree.map(plain, state))
