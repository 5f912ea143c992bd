"""Write a tiny Llama with random weights and a word-per-token vocabulary to a folder.

    python tests/serving/tiny_model.py FOLDER [windows]

With `windows` it is a tiny Gemma instead, two of whose layers see the last 64 tokens only.
Nothing is downloaded. The weights are large enough (0.08) for greedy output to vary: a broken cache
cannot hide behind constant output. 4 layers, 2 KV heads of 64, 1024 tokens, 2.9 M parameters.
"""

import sys

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

VOCABULARY = 1024


def write(folder: str, kind: str = "") -> None:
    words = [f"t{index}" for index in range(VOCABULARY - 3)] + ["<unk>", "<s>", "</s>"]
    numbers = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 4096,
        "bos_token_id": numbers["<s>"],
        "eos_token_id": numbers["</s>"],
        "initializer_range": 0.08,
        "tie_word_embeddings": False,
        "dtype": "float32",
    }
    if kind == "windows":
        layers = ["sliding_attention", "full_attention"] * 2
        config = Gemma3TextConfig(**shape, sliding_window=64, layer_types=layers)
        Gemma3ForCausalLM(config).save_pretrained(folder)
    else:
        LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(folder)


if __name__ == "__main__":
    write(*sys.argv[1:])
