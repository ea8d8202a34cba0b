"""Facts as tokens: statements, questions, and recitals of both with what in them can be answered.

Knows nothing of prose or of the model.
"""

from enum import IntEnum

import numpy as np
from tokenizers import Tokenizer

from scripts.demo_model.facts import CHAIN_QUESTION_TEMPLATE, FACT_TEMPLATE, NAMES, VALUES
from scripts.demo_model.text import encode

CHAIN_SHARE = 0.3  # of the questions, where a recital has chains


class Target(IntEnum):
    """What a token is to the loss when it is the one to predict."""

    PROSE = 0  # language, or a template's fixed words
    ANSWER = 1  # determined by a fact stated before
    IGNORE = 2  # chance: a name, a fact's first statement


Words = tuple[int, ...]  # a fact's name and value, or a chain's name and two values
Line = tuple[list[int], list[int]]  # tokens and their targets


class Reciter:
    """Writes facts and questions in the tokens of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.names = np.array([encode(tokenizer, f" {word}")[0] for word in NAMES])
        self.values = np.array([encode(tokenizer, f" {word}")[0] for word in VALUES])
        fact = encode(tokenizer, FACT_TEMPLATE.format(name=NAMES[0], value=VALUES[0]))
        name_at = fact.index(int(self.names[0]))
        self.lead, self.tail = fact[:name_at], fact[name_at + 2 :]
        self.chain_lead = encode(tokenizer, CHAIN_QUESTION_TEMPLATE.format(name=NAMES[0]))[:-1]

    def fact(self, words: Words, known: bool) -> Line:
        """A fact; its value is an answer where the fact is known."""
        return self._line(self.lead, words, known)

    def chain(self, words: Words, known: bool) -> Line:
        """The question for a chain, and its answer."""
        return self._line(self.chain_lead, words, known)

    def _line(self, lead: list[int], words: Words, known: bool) -> Line:
        values = [Target.ANSWER if known else Target.IGNORE] * (len(words) - 1)
        fixed = [Target.PROSE] * (len(lead) - 1)
        targets = [Target.IGNORE, *fixed, Target.IGNORE, *values, *[Target.PROSE] * len(self.tail)]
        return [*lead, *words, *self.tail], [int(target) for target in targets]

    def draw(self, rng: np.random.Generator, count: int) -> tuple[list[Words], list[Words]]:
        """`count` facts over distinct words, and the chains among them: up to a quarter as many."""
        count = min(count, len(self.names))
        hops = int(rng.integers(0, count // 4 + 1)) if count > 1 else 0
        names = rng.permutation(self.names)[: count - hops].tolist()
        values = rng.permutation(self.values)[:count].tolist()
        facts: list[Words] = list(zip(names, values, strict=False))
        facts += zip(values[:hops], values[len(names) :], strict=True)
        return facts, [(names[i], values[i], values[len(names) + i]) for i in range(hops)]

    def recite(self, rng: np.random.Generator, count: int, asked: int) -> list[Line]:
        """`count` facts in random order, then up to `asked` questions for facts and chains.

        Half of the time statements and questions mix; questions for a chain not yet known are left out.
        """
        facts, chains = self.draw(rng, count)
        events = list(rng.permutation(len(facts)))  # facts by their number, chains by -1 - number
        for _ in range(asked):
            chain = len(chains) > 0 and rng.random() < CHAIN_SHARE
            events.append(-1 - rng.integers(len(chains)) if chain else rng.integers(len(facts)))
        if rng.random() < 0.5:
            rng.shuffle(events)
        known: set[Words] = set()
        lines = []
        for event in events:
            if event >= 0:
                lines.append(self.fact(facts[event], facts[event] in known))
                known.add(facts[event])
            elif {chains[-1 - event][:2], chains[-1 - event][1:]} <= known:
                lines.append(self.chain(chains[-1 - event], known=True))
        return lines
