"""Train the demo model: a small Llama that reads English prose and recalls facts planted in it.

    python -m scripts.train_demo_model              # tokenizer, weights and configs into models/demo
    python -m scripts.train_demo_model --evaluate   # its recall by prompt length, and its loss

Run it in the repository's root. Each step's batch is drawn from a generator seeded by (seed, step), so a run
that was stopped goes on from its last checkpoint with the data it would have seen.
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

from scripts.demo_model.curriculum import TOTAL_STEPS, at_step
from scripts.demo_model.evaluation import Task, loss_behind, prose_loss, recall, table
from scripts.demo_model.files import export, load_checkpoint, load_weights, save_checkpoint
from scripts.demo_model.model import Llama, Shape
from scripts.demo_model.optimiser import Optimiser
from scripts.demo_model.recall import write_recall
from scripts.demo_model.recital import Target
from scripts.demo_model.rows import Sampler
from scripts.demo_model.text import Corpus, encode_all, train_tokenizer

ROOT = Path(__file__).resolve().parent.parent
ANSWER_WEIGHT = 2.0  # of the mean loss on answers, beside that on prose
REPORT_STEPS = 25
QUICK_LENGTHS = (1024, 8192)
QUICK_CASES = 16
CONTEXTS = (256, 512, 1024, 2048, 4096, 8192, 12_288, 16_384)


@dataclass(frozen=True)
class Data:
    """The prose in tokens."""

    tokenizer: Tokenizer
    train: Sampler
    held_out: Sampler
    prompt: str


def load_data(folder: Path, vocab_size: int) -> Data:
    """Read the books and train the tokenizer on the part that is trained on."""
    corpus = Corpus.load(folder)
    tokenizer = train_tokenizer(corpus, vocab_size)
    train, held_out = (
        Sampler(tokenizer, encode_all(tokenizer, texts)) for texts in (corpus.train, corpus.held_out)
    )
    return Data(tokenizer, train, held_out, corpus.prompt)


def token_losses(model: Llama, tokens: Tensor) -> Tensor:
    """The loss of predicting each token of [rows, length + 1] but the first, flat."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(tokens[:, :-1])
    return functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")


class Progress:
    """Sums up the losses and the speed since the last report."""

    def __init__(self) -> None:
        self.since = time.monotonic()
        self.tokens = 0
        self.sums = np.zeros((2, 2))  # [prose and answer, loss and count]

    def add(self, tokens: int, kind: Target, losses: Tensor) -> None:
        """Count a step's losses of one kind."""
        self.tokens += tokens
        self.sums[kind] += (float(losses.detach().sum()), len(losses))

    def line(self) -> str:
        """Loss by kind, and speed."""
        prose, answer = self.sums[:, 0] / np.maximum(1, self.sums[:, 1])
        rate = self.tokens / (time.monotonic() - self.since)
        return f"prose {prose:.3f} answer {answer:.3f} {rate:.0f} tokens/s"


class Run:
    """One run over the curriculum, kept in a folder of checkpoints."""

    def __init__(self, data: Data, folder: Path, seed: int, compiled: bool) -> None:
        torch.manual_seed(seed)
        self.data, self.folder, self.seed = data, folder, seed
        self.model = Llama(Shape(vocab=data.tokenizer.get_vocab_size()))
        write_recall(self.model)
        self.optimiser = Optimiser(self.model)
        self.step, self.tokens = load_checkpoint(folder, self.model, self.optimiser)
        self.losses = torch.compile(token_losses, dynamic=False) if compiled else token_losses

    def advance(self, progress: Progress) -> None:
        """One step: draw rows, weigh the losses, update."""
        mix, scale = at_step(self.step)
        rows, targets = self.data.train.batch(np.random.default_rng((self.seed, self.step)), mix)
        kinds = torch.from_numpy(targets[:, 1:].flatten())
        losses = self.losses(self.model, torch.from_numpy(rows))
        total = losses.new_zeros(())
        for kind, weight in ((Target.PROSE, 1.0), (Target.ANSWER, ANSWER_WEIGHT)):
            chosen = losses[kinds == kind]
            total = total + weight * chosen.sum() / max(1, len(chosen))
            progress.add(mix.rows * mix.length if kind == Target.PROSE else 0, kind, chosen)
        total.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.step += 1
        self.optimiser.step(self.step, scale)
        self.tokens += mix.rows * mix.length

    def save(self, output: Path) -> None:
        """Keep a checkpoint, put the model in place, and print what it can do."""
        save_checkpoint(self.folder, self.model, self.optimiser, self.step, self.tokens)
        export(self.model, self.data.tokenizer, self.data.prompt, output)
        lengths = tuple(n for n in QUICK_LENGTHS if n <= 8 * at_step(self.step - 1)[0].length)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = prose_loss(self.model, self.data.held_out, window=1024, windows=8)
            recalled = table(self.model, self.data.held_out, lengths, QUICK_CASES)
        print(f"  held-out loss {loss:.3f}; recall {json.dumps(recalled)}", flush=True)

    def train(self, output: Path, checkpoint_steps: int) -> None:
        """Go on to the curriculum's end."""
        export(self.model, self.data.tokenizer, self.data.prompt, output)
        progress = Progress()
        while self.step < TOTAL_STEPS:
            self.advance(progress)
            if self.step % REPORT_STEPS == 0:
                clock = time.strftime("%H:%M:%S")
                print(
                    f"{clock} step {self.step}/{TOTAL_STEPS} {self.tokens:,} tokens {progress.line()}",
                    flush=True,
                )
                progress = Progress()
            if self.step % checkpoint_steps == 0 or self.step == TOTAL_STEPS:
                self.save(output)
                progress = Progress()


def evaluate(data: Data, folder: Path, lengths: list[int], tasks: list[Task], cases: int) -> None:
    """Measure the model in a folder, in fp32; print a line per cell."""
    model = Llama(Shape(vocab=data.tokenizer.get_vocab_size()))
    load_weights(folder, model)
    loss = prose_loss(model, data.held_out, window=1024, windows=64)
    print(f"held-out prose: {loss:.3f} nats per token, perplexity {np.exp(loss):.1f}", flush=True)
    for context, loss in loss_behind(model, data.held_out, CONTEXTS, windows=64).items():
        print(f"the same tokens behind {context}: {loss:.3f} nats, perplexity {np.exp(loss):.1f}", flush=True)
    for task in tasks:
        for length in lengths:
            share = recall(model, data.held_out, length, task, cases)
            print(f"{task.name.lower()} in {length} tokens: {share:.0%} of {cases}", flush=True)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, default=ROOT.parent / "shared/data/text", help="folder of .txt books"
    )
    parser.add_argument("--run", type=Path, default=Path("/tmp/demo-train/run"), help="folder of checkpoints")  # noqa: S108
    parser.add_argument("--output", type=Path, default=ROOT / "models/demo", help="the model's folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocab", type=int, default=2048, help="tokens in the vocabulary")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--checkpoint-steps", type=int, default=200, help="steps between checkpoints")
    parser.add_argument(
        "--eager", action="store_true", help="do not compile the step (no C++ compiler needed)"
    )
    parser.add_argument(
        "--evaluate", action="store_true", help="measure the model in --output instead of training"
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 6144, 8192])
    names = [task.name.lower() for task in Task]
    parser.add_argument("--tasks", nargs="+", choices=names, default=names, help="what --evaluate asks")
    parser.add_argument("--cases", type=int, default=100, help="prompts per length and task of --evaluate")
    return parser.parse_args()


def main() -> None:
    """Train or evaluate."""
    args = arguments()
    torch.set_num_threads(args.threads)
    data = load_data(args.data, args.vocab)
    if args.evaluate:
        tasks = [Task[name.upper()] for name in args.tasks]
        evaluate(data, args.output, args.lengths, tasks, args.cases)
    else:
        Run(data, args.run, args.seed, compiled=not args.eager).train(args.output, args.checkpoint_steps)


if __name__ == "__main__":
    main()
