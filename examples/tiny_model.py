"""Make a tiny language model, to try real vLLM without a GPU, a download or a licence:

    python examples/tiny_model.py DIRECTORY

A Llama of two layers with random weights and one token a byte: it answers gibberish, and costs what
a model costs in a serving stack. The same seed gives the same weights.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

BOS, EOS = "<s>", "</s>"
MARK = "tiny_model.txt"
"""Says that a directory was made here, and how."""
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def make(directory: Path, seed: int) -> str:
    """Make the model in `directory`, or leave one that is there; returns what to tell the user.

    Raises `FileExistsError` for a directory that holds anything else.
    """
    mark = f"made by examples/tiny_model.py with seed {seed}\n"
    if directory.exists() and any(directory.iterdir()):
        if (directory / MARK).exists() and (directory / MARK).read_text() == mark:
            return f"{directory}: is there already"
        raise FileExistsError(
            f"{directory} is not empty, and not a tiny model of seed {seed}; name another, or "
            "remove it"
        )
    directory.parent.mkdir(parents=True, exist_ok=True)
    # In one go, so that an interrupted run leaves no half of a model behind.
    temporary = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}-"))
    try:
        save_tokenizer(temporary)
        parameters = save_weights(temporary, seed)
        (temporary / MARK).write_text(mark)
        if directory.exists():
            directory.rmdir()
        temporary.chmod(0o755)
        temporary.rename(directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    size = sum(path.stat().st_size for path in directory.iterdir())
    return f"{directory}: a Llama of {parameters:,} random parameters, {size / 1e6:.1f} MB"


def save_tokenizer(directory: Path) -> None:
    """One token for each byte, so that any text can be told and any answer read."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, BOS, EOS])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS)
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(directory)


def save_weights(directory: Path, seed: int) -> int:
    """Returns the number of parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=256,
        eos_token_id=257,
        dtype="float32",
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    model.save_pretrained(directory)
    return sum(parameter.numel() for parameter in model.parameters())


def main() -> int:
    parser = argparse.ArgumentParser(description="Make a tiny model of random weights for vLLM")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        print(make(arguments.directory.absolute(), arguments.seed))
    except ImportError as error:
        print(f"{error}: `make vllm` installs what this needs", file=sys.stderr)
        return 2
    except OSError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
