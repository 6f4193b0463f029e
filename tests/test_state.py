"""A checkpoint holds all that decides what comes next, or says by name what it would lose."""

import enum
import functools
import math
import random
import threading
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from tiny import randn

from lab.checkpoints import Checkpoints, TrainingLog
from lab.process import ExperimentError
from lab.state import Packing, put_back


class Holder:
    """What a trainer is here: an object with attributes."""

    def __init__(self, **attributes):
        vars(self).update(attributes)


class Through:
    """State that goes through Checkpoints and a disk, into an object made anew."""

    def __init__(self, folder: Path):
        self.folder, self.step = folder, 0

    def files(self, stopped: object) -> tuple[dict, dict]:
        """(tensors, JSON) of a Packing, as a later process reads them."""
        packed = Packing(stopped, "training")
        self.step += 1
        checkpoints, path = Checkpoints(self.folder / "kept", {}), self.folder / f"log_{self.step}"
        log = TrainingLog(path, "run", {})
        log([{"layer": 1, "step": self.step}])
        checkpoints.save(self.step, packed.tensors, {"packed": packed.json}, log)
        tensors, state = checkpoints.read(TrainingLog(path, "run", {}))
        return tensors, state["packed"]

    def put(self, fresh: object, stopped: object) -> object:
        tensors, held = self.files(stopped)
        return put_back(fresh, held, tensors)

    def pair(self, make: Callable[[], object], change: Callable[[object], None]) -> tuple:
        """`make()` with a `change`, and a second `make()` that was given the state of that."""
        stopped, fresh = make(), make()
        change(stopped)
        assert self.put(fresh, stopped) is fresh, "in place"
        return stopped, fresh

    def attribute(self, value: object, before: object = None) -> object:
        """What `value` comes back as, where a fresh owner has `before`."""
        return self.put(Holder(x=before), Holder(x=value)).x


@pytest.fixture
def through(tmp_path) -> Through:
    return Through(tmp_path)


def same(a: object, b: object) -> bool:
    """Equal, of one type, all the way down."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray | np.generic):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple | deque):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


# ── Plain values and what holds them ────────────────────────────────────────────────────────────

VALUES = {
    "a number": 3,
    "a huge number": 2**80 + 1,
    "a fraction": 0.1 + 0.2,
    "infinity": -math.inf,
    "yes": True,
    "nothing": None,
    "text": 'ä "quoted"\n',
    "a list": [1, [2.5, None], "three"],
    "a tuple": (1, (2.5, None), "three"),
    "a set": {1, 5, 3},
    "an empty one of each": [[], (), set(), {}, deque()],
    "a dictionary": {"z": 1, "a": {"c": [1, (2,)]}},
    "keys that JSON has not": {3: "three", None: "none", True: "true", 2.5: "half"},
    "a number and its text as keys": {3: "number", "3": "text"},
    "a state of random": random.Random(3).getstate(),
}


@pytest.mark.parametrize("what", VALUES)
def test_plain_values_come_back_equal_and_of_the_same_type(what, through):
    assert same(through.attribute(VALUES[what]), VALUES[what])
    assert same(through.attribute(VALUES[what], before="something else"), VALUES[what])


def test_keys_come_back_in_their_types_and_order(through):
    keys = VALUES["keys that JSON has not"]
    found = through.attribute(keys)
    assert list(map(type, found)) == list(map(type, keys)) and list(found) == list(keys)


def test_not_a_number_comes_back_as_such(through):
    assert math.isnan(through.attribute(math.nan))
    assert through.attribute(torch.tensor([math.nan, 1.0])).isnan().tolist() == [True, False]


def test_an_attribute_made_on_the_way_comes_back_and_one_that_was_none_too(through):
    def change(holder):
        holder.later, holder.best, holder.mean = [1, torch.ones(2)], 0.5, torch.ones(3)

    stopped, fresh = through.pair(lambda: Holder(best=None, mean=None), change)
    assert same(vars(fresh), vars(stopped))


def test_a_list_that_grew_and_one_that_shrank_come_back_as_they_were(through):
    def change(holder):
        holder.longer += [3.0, torch.ones(1)]
        del holder.shorter[1:]

    def make():
        return Holder(longer=[1.0], shorter=[torch.zeros(2), 5, 6])

    stopped, fresh = through.pair(make, change)
    assert same(vars(fresh), vars(stopped))
    assert (len(fresh.longer), len(fresh.shorter)) == (3, 1)


def test_a_deque_keeps_its_limit(through):
    def make():
        return Holder(recent=deque([1.0], maxlen=3))

    _, fresh = through.pair(make, lambda holder: holder.recent.extend([2, 3, torch.ones(1)]))
    assert list(fresh.recent) == [2, 3, torch.ones(1)]
    fresh.recent.append(5)
    assert list(fresh.recent) == [3, torch.ones(1), 5]


def test_dictionaries_stay_of_the_kind_that_their_owner_made(through):
    def make():
        return Holder(
            counts=Counter(), lists=defaultdict(list), order=OrderedDict(z=1), gone={"old": 1}
        )

    def change(holder):
        holder.counts.update("abba")
        holder.lists["x"] += [1, 2]
        holder.order["a"] = 2
        holder.order.move_to_end("z")
        holder.gone.clear()

    stopped, fresh = through.pair(make, change)
    assert same(vars(fresh), vars(stopped))
    assert fresh.lists["new"] == [], "with its factory"
    assert list(fresh.order) == ["a", "z"] and fresh.gone == {}


class Units(NamedTuple):
    scale: float
    b_dec: torch.Tensor


def test_a_named_tuple_keeps_its_names(through):
    def change(holder):
        holder.units = [Units(2.0, torch.ones(2))]

    stopped, fresh = through.pair(lambda: Holder(units=[Units(1.0, torch.zeros(2))]), change)
    assert same(fresh.units, stopped.units) and fresh.units[0].scale == 2.0


@dataclass(frozen=True)
class Frozen:
    name: str
    weights: torch.Tensor
    more: tuple = ()


def test_a_frozen_dataclass_is_replaced_and_not_changed(through):
    start, end = Frozen("old", torch.zeros(2)), Frozen("new", torch.ones(2), (1, "x"))
    found = through.attribute(end, before=start)
    assert type(found) is Frozen
    assert same(vars(found), vars(end))
    assert (start.name, start.more) == ("old", ()) and start.weights.tolist() == [0, 0]


def test_objects_of_ones_own_come_back_with_all_that_hangs_on_them(through):
    def make():
        inner = Holder(steps=0, norm_S=torch.zeros(2), ring=None)
        outer = Holder(inner=inner, several=[Holder(v=1), SimpleNamespace(v=torch.zeros(1))])
        inner.ring = outer  # they may know each other
        return outer

    def change(outer):
        outer.inner.steps, outer.inner.norm_S, outer.several[0].v = 7, torch.ones(2), [3]
        outer.several[1].v = torch.ones(4)

    stopped, fresh = through.pair(make, change)
    assert fresh.inner.ring is fresh
    assert (fresh.inner.steps, fresh.inner.norm_S.tolist()) == (7, [1, 1])
    assert fresh.several[0].v == [3] and same(fresh.several[1].v, stopped.several[1].v)


@dataclass
class Controller:
    gain: float
    history: list = field(default_factory=list)


def test_a_dataclass_that_may_change_comes_back_in_place(through):
    def change(holder):
        holder.controller.gain, holder.controller.history = 0.5, [torch.ones(1)]

    stopped, fresh = through.pair(lambda: Holder(controller=Controller(0.1)), change)
    assert same(vars(fresh.controller), vars(stopped.controller))


# ── Numbers in arrays ───────────────────────────────────────────────────────────────────────────

DTYPES = [f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)]
DTYPES += ["bool", "float16", "float32", "float64"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 2), (0,), (5,)])
def test_an_array_comes_back_in_its_dtype(dtype, shape, through):
    values = np.random.default_rng(0).integers(0, 100, shape).astype(dtype)
    assert same(through.attribute(values), values)
    assert same(through.attribute([values, {"a": values + values}])[1]["a"], values + values)


@pytest.mark.parametrize(
    "value", [np.float32(0.1), np.float16(0.1), np.int64(3), np.uint8(7), np.bool_(True)]
)
def test_a_scalar_of_numpy_comes_back_in_its_dtype(value, through):
    assert same(through.attribute(value), value)


def test_the_float_of_numpy_that_is_pythons_float_comes_back_as_that(through):
    assert same(through.attribute(np.float64(0.1)), 0.1)


def test_an_array_in_any_layout_comes_back_with_its_own_numbers(through):
    """Each is copied to be held, and the copies may come to lie in the same place."""
    a, b = (np.random.default_rng(seed).random((300, 200)) for seed in (0, 1))
    arrays = {"turned": a.T, "part": a[::2, ::3], "fortran": np.asfortranarray(b)}
    arrays |= {str(i): (a + i).T for i in range(10)}
    found = through.attribute(arrays)
    for name, array in arrays.items():
        assert np.array_equal(found[name], array), name


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int64, torch.bfloat16, torch.float16, torch.float64]
)
def test_a_tensor_comes_back_in_its_dtype_and_shape(dtype, through):
    value = (10 * randn(4, 3)).to(dtype)
    assert same(through.attribute(value), value)
    assert same(through.attribute(value, before=torch.zeros(2)), value), "the fresh one has no room"
    assert same(through.attribute(value.T), value.T)
    assert same(through.attribute(value[1, 2]), value[1, 2])
    assert same(through.attribute(value[:0]), value[:0])


# ── Tensors that are, or share, each other ──────────────────────────────────────────────────────


def test_what_points_at_parameters_still_points_at_them(through):
    """An average's, an optimiser's, a plain list's: all follow the model."""

    def make():
        model = torch.nn.Linear(3, 2)
        return Holder(model=model, tracked=[model.weight, model.bias], first={"w": model.weight})

    def change(holder):
        with torch.no_grad():
            holder.model.weight.fill_(7.0)
            holder.model.bias.fill_(3.0)

    stopped, fresh = through.pair(make, change)
    assert fresh.tracked[0] is fresh.model.weight is fresh.first["w"]
    assert fresh.tracked[1] is fresh.model.bias
    assert torch.equal(fresh.model.weight, stopped.model.weight)
    assert isinstance(fresh.model.weight, torch.nn.Parameter) and fresh.model.weight.requires_grad
    packed = Packing(stopped, "training")
    assert len(packed.tensors) == 2, "each is held once"


def test_tensors_that_share_storage_come_back_sharing_it(through):
    def make():
        whole = torch.zeros(4, 3)
        return Holder(row=whole[1], whole=whole, turned=whole.T, tail=whole[2:])

    def change(holder):
        holder.whole.copy_(torch.arange(12.0).view(4, 3))

    stopped, fresh = through.pair(make, change)
    assert same(vars(fresh), vars(stopped))
    fresh.whole.fill_(5)
    for view in (fresh.row, fresh.turned, fresh.tail):
        assert (view == 5).all()


def test_views_made_on_the_way_have_their_own_numbers(through):
    whole = torch.arange(12.0).view(4, 3)
    views = [whole[1], whole, whole.T, whole[2:], whole[:, 1], whole.view(-1), whole.view(2, 6)]
    assert same(through.attribute(views), views)


def test_one_tensor_under_two_new_names_comes_back_as_one(through):
    value = torch.ones(3)
    found = through.put(Holder(), Holder(a=value, b=[value]))
    found.a.add_(1)
    assert found.b[0] is found.a


def test_tensors_that_were_one_at_the_start_and_then_two_come_back_as_two(through):
    """`self.before = self.now`, and from then on `self.now = something new`."""

    def make():
        start = torch.zeros(2)
        return Holder(now=start, before=start)

    def change(holder):
        holder.before, holder.now = torch.tensor([1.0, 1.0]), torch.tensor([2.0, 2.0])

    _, fresh = through.pair(make, change)
    assert (fresh.now.tolist(), fresh.before.tolist()) == ([2, 2], [1, 1])


@pytest.mark.parametrize("first", ["model", "kept"])
def test_a_copy_that_began_as_a_parameter_itself_does_not_overwrite_it(first, through):
    def make():
        model = torch.nn.Linear(2, 2)
        both = {"model": model, "kept": model.weight.data}
        return Holder(**{name: both[name] for name in sorted(both, key=lambda n: n != first)})

    def change(holder):
        holder.kept = holder.model.weight.detach() - 1

    stopped, fresh = through.pair(make, change)
    assert torch.equal(fresh.model.weight, stopped.model.weight)
    assert torch.equal(fresh.kept, stopped.kept)


def test_names_that_would_be_one_in_a_file_are_kept_apart(through):
    value = {
        "a.b": torch.zeros(1), "a": {"b": torch.ones(1)}, 1: torch.full((1,), 2.0),
        "1": torch.full((1,), 3.0),
    }  # fmt: skip
    assert same(through.attribute(value), value)


# ── Modules, optimisers, generators ─────────────────────────────────────────────────────────────


class Inner(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("recent", torch.zeros(2), persistent=False)
        self.calls, self.best = 0, math.inf


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.W = torch.nn.Parameter(torch.zeros(2, 2))
        self.inner = torch.nn.ModuleList([Inner(), Inner()])
        self.names, self.counts = ["a"], {"steps": torch.zeros(1)}
        self.register_buffer("missing", None, persistent=False)


def test_of_a_module_everything_comes_back_parameters_buffers_and_attributes(through):
    def change(holder):
        model = holder.model
        model.W.data.fill_(3.0)
        model.names.append("b")
        model.counts["steps"] += 4
        model.missing = torch.ones(3)
        for i, inner in enumerate(model.inner, 1):
            inner.mean, inner.recent = torch.full((2,), float(i)), torch.full((2,), 10.0 * i)
            inner.calls, inner.best = i, 0.5 * i

    stopped, fresh = through.pair(lambda: Holder(model=Model()), change)
    assert fresh.model.W.tolist() == [[3, 3], [3, 3]]
    assert (fresh.model.names, fresh.model.counts["steps"].item()) == (["a", "b"], 4)
    assert fresh.model.missing.tolist() == [1, 1, 1]
    for found, expected in zip(fresh.model.inner, stopped.model.inner, strict=True):
        assert torch.equal(found.mean, expected.mean) and torch.equal(found.recent, expected.recent)
        assert (found.calls, found.best) == (expected.calls, expected.best)
    assert set(fresh.model.state_dict()) == {"W", "inner.0.mean", "inner.1.mean"}
    # They are still the module's own: another device or dtype takes them along.
    assert fresh.model.double().inner[1].recent.dtype == torch.float64


class Trainer:
    """Two groups with rates of their own, a scheduler and an average: what experimenters write."""

    def __init__(self, kind: Callable):
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1)
        )
        groups = [
            {"params": self.model[0].parameters(), "lr": 0.05},
            {"params": self.model[2].parameters(), "lr": 0.01, "name": "last"},
        ]
        self.optimizer = kind(groups)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9)
        self.generator = torch.Generator().manual_seed(3)
        self.average = [p.detach().clone() for p in self.model.parameters()]
        self.losses: deque = deque(maxlen=4)

    def step(self) -> float:
        x = torch.randn(8, 3, generator=self.generator)
        loss = (self.model(x) - x.sum(1, keepdim=True)).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        for average, p in zip(self.average, self.model.parameters(), strict=True):
            average.lerp_(p.detach(), 0.1)
        self.losses.append(loss.item())
        return loss.item()


def adam(groups):
    return torch.optim.Adam(groups, lr=1.0, betas=(0.8, 0.9), fused=True)


def sgd(groups):
    return torch.optim.SGD(groups, lr=1.0, momentum=0.9, nesterov=True)


@pytest.mark.parametrize("kind", [adam, sgd])
@pytest.mark.parametrize("after", [0, 1, 6])
def test_an_optimiser_with_groups_goes_on_to_the_bit(kind, after, through):
    def change(trainer):
        for _ in range(after):
            trainer.step()
        trainer.optimizer.param_groups[1]["weight_decay"] = 0.1

    stopped, fresh = through.pair(lambda: Trainer(kind), change)
    own = (p for group in fresh.optimizer.param_groups for p in group["params"])
    assert all(a is b for a, b in zip(own, fresh.model.parameters(), strict=True))
    assert fresh.optimizer.param_groups[1]["name"] == "last"
    assert [fresh.step() for _ in range(5)] == [stopped.step() for _ in range(5)]
    for a, b in zip(fresh.average, stopped.average, strict=True):
        assert torch.equal(a, b)
    assert same(fresh.losses, stopped.losses) and fresh.losses.maxlen == 4
    for name in ("lr", "initial_lr", "betas", "weight_decay", "momentum"):
        for mine, theirs in zip(
            fresh.optimizer.param_groups, stopped.optimizer.param_groups, strict=True
        ):
            assert mine.get(name) == theirs.get(name), name


def test_whatever_has_a_state_dict_comes_back_by_it(through):
    class Counting:
        __slots__ = ("seen",)

        def __init__(self):
            self.seen = [0, torch.zeros(2)]

        def state_dict(self):
            return {"seen": self.seen}

        def load_state_dict(self, state):
            self.seen = state["seen"]

    def change(holder):
        holder.counting.seen = [5, torch.ones(2)]

    stopped, fresh = through.pair(lambda: Holder(counting=Counting()), change)
    assert same(fresh.counting.seen, stopped.counting.seen)


def test_tensors_that_a_state_dict_makes_anew_have_their_own_numbers(through):
    """They are gone before the next is made, which may then lie in the same place."""

    class Turned:
        def __init__(self, seed: int):
            self.W = randn(300, 200, seed=seed)

        def state_dict(self):
            return {"turned": (self.W + 0).T}

        def load_state_dict(self, state):
            self.W = state["turned"].T

    def change(holder):
        for i, turned in enumerate(holder.several):
            turned.W = randn(300, 200, seed=100 + i)

    stopped, fresh = through.pair(lambda: Holder(several=list(map(Turned, range(10)))), change)
    for found, expected in zip(fresh.several, stopped.several, strict=True):
        assert torch.equal(found.W, expected.W)


def test_a_generator_goes_on_where_it_stood(through):
    stopped, fresh = through.pair(
        lambda: Holder(g=torch.Generator().manual_seed(1), several=[torch.Generator()]),
        lambda holder: [torch.rand(5, generator=g) for g in (holder.g, *holder.several)],
    )
    for a, b in ((fresh.g, stopped.g), (fresh.several[0], stopped.several[0])):
        assert torch.equal(torch.rand(3, generator=a), torch.rand(3, generator=b))


# ── What is refused ─────────────────────────────────────────────────────────────────────────────


class Slots:
    __slots__ = ("a",)


class SlotsAndMore(Slots):
    """Half of what it holds is in no __dict__."""


def closure(y: float) -> Callable:
    return lambda x: x * y


REFUSED = {
    "a generator of Python's random": lambda: random.Random(0),
    "a generator of numpy": lambda: np.random.default_rng(0),
    "an old generator of numpy": lambda: np.random.RandomState(0),
    "a running generator function": lambda: (i for i in range(3)),
    "an iterator": lambda: iter([1, 2]),
    "a lock": threading.Lock,
    "an object with slots": Slots,
    "bytes": lambda: b"x",
    "a complex number": lambda: 1j,
    "a frozen set": lambda: frozenset({1}),
    "a function that holds values": lambda: closure(2.0),
    "a method": lambda: Holder(x=1).__init__,
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("where", ["attribute", "list", "dict", "module"])
def test_what_cannot_be_put_back_is_refused_by_name(what, where):
    value, holder = REFUSED[what](), Holder()
    if where == "attribute":
        holder.odd = value
    elif where == "list":
        holder.odd = [1, value]
    elif where == "dict":
        holder.odd = {"k": value}
    else:
        holder.odd = torch.nn.Sequential(torch.nn.ReLU())
        holder.odd[0].inside = value
    at = {"list": ".1", "dict": ".k", "module": ".0.inside"}.get(where, "")
    with pytest.raises(ExperimentError) as error:
        Packing(holder, "training")
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    assert f"would lose training.odd{at}, a {kind}:" in str(error.value)
    assert "state_dict() and load_state_dict()" in str(error.value), "and says what would do"


def test_an_open_file_is_refused_by_name(tmp_path):
    with (tmp_path / "x").open("w") as file:
        for opened in (file, Holder(deep=file)):
            with pytest.raises(ExperimentError, match=r"training\.log.*TextIOWrapper"):
                Packing(Holder(log=opened), "training")


def test_what_hangs_on_something_is_refused_by_the_whole_way_to_it():
    with pytest.raises(ExperimentError, match=r"training\.deep\.1\.done\._cond\._lock, a _thread"):
        Packing(Holder(deep=[0, Holder(done=threading.Event())]), "training")


@pytest.mark.parametrize("key", [(1, 2), torch.float32, np.int64(3)])
def test_a_dictionary_with_keys_that_cannot_be_put_back_is_refused_by_name(key):
    with pytest.raises(ExperimentError, match=r"the key .* of training\.table"):
        Packing(Holder(table={key: 1}), "training")


def test_what_its_owner_makes_anew_is_left_as_the_owner_made_it(through):
    def make():
        return Holder(
            device=torch.device("cpu"), dtype=torch.bfloat16, kind=torch.nn.Linear, f=torch.relu,
            own=test_an_open_file_is_refused_by_name, x=1,
        )  # fmt: skip

    stopped, fresh = through.pair(make, lambda holder: setattr(holder, "x", 2))
    assert same(vars(fresh), vars(stopped))


# ── Nothing is lost without a word ──────────────────────────────────────────────────────────────


class Mode(enum.Enum):
    SLOW = 1
    FAST = 2


def mixed(a: int) -> SlotsAndMore:
    found = SlotsAndMore()
    found.a = a
    return found


class Curve(list):
    """A list with a name."""

    def __init__(self, *values, name: str = ""):
        super().__init__(values)
        self.name = name


class Table(dict):
    """A dictionary with a name."""

    name = ""


def named_table() -> Table:
    table = Table(a=1)
    table.name = "new"
    return table


def two_objects() -> Holder:
    a, b = Holder(v=1), Holder(v=2)
    return Holder(a=a, b=b, x=a)


def double(x):
    return 2 * x


def triple(x):
    return 3 * x


def freeze(holder: Holder) -> None:
    holder.x.bias.requires_grad_(False)


def give_gradient(holder: Holder) -> None:
    holder.x.bias.grad = torch.ones(2)


def one_list_twice() -> Holder:
    values = [1]
    return Holder(x=values, y=values)


def set_x(value: Callable) -> Callable:
    return lambda holder: setattr(holder, "x", value())


# what: (how it is made, what happens to it before the checkpoint, what is looked at)
CHANGES = {
    "which object an attribute means": (
        two_objects, lambda h: setattr(h, "x", h.b), lambda h: h.x is h.b
    ),
    "a list under two names": (one_list_twice, lambda h: None, lambda h: h.x is h.y),
    "a member of an enum": (
        lambda: Holder(x=Mode.SLOW), set_x(lambda: Mode.FAST), lambda h: h.x is Mode.FAST
    ),
    "slots beside attributes": (
        lambda: Holder(x=mixed(1)), set_x(lambda: mixed(2)), lambda h: h.x.a
    ),
    "a partial function": (
        lambda: Holder(x=functools.partial(max, 1)), set_x(lambda: functools.partial(max, 9)),
        lambda h: h.x(0),
    ),
    "the method of a generator": (
        lambda: Holder(x=random.Random(0).random), lambda h: h.x(), lambda h: h.x()
    ),
    "another function": (lambda: Holder(x=double), set_x(lambda: triple), lambda h: h.x(1)),
    "another function of torch": (
        lambda: Holder(x=torch.relu), set_x(lambda: torch.sigmoid), lambda h: h.x(torch.ones(1))
    ),
    "another dtype": (
        lambda: Holder(x=torch.bfloat16), set_x(lambda: torch.float32), lambda h: h.x
    ),
    "a function where there was none": (
        lambda: Holder(x=None), set_x(lambda: triple), lambda h: h.x(1)
    ),
    "a function in a dictionary": (
        lambda: Holder(x={}), set_x(lambda: {"f": triple}), lambda h: h.x["f"](1)
    ),
    "an object where there was none": (
        lambda: Holder(x=None), set_x(lambda: Holder(v=1)), lambda h: vars(h.x)
    ),
    "an object more in a list": (
        lambda: Holder(x=[]), set_x(lambda: [Holder(v=1)]), lambda h: vars(h.x[0])
    ),
    "a module where there was none": (
        lambda: Holder(x=None), set_x(lambda: torch.nn.Linear(1, 1)), lambda h: h.x.weight
    ),
    "a generator where there was none": (
        lambda: Holder(x=None), set_x(lambda: torch.Generator().manual_seed(3)),
        lambda h: torch.rand(1, generator=h.x),
    ),
    "a frozen dataclass where there was none": (
        lambda: Holder(x=None), set_x(lambda: Frozen("new", torch.ones(1))), lambda h: h.x.name
    ),
    "a deque where there was none": (
        lambda: Holder(x=None), set_x(lambda: deque([1], maxlen=2)), lambda h: h.x.maxlen
    ),
    "a counter where there was none": (
        lambda: Holder(x=None), set_x(lambda: Counter("abba")), lambda h: (h.x["a"], h.x["c"])
    ),
    "a named tuple where there was none": (
        lambda: Holder(x=None), set_x(lambda: Units(2.0, torch.ones(1))), lambda h: h.x.scale
    ),
    "a list of a kind of its own": (
        lambda: Holder(x=Curve()), set_x(lambda: Curve(1, name="new")),
        lambda h: (list(h.x), h.x.name),
    ),
    "a dictionary of a kind of its own": (
        lambda: Holder(x=Table()), set_x(named_table), lambda h: (dict(h.x), h.x.name)
    ),
    "an array of text": (
        lambda: Holder(x=None), set_x(lambda: np.array(["a", "bc"])), lambda h: h.x.tolist()
    ),
    "an array of objects": (
        lambda: Holder(x=None), set_x(lambda: np.array([{}, 1], object)), lambda h: h.x.tolist()
    ),
    "an array of times": (
        lambda: Holder(x=None), set_x(lambda: np.zeros(2, "datetime64[s]")), lambda h: h.x.tolist()
    ),
    "a sparse tensor": (
        lambda: Holder(x=None), set_x(lambda: torch.eye(2).to_sparse()), lambda h: h.x.to_dense()
    ),
    "a parameter that was frozen": (
        lambda: Holder(x=torch.nn.Linear(2, 2)), freeze, lambda h: h.x.bias.requires_grad
    ),
    "a gradient that is being summed up": (
        lambda: Holder(x=torch.nn.Linear(2, 2)), give_gradient, lambda h: h.x.bias.grad
    ),
    "a module that was put into evaluation": (
        lambda: Holder(x=torch.nn.Dropout()), lambda h: h.x.eval(), lambda h: h.x.training
    ),
    "an attribute that was taken away": (
        lambda: Holder(x=1), lambda h: delattr(h, "x"), lambda h: hasattr(h, "x")
    ),
    "a tensor that repeats one number": (
        lambda: Holder(x=torch.zeros(1).expand(3)), set_x(lambda: torch.arange(3.0)), lambda h: h.x
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_what_changed_comes_back_or_is_refused_by_name(what, through):
    make, change, look = CHANGES[what]
    stopped, fresh = make(), make()
    change(stopped)
    try:
        through.put(fresh, stopped)
    except ExperimentError as error:
        assert "training.x" in str(error), "by name"
    else:
        found, expected = look(fresh), look(stopped)
        if isinstance(expected, torch.Tensor):
            found = found if found is not None else torch.empty(0)
            assert torch.equal(found, expected)
        else:
            assert found == expected


# ── What a checkpoint of another object is ──────────────────────────────────────────────────────


def test_state_that_lacks_a_tensor_is_an_error_and_not_a_default(through):
    tensors, held = through.files(Holder(x=torch.ones(2), y=torch.ones(3)))
    tensors.pop("training.y")
    with pytest.raises(LookupError):
        put_back(Holder(x=None, y=None), held, tensors)
