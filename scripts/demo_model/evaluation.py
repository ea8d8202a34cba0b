"""What the model can do: recall of planted facts by prompt length, and loss on held-out prose."""

from dataclasses import dataclass
from enum import Enum

import numpy as np
import torch
from torch.nn import functional

from scripts.demo_model.model import Llama
from scripts.demo_model.recital import Words
from scripts.demo_model.rows import Sampler, plant
from scripts.demo_model.text import Ints

PROBE_SEED = 7
GROUP_TOKENS = 8_192  # of a batch of probes
SCORED_TOKENS = 128  # of a window, behind its context


class Task(Enum):
    """A kind of question: facts planted (chains add a second one), whether it asks for a chain."""

    ONE_FACT = (1, False)
    AMONG_16 = (16, False)
    TWO_HOPS = (4, True)


@dataclass(frozen=True)
class Probe:
    """A prompt with its answer's tokens, of which the prompt holds all but the last."""

    tokens: Ints
    answer: Words


def make_probe(rng: np.random.Generator, prose: Sampler, length: int, task: Task) -> Probe:
    """`length` tokens of prose with facts at random places, ending in a question for one of them."""
    count, chain = task.value
    reciter = prose.reciter
    names = rng.permutation(reciter.names)[:count].tolist()
    values = rng.permutation(reciter.values)[: count + 1].tolist()
    facts: list[Words] = list(zip(names, values, strict=False))
    answer: Words = (values[0],)
    lead = reciter.lead
    if chain:
        answer, lead = (values[0], values[count]), reciter.chain_lead
        facts.append(answer)
    lines = [reciter.fact(facts[i], known=False) for i in rng.permutation(len(facts))]
    question = [*lead, names[0], *answer[:-1]]
    room = length - 1 - sum(len(tokens) for tokens, _ in lines) - len(question)
    text = prose.excerpt(rng, room)
    body, _ = plant(text, lines, np.sort(prose.spots(rng, text, len(lines))))
    return Probe(np.concatenate(([prose.bos], body, question)), answer)


@torch.inference_mode()
def recall(model: Llama, prose: Sampler, length: int, task: Task, cases: int) -> float:
    """The share of prompts of `length` tokens for which greedy decoding gives exactly the answer."""
    rng = np.random.default_rng((PROBE_SEED, length))
    probes = [make_probe(rng, prose, length, task) for _ in range(cases)]
    right, group = 0, max(1, GROUP_TOKENS // length)
    for start in range(0, cases, group):
        chunk = probes[start : start + group]
        answers = torch.tensor([probe.answer for probe in chunk])
        hidden = model.features(torch.from_numpy(np.stack([probe.tokens for probe in chunk])))
        greedy = model.lm_head(hidden[:, -answers.shape[1] :]).argmax(dim=-1)
        right += int((greedy == answers).all(dim=1).sum())
    return right / cases


@torch.inference_mode()
def prose_loss(model: Llama, prose: Sampler, window: int, windows: int) -> float:
    """Mean loss per token, in nats, over windows spread evenly over the prose."""
    losses = []
    for start in np.linspace(0, len(prose.prose) - window, windows).astype(np.int64):
        tokens = np.concatenate(([prose.bos], prose.prose[start : start + window]))
        ids = torch.from_numpy(tokens)[None]
        losses.append(float(functional.cross_entropy(model(ids[:, :-1]).float()[0], ids[0, 1:])))
    return float(np.mean(losses))


@torch.inference_mode()
def loss_behind(model: Llama, prose: Sampler, contexts: tuple[int, ...], windows: int) -> dict[int, float]:
    """Mean loss, in nats, on the same tokens behind more and more of the prose before them."""
    ends = np.linspace(max(contexts) + SCORED_TOKENS, len(prose.prose), windows).astype(np.int64)
    found = {}
    for context in contexts:
        losses = []
        for end in ends:
            tokens = np.concatenate(([prose.bos], prose.prose[end - SCORED_TOKENS - context : end]))
            ids = torch.from_numpy(tokens)[None]
            logits = model.lm_head(model.features(ids[:, :-1])[0, -SCORED_TOKENS:])
            losses.append(float(functional.cross_entropy(logits.float(), ids[0, -SCORED_TOKENS:])))
        found[context] = float(np.mean(losses))
    return found


def table(model: Llama, prose: Sampler, lengths: tuple[int, ...], cases: int) -> dict[int, dict[str, float]]:
    """Recall by prompt length and task."""
    return {
        length: {task.name.lower(): recall(model, prose, length, task, cases) for task in Task}
        for length in lengths
    }
