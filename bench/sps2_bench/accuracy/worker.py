"""`python -m sps2_bench.accuracy.worker`: scores prompts on one core as they are asked for."""

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from sps2_bench.accuracy.candidates import choose
from sps2_bench.accuracy.facts import FactBook
from sps2_bench.accuracy.prompts import Ints, PromptMaker, Recipe
from sps2_bench.accuracy.scoring import Scorer
from sps2_bench.processes import Message, serve
from sps2_engine.models import load_decoder


def read_text(path: Path, tokenizer: Tokenizer) -> Ints:
    """Tokens of a text file, or of all .txt files of a folder in order of their names.

    Raises:
        OSError: it cannot be read.
        FileNotFoundError: the folder has no text.
    """
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(f"{path} has no .txt files")
    texts = [file.read_text(encoding="utf-8") for file in files]
    # One paragraph at a time: a tokenizer's time on one long string grows faster than its length.
    paragraphs = [f"{paragraph}\n\n" for text in texts for paragraph in text.split("\n\n")]
    encodings = tokenizer.encode_batch(paragraphs, add_special_tokens=False)
    return np.array([token for encoding in encodings for token in encoding.ids], dtype=np.int64)


def prompt_maker(model: Path, text: Path, recipe: Recipe, bos_id: int | None) -> PromptMaker:
    """The maker of a recipe's prompts.

    Raises:
        FactsError: the model folder has no facts to plant.
        OSError: the text cannot be read.
        ValueError: text or facts do not suffice for the recipe.
    """
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    word_starts = np.zeros(tokenizer.get_vocab_size(), dtype=bool)
    for token, index in tokenizer.get_vocab().items():
        word_starts[index] = token.startswith(("Ġ", "Ċ"))  # a space, a line's end
    return PromptMaker(recipe, read_text(text, tokenizer), FactBook(model, tokenizer), word_starts, bos_id)


class AccuracyWorker:
    """Answers {"prompt": number} with the prompt's questions and its scores by profile."""

    def __init__(self, settings: Message) -> None:
        torch.set_num_threads(len(settings["cpus"]))
        model = Path(settings["model"])
        recipe = Recipe(**{**settings["recipe"], "lengths": tuple(settings["recipe"]["lengths"])})
        self._decoder = load_decoder(model, torch.float32, torch.device("cpu"))
        self._maker = prompt_maker(model, Path(settings["text"]), recipe, self._decoder.config.bos_id)
        self._candidates = choose(settings["profiles"], recipe.lengths, recipe.num_shards, recipe.tail)

    def __call__(self, message: Message) -> Message:
        """Scores one prompt."""
        prompt = self._maker.make(message["prompt"])
        scores = Scorer(self._decoder).score(prompt, self._candidates)
        return {
            "prompt": message["prompt"],
            "length": len(prompt.tokens),
            "questions": [{"hops": one.hops, "depth": one.depth} for one in prompt.questions],
            "scores": {name: score.document() for name, score in scores.items()},
        }


if __name__ == "__main__":
    serve(AccuracyWorker)
