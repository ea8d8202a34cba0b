"""The words and templates of planted facts, and the file that publishes them; knows nothing of tokens.

A fact binds a name to a value (" Remember: falcon amber."). Asking repeats the words up to the name
(" Remember: falcon"), and the next token should be the value. Every name and value is one token of the demo
tokenizer, so one comparison tells whether an answer is right. Two facts whose second names the first's value
(" Remember: falcon amber." and " Remember: amber cedar.") form a chain, which " Follow: falcon" asks for.
"""

import json

FACT_TEMPLATE = " Remember: {name} {value}."
QUESTION_TEMPLATE = " Remember: {name}"
ANSWER_TEMPLATE = " {value}"
CHAIN_QUESTION_TEMPLATE = " Follow: {name}"
CHAIN_ANSWER_TEMPLATE = " {value} {second_value}"

_NAMES = """
falcon badger walrus otter heron lynx raven gecko bison camel cobra coyote dingo ferret finch gopher hippo
hyena iguana jackal jaguar koala lemur llama lobster macaw marmot marten mink moose newt ocelot osprey
ostrich panda parrot pelican penguin piranha possum puffin puma python quail rabbit raccoon robin salmon
shark skunk sloth spider squid stoat tapir tiger toucan trout turtle viper vulture weasel wombat zebra
"""
NAMES = tuple(_NAMES.split())

_VALUES = """
amber azure basalt beige birch bronze canyon carbon cedar cello cobalt copper coral cotton crimson crystal
cypress denim ebony emerald fabric garnet ginger granite graphite hazel helium indigo ivory jasmine jasper
juniper lava lemon lilac lotus magenta mango maple marble maroon melon mustard neon nickel nylon olive
onyx opal orchid papaya pepper plasma plum poplar quartz radium ruby saffron sienna topaz tulip velvet
walnut
"""
VALUES = tuple(_VALUES.split())


def facts_json() -> str:
    """Words and templates as JSON, for programs that plant a fact and check the answer without torch."""
    facts = {
        "names": NAMES,
        "values": VALUES,
        "fact_template": FACT_TEMPLATE,
        "question_template": QUESTION_TEMPLATE,
        "answer_template": ANSWER_TEMPLATE,
        "chain_question_template": CHAIN_QUESTION_TEMPLATE,
        "chain_answer_template": CHAIN_ANSWER_TEMPLATE,
    }
    return json.dumps(facts, indent=1) + "\n"
