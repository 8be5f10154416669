"""The model that tries vLLM without a GPU."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "tiny_model.py"

pytestmark = pytest.mark.vllm


def run(directory, *options):
    command = [sys.executable, SCRIPT, directory, *options]
    return subprocess.run(command, capture_output=True, text=True)


def weights(directory):
    return hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "tiny"
    done = run(directory)
    assert done.returncode == 0, done.stderr
    assert "random parameters" in done.stdout
    return directory


def test_a_seed_gives_one_model_and_another_gives_another(model, tmp_path):
    run(tmp_path / "again")
    run(tmp_path / "other", "--seed", "1")
    assert weights(tmp_path / "again") == weights(model)
    assert weights(tmp_path / "other") != weights(model)


def test_it_is_small_and_left_alone_when_it_is_there(model):
    assert sum(path.stat().st_size for path in model.iterdir()) < 5e6
    before = (model / "model.safetensors").stat().st_mtime_ns
    assert "already" in run(model).stdout
    assert (model / "model.safetensors").stat().st_mtime_ns == before


def test_other_peoples_directories_are_refused(model, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    done = run(tmp_path)
    assert done.returncode == 2
    assert "not empty" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    assert run(model, "--seed", "1").returncode == 2


def test_every_text_survives_the_tokenizer(model, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    text = "Größe: 5 µJ\n\t日本語 😀 \x00"
    ids = tokenizer.encode(text)
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    chat = [{"role": "user", "content": "Hello"}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert prompt == "user: Hello\nassistant: "
