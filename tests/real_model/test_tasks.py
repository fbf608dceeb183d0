"""The questions for the pretrained model and their checkers; no weights needed."""

from dataclasses import replace

import pytest

from examples.real_model.tasks import Copy, Recall, Table, tasks


def answer(question):
    return question.id.partition(": ")[2]


def text(question):
    prompt = question.prompt
    return prompt if isinstance(prompt, str) else "\n".join(each["content"] for each in prompt)


@pytest.mark.parametrize("task", tasks(40), ids=lambda task: task.name)
def test_questions_depend_on_the_seed_alone_and_hold_their_answer(task):
    questions = task.questions(3)
    assert questions == task.questions(3) and questions != task.questions(4)
    assert len({question.id for question in questions}) == len(questions) == 40
    assert questions[:5] == replace(task, count=5).questions(3)
    for question in questions:
        assert answer(question) in " ".join(text(question).split())
        assert task.check(question, answer(question)).correct
        assert not task.check(question, "").correct


def test_a_list_that_lost_a_word_is_wrong():
    task = Copy(1)
    (question,) = task.questions(0)
    lines = answer(question).replace(" 2.", "\n2.")
    assert task.check(question, f"Here it is:\n{lines}\n").correct
    assert not task.check(question, lines.replace(lines.split()[1], "thing")).correct
    assert not task.check(question, lines[:-3]).correct


def test_another_code_is_wrong():
    task = Recall(1)
    (question,) = task.questions(0)
    codes = {word.strip(".") for word in text(question).split() if word[0].isdigit()}
    assert len(codes) == task.codes
    for code in codes:
        found = task.check(question, f"The pass code is {code}.").correct
        assert found == (code == answer(question))


def test_a_price_counts_alone():
    task = Table(1)
    (question,) = task.questions(0)
    price = answer(question)
    assert task.check(question, f"soup | {price}").correct
    assert task.check(question, f"It costs ${price}.").correct
    assert not task.check(question, f"{price} or 11").correct
    assert not task.check(question, f"1{price}").correct
    shown, asked = question.prompt[1]["content"], question.prompt[2]["content"]
    assert shown.split()[0] not in asked.split(), "the example's dish is not asked for"
