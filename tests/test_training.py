"""Trainings that are stopped and go on show no seam; both layers read the same tokens."""

import contextlib
import json
import random
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from tiny import RECIPE, stop_me

import experiment
import lab.activations
import lab.text
from experiment import Trainer
from lab.activations import calibrate
from lab.checkpoints import Checkpoints, Keeper
from lab.devices import Ranks
from lab.online_absorption import OnlineAbsorption
from lab.process import ExperimentError, Interrupted, Signals
from lab.saved_sae import of_one_seed
from lab.scales import Scale
from lab.state import load_state, save_state
from lab.training_log import TrainingLog, settled

# ── A trainer ───────────────────────────────────────────────────────────────────────────────────

D_IN = 8
SCALE = Scale(
    "tiny", "none", "sae-probes", (1, 12), training_tokens=14 * 32 + 5, batch_tokens=32,
    context_length=9, heldout_contexts=4, d_sae=24, n_seeds=2, target_l0s=(4.0,), lm_batch=5,
    block_contexts=16, lanes=4, checkpoint_seconds=3600, training_dtype="float32", online_every=3,
    online_words=30, k_values=(1,), tasks=("news",),
)  # fmt: skip
OURS = replace(RECIPE, learning_rate=0.02, initial_l0_fraction=0.5, ema_horizon_fraction=0.3)
# One run of every kind: average, adaptive pace, alpha = 1, alpha = 0, norm restored.
KINDS = ("run_1", "run_2", "run_7", "run_8", "run_10")


def online_absorption(*_) -> OnlineAbsorption:
    """Forty words of four letters, noisy enough for absorption to be anything."""
    generator = torch.Generator().manual_seed(3)
    y, weight, f1 = torch.arange(40) % 4, torch.zeros(26, D_IN), torch.zeros(26)
    weight[:4], f1[:4] = torch.eye(D_IN)[:4], 1.0
    X = 2 * torch.eye(D_IN)[y] + 0.7 * torch.randn(40, D_IN, generator=generator)
    probe = {"weight": weight, "bias": torch.full((26,), -0.1), "f1": f1, "X": X, "y": y}
    return OnlineAbsorption(probe, SCALE.online_words)


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return list(3 * torch.randn(14, 32, D_IN, generator=generator) + 1)


def fresh_trainer(name: str) -> Trainer:
    units = calibrate(torch.cat(batches()), Ranks())
    trainer = Trainer(SCALE, OURS, experiment.RUNS[name], 12, units, Ranks())
    trainer.online, trainer.heldout_ND = online_absorption(), torch.cat(batches())[:50]
    trainer.sae.b_enc.data[:, 0] = -100.0  # a latent that never fires
    return trainer


def steps(trainer: Trainer, first: int, last: int) -> list[dict]:
    """The records of some steps, as plain numbers."""
    return settled([trainer.step(x) for x in batches()[first:last]])


def numbers_of(value: object, path: str, seen: dict[int, object]) -> dict[str, object]:
    """{where: number, text or copy of a tensor} of an object and of all that hangs on it."""
    if isinstance(value, torch.Tensor):
        return {path: value.detach().clone()}
    if isinstance(value, torch.Generator):
        return {path: value.get_state()}
    if id(value) in seen or isinstance(value, torch.device | torch.dtype | type):
        return {}
    if isinstance(value, dict):
        children = list(value.items())
    elif isinstance(value, list | tuple):
        children = list(enumerate(value))
    elif isinstance(value, torch.optim.Optimizer):
        children = list(value.state_dict().items())
    elif hasattr(value, "__dict__"):
        children = list(vars(value).items())
    else:
        return {path: repr(value)}
    seen[id(value)] = value
    found = {f"{path}/type": type(value).__name__}
    for name, child in children:
        found |= numbers_of(child, f"{path}/{name}", seen)
    return found


def state_of(*trainers: Trainer) -> dict[str, object]:
    """All numbers that may decide what trainers do next; the probe and processes are not theirs."""
    held = {}
    for trainer in trainers:
        own = {name: v for name, v in vars(trainer).items() if name not in ("online", "ranks")}
        held |= numbers_of(own, f"layer_{trainer.layer}", {})
    return held


def assert_same_state(found: dict[str, object], expected: dict[str, object]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert found[name].dtype == value.dtype, name
            # L0 is not a number before it is measured.
            assert torch.equal(found[name].nan_to_num(), value.nan_to_num()), name
        else:
            assert found[name] == value, name


def through_a_file(trainer: Trainer, folder: Path) -> Trainer:
    save_state({"trainers": [trainer]}, folder / "state")
    (found,) = load_state(folder / "state")["trainers"]
    return found


@pytest.mark.parametrize("stopped_after", [0, 1, 7])
@pytest.mark.parametrize("name", KINDS)
def test_a_trainer_goes_on_to_the_bit_as_if_it_had_never_stopped(name, stopped_after, tmp_path):
    never_stopped, stopped = fresh_trainer(name), fresh_trainer(name)
    steps(never_stopped, 0, stopped_after)
    steps(stopped, 0, stopped_after)
    state = state_of(stopped)
    restored = through_a_file(stopped, tmp_path)
    assert restored.steps_done == stopped_after
    assert_same_state(state_of(restored), state)
    expected = steps(never_stopped, stopped_after, stopped_after + 3)
    assert steps(restored, stopped_after, stopped_after + 3) == expected
    assert_same_state(state_of(restored), state_of(never_stopped))
    assert_same_state(state_of(stopped), state)  # it was not moved by being written
    own = [p for group in restored.optimizer.param_groups for p in group["params"]]
    theirs = [p for p in restored.sae.parameters() if p.requires_grad]
    assert all(a is b for a, b in zip(own, theirs, strict=True))
    with restored.averaged(), never_stopped.averaged():
        for seed in range(2):
            own, theirs = (of_one_seed(t.sae, seed, 2) for t in (restored, never_stopped))
            assert all(torch.equal(own[key], theirs[key]) for key in theirs)


def test_the_state_of_a_trainer_is_not_at_rest_anywhere():
    """Else the test above would say nothing about some part of it."""
    trainer = fresh_trainer("run_2")
    before = state_of(trainer)
    steps(trainer, 0, 10)
    after = state_of(trainer)

    def moved(name: str) -> bool:
        a, b = before[name], after[name]
        if isinstance(a, torch.Tensor):
            return not torch.equal(a.nan_to_num(), b.nan_to_num())
        return a != b

    tensors = {name for name, value in before.items() if isinstance(value, torch.Tensor)}
    at_rest = {name.removeprefix("layer_12/") for name in tensors if not moved(name)}
    assert at_rest == {"units/1", "heldout_ND"}, "the units, and what is measured on"
    new = {n.removeprefix("layer_12/optimizer/") for n in after.keys() - before.keys()}
    moments = ("step", "exp_avg", "exp_avg_sq", "type")
    expected = {f"state/{i}/{what}" for i in range(5) for what in moments}
    assert new == expected | {"param_groups/0/initial_lr"}
    numbers = {name.split("/")[1] for name in before.keys() - tensors if moved(name)}
    assert numbers == {"paced", "rate", "best_absorption", "steps_done"}


class Schedule:
    def __init__(self):
        self.calls, self.norms = 0, []


def test_an_attribute_that_an_experimenter_adds_is_kept_without_a_word_of_theirs(tmp_path):
    """Of the trainer, of its SAE, and of an object that hangs on either."""

    def more(trainer: Trainer) -> Trainer:
        trainer.skipped, trainer.sae.schedule = 0, Schedule()
        trainer.sae.register_buffer("mean", torch.zeros(2, D_IN), persistent=False)
        return trainer

    stopped = more(fresh_trainer("run_1"))
    steps(stopped, 0, 2)
    stopped.skipped = 3
    stopped.sae.schedule.calls, stopped.sae.schedule.norms = 5, [torch.ones(2), 0.5]
    stopped.sae.mean += 7
    restored = through_a_file(stopped, tmp_path)
    assert (restored.skipped, restored.sae.schedule.calls) == (3, 5)
    assert restored.sae.schedule.norms[0].tolist() == [1, 1]
    assert (restored.sae.mean == 7).all()
    stopped.sae.source = threading.Lock()
    with pytest.raises(ExperimentError, match=r"would lose training\.trainers\.0\.sae\.source, of"):
        through_a_file(stopped, tmp_path)


# ── A training ──────────────────────────────────────────────────────────────────────────────────


class Reader:
    """A language model that gives every token a residual of its own at either layer."""

    tokenizer, layers, device = tiny.Numbers(), (1, 12), torch.device("cpu")
    identity, name, d_in = {"model": "reader"}, "reader", D_IN
    table = torch.randn(97, 2, D_IN, generator=torch.Generator().manual_seed(5))

    def __init__(self, each_pass: Callable[[int], None] = lambda n: None):
        self.passes, self.each_pass = 0, each_pass

    def is_special(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens < 0

    def residuals(self, tokens_BL: torch.Tensor) -> dict[int, torch.Tensor]:
        self.passes += 1
        self.each_pass(self.passes)
        x = self.table[tokens_BL % 97]
        return {1: x[..., 0, :], 12: 3 * x[..., 1, :] + 1}


HELDOUT = torch.arange(4 * 9).view(4, 9)


@pytest.fixture
def text(monkeypatch) -> list[str]:
    r = random.Random(6)
    texts = [
        " ".join(str(r.randrange(97)) for _ in range(r.choice((3, 9, 40)))) for _ in range(200)
    ]
    monkeypatch.setattr(lab.text, "packaged_documents", lambda scale: texts)
    monkeypatch.setattr(experiment, "online_absorption", online_absorption)
    return texts


class Execution:
    """One process's part of a run in `folder`: from its last checkpoint on, as execute() does."""

    def __init__(self, folder: Path, name: str = "run_2", lm: Reader | None = None, scale=SCALE):
        folder.mkdir(exist_ok=True)
        self.scale = scale
        self.log = TrainingLog(folder / "log", name, {})
        self.checkpoints = Checkpoints(folder / "checkpoint", {"run": name})
        checkpoint = self.checkpoints.read(self.log)
        lm = lm or Reader()
        self.begun_at = checkpoint["step"] if checkpoint else None
        run = experiment.RUNS[name]
        parts = experiment.begun(scale, OURS, run, lm, HELDOUT, 5, Ranks(), checkpoint)
        self.trainers, self.stream = parts

    def train(self, signals: Signals) -> "Execution":
        seconds = self.scale.checkpoint_seconds
        keeper = Keeper(self.log, self.checkpoints, signals, Ranks(), seconds)
        experiment.train(self.scale, self.trainers, self.stream, keeper)
        return self

    def result(self) -> tuple[list[dict], dict[str, object]]:
        """The log less the speed, and everything that is known at the end."""
        lines = self.log.path.read_text().splitlines()
        records = [json.loads(line) for line in lines]
        assert self.log.records == records
        slow = [{k: v for k, v in r.items() if k != "tokens_per_second"} for r in records]
        state = self.checkpoints.read(self.log)
        held = state_of(*state["trainers"])
        assert_same_state(state_of(*self.trainers), held)
        return slow, held | numbers_of(state["generators"], "generators", {})


def assert_same_result(found: Execution, expected: Execution) -> None:
    (records, state), (expected_records, expected_state) = found.result(), expected.result()
    assert records == expected_records
    assert_same_state(state, expected_state)


@pytest.mark.parametrize("name", KINDS)
def test_a_run_stopped_by_a_signal_in_a_step_goes_on_as_if_it_never_had(
    name, text, tmp_path, signals, monkeypatch
):
    whole = Execution(tmp_path / "whole", name).train(signals)
    assert [r["step"] for r in whole.log.records] == [i // 2 for i in range(28)]
    first = Execution(tmp_path / "stopped", name)
    step = Trainer.step

    def interrupted(self, x):
        if (self.layer, self.steps_done) == (1, 6):
            stop_me()
        return step(self, x)

    monkeypatch.setattr(Trainer, "step", interrupted)
    with pytest.raises(Interrupted) as stop:
        first.train(signals)
    assert stop.value.signal_number == signal.SIGTERM
    monkeypatch.undo()
    monkeypatch.setattr(lab.text, "packaged_documents", lambda scale: text)
    monkeypatch.setattr(experiment, "online_absorption", online_absorption)
    assert len((tmp_path / "stopped" / "log").read_text().splitlines()) == 14
    signals.received = None
    second = Execution(tmp_path / "stopped", name)
    assert second.begun_at == 7, "both layers finished the step"
    assert_same_result(second.train(signals), whole)
    third = Execution(tmp_path / "stopped", name)
    assert third.begun_at == 14, "the last step is a checkpoint too"
    assert_same_result(third.train(signals), whole)


def test_a_run_stopped_at_any_moment_of_reading_goes_on_as_if_it_never_had(text, tmp_path, signals):
    whole = Execution(tmp_path / "whole").train(signals)
    begun_at = []
    # A block is 4 passes, held-out rows one; a block that is begun has to be read again.
    for stops_at in (6, 11, 10, 8, None):

        def one_pass(n: int, stops_at: int | None = stops_at) -> None:
            if n == stops_at:
                stop_me()

        execution = Execution(tmp_path / "stopped", lm=Reader(one_pass))
        begun_at.append(execution.begun_at)
        with pytest.raises(Interrupted) if stops_at else contextlib.nullcontext():
            execution.train(signals)
        signals.received = None
    assert begun_at[0] is None
    assert 0 < begun_at[1] < begun_at[2] < begun_at[3] <= begun_at[4] < 14
    assert_same_result(execution, whole)


def test_a_run_that_was_killed_goes_on_from_its_last_checkpoint(
    text, tmp_path, signals, monkeypatch
):
    whole = Execution(tmp_path / "whole").train(signals)
    often = replace(SCALE, checkpoint_seconds=0)
    first = Execution(tmp_path / "killed", scale=often)
    step = Trainer.step

    def killed(self, x):
        if (self.layer, self.steps_done) == (12, 5):
            raise MemoryError
        return step(self, x)

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(Trainer, "step", killed)
        first.train(signals)
    with (tmp_path / "killed" / "log").open("a") as log:
        log.write('{"layer": 1, "step": 5, "lo')
    second = Execution(tmp_path / "killed")
    assert second.begun_at == 5
    assert_same_result(second.train(signals), whole)


def test_a_signal_before_the_first_step_leaves_something_to_go_on_from(
    text, tmp_path, signals, monkeypatch
):
    whole = Execution(tmp_path / "whole").train(signals)
    first = Execution(tmp_path / "stopped")
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(lab.activations, "block_order", lambda *_: stop_me())
        first.train(signals)
    signals.received = None
    assert_same_result(Execution(tmp_path / "stopped").train(signals), whole)


def test_a_signal_during_the_last_checkpoint_is_not_lost(text, tmp_path, signals, monkeypatch):
    execution = Execution(tmp_path / "run")
    save = Checkpoints.save

    def interrupted(self, step, *arguments):
        stop_me()
        save(self, step, *arguments)

    monkeypatch.setattr(Checkpoints, "save", interrupted)
    with pytest.raises(Interrupted):
        execution.train(signals)
    assert read_steps(execution) == 14, "and the checkpoint is whole"


def read_steps(execution: Execution) -> int:
    return execution.checkpoints.read(execution.log)["step"]


def test_what_a_checkpoint_would_lose_is_refused_after_the_first_step(text, tmp_path, signals):
    execution = Execution(tmp_path / "run")
    execution.trainers[1].draw = threading.Lock()
    with pytest.raises(ExperimentError, match=r"lose training\.trainers\.1\.draw, of type _thread"):
        execution.train(signals)
    assert [trainer.steps_done for trainer in execution.trainers] == [1, 1]
    assert execution.checkpoints.newest_first() == []


@pytest.mark.parametrize("draw", ["torch", "random"])
def test_who_draws_from_the_global_generators_goes_on_with_the_same_numbers(
    draw, text, tmp_path, signals, monkeypatch
):
    """Noise on the activations, say: an experimenter gives it no generator of its own."""
    step = Trainer.step

    def noisy(self, x):
        if stops and (self.layer, self.steps_done) == (1, 6):
            stop_me()
        noise = torch.randn_like(x) if draw == "torch" else random.gauss(0, 1)
        return step(self, x + noise)

    monkeypatch.setattr(Trainer, "step", noisy)
    stops = False
    whole = Execution(tmp_path / "whole", "run_1").train(signals).result()
    stops = True
    with pytest.raises(Interrupted):
        Execution(tmp_path / "stopped", "run_1").train(signals)
    stops, signals.received = False, None
    torch.manual_seed(99)  # another process
    random.seed(99)
    found = Execution(tmp_path / "stopped", "run_1").train(signals).result()
    assert found[0] == whole[0]
    assert_same_state(found[1], whole[1])


def test_checkpoints_come_as_often_as_asked_for(text, tmp_path, signals, monkeypatch):
    saved_at = []
    monkeypatch.setattr(Checkpoints, "save", lambda self, step, *_: saved_at.append(step))
    Execution(tmp_path / "seldom").train(signals)
    assert saved_at == [14]
    saved_at.clear()
    often = replace(SCALE, checkpoint_seconds=0)
    Execution(tmp_path / "often", scale=often).train(signals)
    assert saved_at == [*range(1, 15), 14]


def test_both_layers_are_trained_on_the_same_tokens_in_units_of_their_own(
    text, tmp_path, signals, monkeypatch
):
    seen: dict[int, list[torch.Tensor]] = {1: [], 12: []}
    step = Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda t, x: (seen[t.layer].append(x), step(t, x))[1])
    execution = Execution(tmp_path / "run").train(signals)
    shallow, deep = (torch.cat(seen[layer], dim=1) for layer in (1, 12))
    assert shallow.shape[:2] == deep.shape[:2] == (2, 14 * 32), "a batch of each seed's own"
    assert not torch.equal(shallow[0], shallow[1])
    shallow, deep = shallow.flatten(0, 1), deep.flatten(0, 1)
    row_of = {tuple(row.tolist()): i for i, row in enumerate(Reader.table[:, 0])}
    tokens = [row_of[tuple(row.tolist())] for row in shallow]
    torch.testing.assert_close(deep, 3 * Reader.table[tokens, 1] + 1)
    first, second = (trainer.units for trainer in execution.trainers)
    assert first.scale / second.scale == pytest.approx(3, rel=0.2)


def test_a_text_that_ends_too_early_is_an_error_that_says_where(text, tmp_path, signals):
    del text[30:]
    with pytest.raises(ExperimentError, match=r"ended after \d+ of 14 steps: lower"):
        Execution(tmp_path / "run").train(signals)
    del text[6:]
    with pytest.raises(ExperimentError, match="shorter than one block of 16 contexts"):
        Execution(tmp_path / "other")
