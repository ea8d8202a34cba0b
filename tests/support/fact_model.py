"""A tiny random model folder for evaluations: a tokenizer of whole words, facts and a text."""

import json
import random
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from sps2_bench.prefill.random_model import DEFAULT_SHAPE, model_config, write_random_model

NAMES = tuple(f"name{letter}" for letter in "abcdefghijkl")
VALUES = tuple(f"value{letter}" for letter in "abcdefghijkl")
PROSE = tuple(f"word{letter}" for letter in "abcdefghijklmnop")
FIXED = ("<unk>", "<bos>", "<eos>", "ĠRemember", "ĠFollow", ":", ".")
SHAPE = {**DEFAULT_SHAPE, "hidden": 32, "intermediate": 48, "layers": 2, "heads": 4, "head_dim": 8}
NUM_WORDS = 1_000


def make_fact_model(folder: Path) -> Path:
    """Writes the folder and returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {piece: index for index, piece in enumerate(FIXED)}
    for word in (*NAMES, *VALUES, *PROSE):
        # ByteLevel cuts digits from letters, so words are letters only; Ġ is the space before one.
        vocabulary[f"Ġ{word}"] = len(vocabulary)
    write_random_model(model_config({**SHAPE, "vocab": len(vocabulary)}), folder)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    facts = {
        "names": NAMES,
        "values": VALUES,
        "fact_template": " Remember: {name} {value}.",
        "question_template": " Remember: {name}",
        "chain_question_template": " Follow: {name}",
    }
    (folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
    rng = random.Random(0)
    words = "".join(f" {rng.choice(PROSE)}" for _ in range(NUM_WORDS))
    (folder / "prompt.txt").write_text(words, encoding="utf-8")
    return folder
