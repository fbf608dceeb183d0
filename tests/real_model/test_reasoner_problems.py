"""The problems of the reasoner on pretrained weights, and their checker."""

import json
import random
import re

import pytest

from examples.real_model.reasoner import prompts
from examples.real_model.reasoner.evaluate import describe
from examples.real_model.reasoner.problems import (
    CITIES,
    DEVELOPMENT_SEEDS,
    EASY,
    FULL,
    GOODS,
    NAMES,
    NUMBERS,
    TASKS,
    TEST_SEEDS,
    TRAINING_SEEDS,
    WORDS,
    ReasonerTask,
    check,
    draw,
    first_difference,
    make_problems,
    read_answer,
)
from hf_reasoncache.evaluation.tasks import Task

SEED = DEVELOPMENT_SEEDS[-1]


def solve(problem):
    """What the three people have in the end, from the prompt alone, by a program of its own."""
    lines = problem.prompt.split("\n")
    asked = re.findall(r"[A-Z][a-z]+", lines[-1].partition(" do ")[2])
    if problem.task == "routes":
        sold = dict(re.findall(r"(\w+) sells (\w+)", lines[1]))
        following = dict(re.findall(r"After (\w+) comes (\w+)", lines[1]))
        city = dict(re.findall(r"(\w+) starts in (\w+)", problem.prompt))
        for name in asked:
            while following[city[name]] != "nothing":
                city[name] = following[city[name]]
        return tuple(sold[city[name]] for name in asked)
    has = dict(re.findall(r"(\w+) has (\w+)", lines[1]))
    for one, two in re.findall(r"(\w+) meets (\w+)", problem.prompt):
        has[one], has[two] = has[two], has[one]
    for one, two, coins in re.findall(r"(\w+) pays (\w+) (\w+)", problem.prompt):
        less, more = (NUMBERS.index(has[name]) for name in (one, two))
        count = NUMBERS.index(coins)
        has[one], has[two] = NUMBERS[less - count], NUMBERS[more + count]
    return tuple(has[name] for name in asked)


@pytest.mark.parametrize("task", TASKS)
def test_problems_depend_on_the_seed_alone(task):
    problems = make_problems(task, 12, SEED)
    assert problems == make_problems(task, 12, SEED)
    assert problems[:5] == make_problems(task, 5, SEED)
    others = make_problems(task, 12, SEED - 1)
    assert len({problem.prompt for problem in problems + others}) == 24


def test_seeds_are_disjoint_and_words_belong_to_one_list():
    assert not set(TRAINING_SEEDS) & set(TEST_SEEDS) | set(DEVELOPMENT_SEEDS) & set(TEST_SEEDS)
    lists = (NAMES, GOODS, CITIES, WORDS, NUMBERS)
    assert len({word for words in lists for word in words}) == sum(map(len, lists))


@pytest.mark.parametrize("size", ["easy", "full"])
@pytest.mark.parametrize("task", TASKS)
def test_chains_are_accepted_and_their_answers_follow_from_the_prompts(task, size):
    rng = random.Random(SEED)
    for _ in range(30):
        problem = draw(task, rng, EASY if size == "easy" else FULL[task])
        assert problem.answer == solve(problem)
        outcome = check(problem, problem.chain + " \nAnswer: none of it")
        assert outcome.correct and outcome.followed == {"word": True}
        assert first_difference(problem, problem.chain) is None


@pytest.mark.parametrize("task", TASKS)
def test_changed_answers_are_rejected(task):
    for problem in make_problems(task, 10, SEED):
        head, _, _ = problem.chain.rpartition("Answer: ")
        word, answer = problem.word, problem.answer

        def outcome(*items, head=head, problem=problem):
            found = check(problem, f"{head}Answer: {', '.join(items)}.")
            return found.correct, found.followed["word"]

        before = problem.side == "before"
        assert outcome(word, *answer) == (True, before)
        assert outcome(*answer, word) == (True, not before)
        assert outcome(*answer) == (True, False)
        assert outcome(word, *answer, word) == (True, False)
        assert outcome(answer[0], word, *answer[1:]) == (True, False)
        assert not outcome(*answer[:-1])[0]
        assert not outcome(*answer, answer[0])[0]
        for place in range(3):
            other = [*answer[:place], "feather", *answer[place + 1 :]]
            assert not outcome(*other)[0]
        unfinished = check(problem, head)
        assert not unfinished.correct and not unfinished.followed["word"]


@pytest.mark.parametrize("task", TASKS)
def test_the_first_wrong_sentence_is_found(task):
    problem = make_problems(task, 1, SEED)[0]
    sentences = re.split(r"(?<=[.?])\s", problem.chain)
    for place in (0, 7, len(sentences) - 1):
        changed = [*sentences[:place], "Nobody knows.", *sentences[place + 1 :]]
        assert first_difference(problem, " ".join(changed)) == (sentences[place], "Nobody knows.")
    cut = problem.chain.rpartition("\n")[0]
    assert first_difference(problem, cut) == ("Answer: " + sentences[-1].partition(": ")[2], "")


@pytest.mark.parametrize("name", TASKS)
def test_tasks_of_an_evaluation_judge_by_their_own_problems(name):
    task = ReasonerTask(name, 3)
    assert isinstance(task, Task)
    problems = make_problems(name, 3, SEED)
    questions = task.questions(SEED)
    assert len({question.id for question in questions}) == 3
    for question, problem, other in zip(
        questions, problems, problems[1:] + problems[:1], strict=True
    ):
        assert question.prompt == ({"role": "user", "content": problem.prompt},)
        assert question.spans == (problem.rule,)
        assert problem.prompt.count(problem.rule) == 1
        assert task.check(question, problem.chain).correct
        assert not task.check(question, other.chain).correct


def test_unknown_tasks_are_refused():
    with pytest.raises(ValueError, match="expected one of trades, ledger, routes"):
        make_problems("riddles", 1, SEED)


def test_answers_are_read_from_lines_that_begin_so():
    assert read_answer("The Answer: no\nAnswer: one, two.\nAnswer: three") == ["one", "two"]
    assert read_answer("one, two") == []


def test_a_description_counts_answers_words_chains_and_first_wrong_sentences():
    problems = make_problems("ledger", 4, SEED)
    replies = [problem.chain for problem in problems]
    replies[1] = replies[1].replace(problems[1].rule, "No rule.")
    replies[2] = replies[2].rpartition("Answer: ")[0]
    lines = [re.sub(r" = .*", "", line).split() for line in describe(problems, replies)]
    assert lines[:3] == [
        ["exact", "answers", "3/4"],
        ["word", "where", "it", "was", "asked", "3/4"],
        ["chains", "to", "the", "letter", "2/4"],
    ]
    side = problems[1].side
    kinds = {" ".join(line[3:]) for line in lines[3:]}
    assert f"Write the word WORD {side} the answer. (1)" in kinds and len(kinds) == 2


def test_prompts_to_calibrate_on_are_development_problems():
    lines = [json.loads(line) for line in prompts.prompts(2)]
    [first] = lines[0]["messages"]
    assert len(lines) == 2 * len(TASKS) and prompts.SEED in DEVELOPMENT_SEEDS
    assert first["content"] == make_problems(TASKS[0], 1, prompts.SEED)[0].prompt
