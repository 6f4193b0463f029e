"""Before any work: everything a run will fetch can be had, and fits."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from lab.devices import training_device
from lab.process import require
from lab.scales import Scale
from lab.storage import cache_root


def preflight(scale: Scale, out_dir: Path) -> None:
    """Before any work: everything the run will fetch can be had, and fits.

    Raises ExperimentError with all that is missing.  Nothing is asked where nothing is fetched.
    """
    if scale.text == "sae-probes":
        return
    missing = [*not_to_be_had(scale), *not_enough_room(scale, out_dir)]
    require(not missing, "before this run can start:\n" + "\n".join(f"  - {m}" for m in missing))


def not_to_be_had(scale: Scale) -> Iterator[str]:
    """What the hub refuses of a scale's model, text and SAE-Bench's datasets."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    hub = HfApi()
    dataset, _, revision = scale.text.partition("@")
    wanted = [("model", scale.language_model, None), ("dataset", dataset, revision)]
    names = dict.fromkeys(t.split("_class_set")[0].removesuffix("_sentiment") for t in scale.tasks)
    wanted += [("dataset", name, None) for name in names]
    for kind, name, revision in wanted:
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
        except Exception as error:  # no network: the libraries in between have their own errors
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            yield f"the hub cannot be reached at {hub.endpoint} ({reason}): check the network"
            return


def not_enough_room(scale: Scale, out_dir: Path) -> Iterator[str]:
    """Disk and GPU memory a scale needs and this machine has not."""
    from huggingface_hub import constants

    GB, saes = 1e9, len(scale.layers) * scale.n_seeds
    small = "pythia-70m" in scale.language_model
    d_in = 512 if small else 2304
    sae_bytes = saes * 2 * d_in * scale.d_sae * 4
    # The model's files, SAE-Bench's datasets as they are downloaded; probes, prompts and texts; two
    # checkpoints of weights, two moments and an average, and the saved SAEs.
    needs = [
        (Path(constants.HF_HOME), (1 if small else 6) + 4),
        (cache_root(), 1 if small else 8),
        (out_dir, (2 * 4 + 2) * sae_bytes / GB),
    ]
    by_device: dict[int, list] = {}
    for path, gigabytes in needs:
        while not path.exists():
            path = path.absolute().parent
        by_device.setdefault(path.stat().st_dev, []).append((path, gigabytes))
    for found in by_device.values():
        wanted, free = sum(g for _, g in found), shutil.disk_usage(found[0][0]).free / GB
        if free < wanted:
            yield f"free disk space at {found[0][0]}: {free:.1f} GB of the {wanted:.0f} GB needed"
    if torch.cuda.is_available():
        block = scale.block_contexts * scale.context_length * len(scale.layers) * d_in * 2
        wanted = (0.5 if small else 8) + (5 * sae_bytes + 2 * block) / GB  # model, logits, SAEs
        free = torch.cuda.mem_get_info(training_device())[0] / GB
        if free < wanted:
            yield f"free GPU memory: {free:.1f} GB of about {wanted:.0f} GB needed are free"
