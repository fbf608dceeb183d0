"""Dense exercises for the start of a training run.

In a whole chain of thought, what has to be retrieved or computed is rare, and neither skill forms
in the time there is. Here it is every other word.
"""

from __future__ import annotations

from .generators import Draft, Writer
from .machine import Machine, Node, draw_pieces
from .vocabulary import DIGITS, DIRECTIVES, SIGNAL_WORDS


def write_lookups(writer: Writer, keys: int, queries: int, nodes: int = 0) -> Draft:
    """Write dense look-ups, which make retrieval form.

    Only the values looked up are supervised.

    Parameters
    ----------
    writer
        Family and source of chance.
    keys
        Facts of a key and a value.
    queries
        Look-ups.
    nodes
        Nodes of a compact machine, queried in the layout of a step: ``a* +5 2 c``.
    """
    rng = writer.rng
    values = _draw_values(writer, keys)
    machine = Machine(
        {
            name: Node(draw_pieces(writer.family, rng), *rng.choices(writer.family.letters, k=2))
            for name in rng.sample(writer.family.letters, nodes)
        },
        writer.family.compact,
    )
    facts = [[key, value] for key, value in values.items()] + machine.facts()
    rng.shuffle(facts)
    prompt = ["<bos>"]
    for fact in facts:
        prompt += [*fact, "."] if rng.random() < 0.5 else fact
    prompt.append("<think>")

    solution: list[str] = []
    supervised: list[bool] = []
    for _ in range(queries):
        if nodes and rng.random() < 0.5:
            name, result = rng.choice(list(machine.nodes)), rng.randint(0, 9)
            addend = writer.term(machine.nodes[name].addend)
            solution += [f"{name}*", addend, str(result), machine.after(name, result)]
            supervised += [False, True, False, True]
        elif values:
            key = rng.choice(list(values))
            solution += [key, values[key]]
            supervised += [False, True]
        if rng.random() < 0.3:
            solution.append(".")
            supervised.append(False)
    return Draft(prompt, solution, "", supervised=supervised)


def write_sums(writer: Writer, length: int) -> Draft:
    """Write a running sum; only the results are supervised.

    The words around a result are those of a step of a ``chain`` or a ``walk``, drawn at random.
    """
    rng = writer.rng
    letters = writer.family.letters
    total = rng.randint(0, 9)
    solution = [str(total), "."]
    supervised = [False, False]
    for _ in range(length):
        number = rng.randint(0, 9)
        layout = rng.choice(("bare", "chain", "walk"))
        if layout == "chain":
            sign = rng.choice(("+", "-"))
            before, term, after = [rng.choice(letters) + ":"], sign + str(number), ["."]
            before.append(rng.choice(letters))
        else:
            sign, term = "+", writer.term(number)
            before, after = [], []
            if layout == "walk":
                mark = "*" if writer.family.compact else "+"
                before = [f"#{rng.randint(1, 64)}", rng.choice(letters) + mark]
                after = [rng.choice(letters), "."]
        total = writer.apply(total, sign, number)
        step = [*before, term, str(total), *after]
        writer.think_aloud(step, 0.2)
        solution += step
        supervised += [place == len(before) + 1 for place in range(len(step))]
    return Draft(["<bos>", "<think>"], solution, "", supervised=supervised)


def _draw_values(writer: Writer, keys: int) -> dict[str, str]:
    rng = writer.rng
    marks = ":=?" if writer.family.compact else ":+><=?"
    pool = [letter + mark for letter in writer.family.letters for mark in marks]
    values = {}
    for key in rng.sample([*pool, *DIRECTIVES], keys):
        if key in DIRECTIVES:
            values[key] = rng.choice(SIGNAL_WORDS)
        elif key[1] in "+=":
            values[key] = rng.choice(DIGITS)
        else:
            values[key] = rng.choice(writer.family.letters) + ("?" if key[1] == "?" else "")
    return values
