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

from lab.checkpoints import Checkpoints
from lab.process import ExperimentError
from lab.state import check_kept
from lab.training_log import TrainingLog


class Holder:
    """What a trainer is here: an object with attributes."""

    def __init__(self, **attributes):
        vars(self).update(attributes)


@pytest.fixture
def again(tmp_path) -> Callable:
    """again(value): what it comes back as, through Checkpoints and a disk."""
    step = 0

    def through_disk(value: object) -> object:
        nonlocal step
        step += 1
        checkpoints, path = Checkpoints(tmp_path / "kept", {}), tmp_path / f"log_{step}"
        log = TrainingLog(path, "run", {})
        log([{"layer": 1, "step": step}])
        checkpoints.save(step, {"trainers": [value]}, log)
        state = checkpoints.read(TrainingLog(path, "run", {}))
        assert state["step"] == step
        (found,) = state["trainers"]
        return found

    return through_disk


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
    "bytes": b"\x00\xff",
    "a complex number": 1 + 2j,
    "a list": [1, [2.5, None], "three"],
    "a tuple": (1, (2.5, None), "three"),
    "a set": {1, 5, 3},
    "a frozen set": frozenset({1, 5, 3}),
    "an empty one of each": [[], (), set(), {}, deque()],
    "a dictionary": {"z": 1, "a": {"c": [1, (2,)]}},
    "keys of any kind": {3: "three", None: "none", True: "true", 2.5: "half", (1, 2): "pair"},
    "a number and its text as keys": {3: "number", "3": "text"},
    "a state of random": random.Random(3).getstate(),
    "a counter": Counter("abba"),
    "an order": OrderedDict(z=1, a=2),
    "what torch calls a size": torch.Size([1, 2]),
    "a dtype": torch.bfloat16,
    "a device": torch.device("cpu"),
    "a path": Path("a/b"),
}


@pytest.mark.parametrize("what", VALUES)
def test_plain_values_come_back_equal_and_of_the_same_type(what, again):
    assert same(again(VALUES[what]), VALUES[what])
    assert same(again(Holder(x=[VALUES[what]])).x, [VALUES[what]])


def test_keys_come_back_in_their_types_and_order(again):
    keys = VALUES["keys of any kind"]
    found = again(keys)
    assert list(map(type, found)) == list(map(type, keys)) and list(found) == list(keys)


def test_not_a_number_comes_back_as_such(again):
    assert math.isnan(again(math.nan))
    assert again(torch.tensor([math.nan, 1.0])).isnan().tolist() == [True, False]


def test_a_deque_keeps_its_limit(again):
    found = again(deque([2, 3, torch.ones(1)], maxlen=3))
    assert list(found) == [2, 3, torch.ones(1)]
    found.append(5)
    assert list(found) == [3, torch.ones(1), 5]


def test_a_dictionary_keeps_its_factory_and_a_counter_counts_on(again):
    lists = defaultdict(list, x=[1, 2])
    found = again(lists)
    assert same(found, lists) and found["new"] == []
    assert again(Counter("abba"))["c"] == 0


class Units(NamedTuple):
    scale: float
    b_dec: torch.Tensor


@dataclass(frozen=True)
class Frozen:
    name: str
    weights: torch.Tensor
    more: tuple = ()
    steps: int = field(default=0, init=False)


@dataclass
class Controller:
    gain: float
    history: list = field(default_factory=list)


class Mode(enum.Enum):
    SLOW = 1
    FAST = 2


def test_named_tuples_dataclasses_and_members_of_enums_come_back(again):
    found = again([Units(2.0, torch.ones(2)), Frozen("a", torch.ones(2), (1,)), Mode.FAST])
    assert type(found[0]) is Units and same(tuple(found[0]), (2.0, torch.ones(2)))
    assert type(found[1]) is Frozen and same(vars(found[1]), vars(Frozen("a", torch.ones(2), (1,))))
    assert found[2] is Mode.FAST
    controller = again(Controller(0.5, [torch.ones(1)]))
    assert type(controller) is Controller and same(controller.history, [torch.ones(1)])


class Curve(list):
    """A list with a name."""

    name = ""


class Table(dict):
    """A dictionary with a name."""

    name = ""


class Slots:
    __slots__ = ("a",)


class SlotsAndMore(Slots):
    """Half of what it holds is in no __dict__."""


def test_objects_of_ones_own_come_back_with_all_that_hangs_on_them(again):
    curve, table, slots = Curve([1, 2]), Table(x=1), SlotsAndMore()
    curve.name, table.name, slots.a, slots.b = "curve", "table", 3, 4
    outer = Holder(steps=7, parts=[SimpleNamespace(v=torch.ones(1)), curve, table, slots])
    outer.inner = Holder(ring=outer)  # they may know each other
    found = again(outer)
    assert found.inner.ring is found
    assert found.steps == 7 and same(found.parts[0].v, torch.ones(1))
    assert (list(found.parts[1]), found.parts[1].name) == ([1, 2], "curve")
    assert (dict(found.parts[2]), found.parts[2].name) == ({"x": 1}, "table")
    assert (found.parts[3].a, found.parts[3].b) == (3, 4)


def double(x):
    return 2 * x


def test_functions_and_classes_are_those_that_were_meant_when_it_was_written(again):
    """Whoever makes the trainer anew might mean others: a warm-up's, say."""
    half = functools.partial(max, 9)
    found = again([double, torch.sigmoid, torch.nn.Linear, math.exp, half, Holder(x=1).__init__])
    assert found[:4] == [double, torch.sigmoid, torch.nn.Linear, math.exp]
    assert found[4](3) == 9 and found[5].__self__.x == 1


# ── Numbers in arrays and tensors ───────────────────────────────────────────────────────────────

DTYPES = [f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)]
DTYPES += ["bool", "float16", "float32", "float64", "complex64", "datetime64[s]"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 2), (0,), (5,), ()])
def test_an_array_comes_back_in_its_dtype(dtype, shape, again):
    values = np.array(np.random.default_rng(0).integers(0, 100, shape)).astype(dtype)
    assert same(again(values), values)


@pytest.mark.parametrize(
    "value",
    [np.float32(0.1), np.float64(0.1), np.int64(3), np.uint8(7), np.bool_(True), np.str_("x")],
)
def test_a_scalar_of_numpy_comes_back_in_its_dtype(value, again):
    assert same(again(value), value)


def test_arrays_of_anything_in_any_layout_come_back(again):
    a = np.random.default_rng(0).random((300, 200))
    arrays = {"turned": a.T, "part": a[::2, ::3], "fortran": np.asfortranarray(a)}
    arrays |= {str(i): (a + i).T for i in range(10)}
    arrays |= {"text": np.array(["a", "bc"]), "objects": np.array([{}, 1], object)}
    assert same(again(arrays), arrays)


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int64, torch.bfloat16, torch.float16, torch.float64]
)
def test_a_tensor_comes_back_in_its_dtype_and_shape(dtype, again):
    value = (10 * randn(4, 3)).to(dtype)
    views = [value, value.T, value[1, 2], value[:0], value[::2], value.view(-1).expand(2, 12)]
    assert same(again(views), views)
    assert same(again(views[-1]), views[-1])


def test_sparse_tensors_and_such_as_gradients_flow_through_come_back(again):
    assert same(again(torch.eye(3).to_sparse()).to_dense(), torch.eye(3))
    leaf = torch.ones(2, requires_grad=True)
    found = again([leaf, (2 * leaf).detach()])
    assert found[0].requires_grad and not found[1].requires_grad


# ── Tensors that are, or share, each other ──────────────────────────────────────────────────────


def test_what_points_at_parameters_still_points_at_them(again):
    """An average's, an optimiser's, a plain list's: all follow the model."""
    model = torch.nn.Linear(3, 2)
    holder = Holder(tracked=[model.weight, model.bias], model=model, first={"w": model.weight})
    found = again(holder)
    assert found.tracked[0] is found.model.weight is found.first["w"]
    assert found.tracked[1] is found.model.bias
    assert torch.equal(found.model.weight, model.weight)
    assert isinstance(found.model.weight, torch.nn.Parameter) and found.model.weight.requires_grad


def test_tensors_that_share_storage_come_back_sharing_it(again):
    whole = torch.arange(12.0).view(4, 3)
    holder = Holder(row=whole[1], whole=whole, turned=whole.T, tail=whole[2:], model=None)
    holder.model = torch.nn.Linear(3, 4)
    holder.kept = holder.model.weight.data
    found = again(holder)
    for name in ("row", "whole", "turned", "tail"):
        assert same(getattr(found, name), getattr(holder, name)), name
    found.whole.fill_(5)
    for view in (found.row, found.turned, found.tail):
        assert (view == 5).all()
    with torch.no_grad():
        found.model.weight.fill_(7)
    assert (found.kept == 7).all()


def test_what_is_two_under_equal_numbers_stays_two(again):
    found = again(Holder(now=torch.ones(2), before=torch.ones(2), a=[1], b=[1]))
    found.now += 1
    found.a.append(2)
    assert found.before.tolist() == [1, 1] and found.b == [1]


def test_what_is_one_under_two_names_stays_one(again):
    values, tensor, inner = [1], torch.ones(2), Holder(v=1)
    found = again([Holder(x=values, t=tensor, i=inner), Holder(x=values, t=tensor, i=inner)])
    for name in ("x", "t", "i"):
        assert getattr(found[0], name) is getattr(found[1], name)


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
        self.frozen = torch.nn.Parameter(torch.zeros(2), requires_grad=False)
        self.inner = torch.nn.ModuleList([Inner(), Inner(), torch.nn.Dropout()])
        self.names, self.counts = ["a"], {"steps": torch.zeros(1)}
        self.register_buffer("missing", None, persistent=False)


def test_of_a_module_everything_comes_back_parameters_buffers_and_attributes(again):
    model = Model()
    model.W.data.fill_(3.0)
    model.names.append("b")
    model.counts["steps"] += 4
    model.missing = torch.ones(3)
    for i, inner in enumerate(model.inner[:2], 1):
        inner.mean, inner.recent = torch.full((2,), float(i)), torch.full((2,), 10.0 * i)
        inner.calls, inner.best = i, 0.5 * i
    model.inner[2].eval()
    found = again(Holder(model=model)).model
    assert found.W.tolist() == [[3, 3], [3, 3]]
    assert found.W.requires_grad and not found.frozen.requires_grad
    assert (found.names, found.counts["steps"].item()) == (["a", "b"], 4)
    assert found.missing.tolist() == [1, 1, 1]
    for mine, theirs in zip(found.inner[:2], model.inner[:2], strict=True):
        assert torch.equal(mine.mean, theirs.mean) and torch.equal(mine.recent, theirs.recent)
        assert (mine.calls, mine.best) == (theirs.calls, theirs.best)
    assert found.training and not found.inner[2].training
    assert set(found.state_dict()) == set(model.state_dict())
    # They are still the module's own: another device or dtype takes them along.
    assert found.double().inner[1].recent.dtype == torch.float64


class Trainer:
    """Two groups with rates of their own, a scheduler and an average: what experimenters write."""

    def __init__(self, kind: Callable):
        torch.manual_seed(0)
        first, last = torch.nn.Linear(3, 4), torch.nn.Linear(4, 1)
        self.model = torch.nn.Sequential(first, torch.nn.ReLU(), last)
        groups = [
            {"params": first.parameters(), "lr": 0.05},
            {"params": last.parameters(), "lr": 0.01, "name": "last"},
        ]
        self.optimizer = kind(groups)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9)
        self.generator = torch.Generator().manual_seed(3)
        self.average = [p.detach().clone() for p in self.model.parameters()]
        self.losses: deque = deque(maxlen=4)
        self.sum_over = 1  # batches of one step

    def step(self) -> float:
        x = torch.randn(8, 3, generator=self.generator)
        loss = (self.model(x) - x.sum(1, keepdim=True)).square().mean()
        if len(self.losses) % self.sum_over == 0:
            self.optimizer.zero_grad()
        loss.backward()
        self.losses.append(loss.item())
        if len(self.losses) % self.sum_over == 0:
            self.optimizer.step()
            self.scheduler.step()
        for average, p in zip(self.average, self.model.parameters(), strict=True):
            average.lerp_(p.detach(), 0.1)
        return loss.item()


def adam(groups):
    return torch.optim.Adam(groups, lr=1.0, betas=(0.8, 0.9), fused=True)


def sgd(groups):
    return torch.optim.SGD(groups, lr=1.0, momentum=0.9, nesterov=True)


@pytest.mark.filterwarnings("ignore:.*lr_scheduler")  # it counts the steps of this process
@pytest.mark.parametrize("kind", [adam, sgd])
@pytest.mark.parametrize("after", [0, 1, 6])
def test_an_optimiser_with_groups_goes_on_to_the_bit(kind, after, again):
    trainer = Trainer(kind)
    for _ in range(after):
        trainer.step()
    trainer.optimizer.param_groups[1]["weight_decay"] = 0.1
    found = again(trainer)
    own = (p for group in found.optimizer.param_groups for p in group["params"])
    assert all(a is b for a, b in zip(own, found.model.parameters(), strict=True))
    assert found.optimizer.param_groups[1]["name"] == "last"
    assert [found.step() for _ in range(5)] == [trainer.step() for _ in range(5)]
    for a, b in zip(found.average, trainer.average, strict=True):
        assert torch.equal(a, b)
    assert same(found.losses, trainer.losses) and found.losses.maxlen == 4
    for mine, theirs in zip(
        found.optimizer.param_groups, trainer.optimizer.param_groups, strict=True
    ):
        names = ("lr", "initial_lr", "betas", "weight_decay", "momentum")
        assert [mine.get(name) for name in names] == [theirs.get(name) for name in names]


@pytest.mark.filterwarnings("ignore:.*lr_scheduler")
@pytest.mark.parametrize("after", [1, 2, 3])
def test_gradients_that_are_summed_over_steps_come_back(after, again):
    trainer = Trainer(adam)
    trainer.sum_over, trainer.losses = 4, []
    for _ in range(after):
        trainer.step()
    found = again(trainer)
    assert all(p.grad is not None for p in found.model.parameters())
    assert [found.step() for _ in range(9)] == [trainer.step() for _ in range(9)]


def test_a_gradient_without_an_optimiser_comes_back_or_is_refused(again):
    """One's own rule for a step, on parameters that no optimiser knows."""
    model = torch.nn.Linear(2, 2)
    model.bias.grad = torch.ones(2)
    try:
        found = again(Holder(model=model, tensor=None))
    except ExperimentError as error:
        assert "model" in str(error)
    else:
        assert found.model.bias.grad is not None and torch.equal(
            found.model.bias.grad, torch.ones(2)
        )


class Counting(torch.optim.SGD):
    """An optimiser that keeps something beside its state."""

    skipped = 0


def test_what_hangs_on_an_optimiser_comes_back_or_is_refused(again):
    optimizer = Counting([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    optimizer.skipped = 3
    try:
        found = again(Holder(optimizer=optimizer))
    except ExperimentError as error:
        assert "optimizer" in str(error)
    else:
        assert found.optimizer.skipped == 3


def tenth(gradient: torch.Tensor) -> torch.Tensor:
    return gradient / 10


def make_tenth_(parameter: torch.Tensor) -> None:
    parameter.grad.div_(10)


@pytest.mark.parametrize("kind", ["on the gradient", "after it"])
def test_a_hook_on_a_parameter_comes_back_or_is_refused(kind, again):
    """A limit on the gradient, say, registered where the parameter is made."""
    holder = Holder(model=torch.nn.Linear(1, 1, bias=False))
    if kind == "on the gradient":
        holder.model.weight.register_hook(tenth)
    else:
        holder.model.weight.register_post_accumulate_grad_hook(make_tenth_)
    try:
        found = again(holder)
    except ExperimentError as error:
        assert "model" in str(error)
    else:
        for one in (holder, found):
            one.model(torch.ones(1)).sum().backward()
        assert holder.model.weight.grad.item() == pytest.approx(0.1)
        assert found.model.weight.grad.item() == pytest.approx(0.1)


def halve(module, inputs, output):
    return output / 2


def test_a_hook_on_a_module_comes_back(again):
    model = torch.nn.Linear(2, 2)
    model.register_forward_hook(halve)
    assert torch.equal(again(model)(torch.ones(2)), model(torch.ones(2)))


def test_generators_go_on_where_they_stood(again):
    holder = Holder(
        g=torch.Generator().manual_seed(1), r=random.Random(2), n=np.random.default_rng(3)
    )

    def draw(one: Holder) -> list:
        numbers = torch.rand(3, generator=one.g).tolist()
        return [*numbers, one.r.random(), one.r.gauss(0, 1), *one.n.random(3)]

    draw(holder)
    found = again(holder)
    assert draw(found) == draw(holder)


# ── What is refused ─────────────────────────────────────────────────────────────────────────────


def closure(y: float) -> Callable:
    return lambda x: x * y


def local_object() -> object:
    class Local:
        pass

    return Local()


REFUSED = {
    "a running generator function": lambda: (i for i in range(3)),
    "a lock": threading.Lock,
    "a thread's own": threading.local,
    "a function that holds values": lambda: closure(2.0),
    "a function without a name": lambda: lambda x: x,
    "an object of a class that nobody else can find": local_object,
    "a module of Python": lambda: math,
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("where", ["attribute", "list", "dict", "deque", "module", "slots"])
def test_what_cannot_be_put_back_is_refused_by_name(what, where):
    value, holder = REFUSED[what](), Holder(fine=torch.ones(2))
    if where == "attribute":
        holder.odd = value
    elif where == "list":
        holder.odd = [1, value]
    elif where == "dict":
        holder.odd = {"k": value}
    elif where == "deque":
        holder.odd = deque([value])
    elif where == "module":
        holder.odd = torch.nn.Sequential(torch.nn.ReLU())
        holder.odd[0].inside = value
    else:
        holder.odd = Slots()
        holder.odd.a = value
    with pytest.raises(ExperimentError) as error:
        check_kept({"trainers": [holder]})
    at = {"list": ".1", "dict": ".k", "module": "._modules.0.inside"}.get(where, "")
    assert f"would lose training.trainers.0.odd{at}" in str(error.value)
    assert "numbers, tensors, a torch.Generator" in str(error.value), "and says what would do"
    if where not in ("deque", "slots"):
        kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
        assert f"of type {kind} (" in str(error.value)


def test_an_open_file_is_refused_by_name(tmp_path):
    with (tmp_path / "x").open("w") as file:
        for opened in (file, Holder(deep=file)):
            with pytest.raises(ExperimentError, match=r"training\.log.*TextIOWrapper"):
                check_kept({"log": opened})


def test_what_hangs_on_something_is_refused_by_the_whole_way_to_it():
    holder = Holder(deep=[0, Holder(done=threading.Event())])
    with pytest.raises(ExperimentError, match=r"training\.t\.deep\.1\.done\._cond\._lock, of type"):
        check_kept({"t": holder})


def test_the_check_writes_nothing_and_copies_no_tensor(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def copied(*_):
        raise AssertionError("a tensor was looked into")

    holder = Holder(model=Model(), optimizer=adam([{"params": [torch.nn.Parameter(randn(2))]}]))
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "__reduce_ex__", copied)
        patch.setattr(torch.nn.Parameter, "__reduce_ex__", copied)
        check_kept({"trainers": [holder]})
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_would_lose_something_is_not_written(tmp_path):
    checkpoints, log = Checkpoints(tmp_path / "kept", {}), TrainingLog(tmp_path / "log", "run", {})
    log([{"layer": 1, "step": 0}])
    checkpoints.save(1, {"trainers": [Holder(x=1)]}, log)
    with pytest.raises(ExperimentError, match=r"lose training\.trainers\.0\.x"):
        checkpoints.save(2, {"trainers": [Holder(x=threading.Lock())]}, log)
    assert [path.name[:13] for path in checkpoints.newest_first()] == ["step_00000001"]
    assert checkpoints.read(log)["trainers"][0].x == 1
