"""Write a LoRA adapter of random weights for the tiny model to a folder.

python tests/serving/tiny_lora.py FOLDER SEED
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

RANK, HIDDEN, LAYERS, QUERY, VALUE = 8, 256, 4, 256, 128


def write(folder: str, seed: int) -> None:
    source = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(LAYERS):
        for name, out in (("q_proj", QUERY), ("v_proj", VALUE)):
            place = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{place}.lora_A.weight"] = torch.randn(RANK, HIDDEN, generator=source)
            weights[f"{place}.lora_B.weight"] = torch.randn(out, RANK, generator=source) / 8
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
    }
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, "adapter_config.json").write_text(json.dumps(settings))
    save_file(weights, Path(folder, "adapter_model.safetensors"))


if __name__ == "__main__":
    write(sys.argv[1], int(sys.argv[2]))
