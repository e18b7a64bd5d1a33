"""Answers are read as people write them, and what cannot be read is not guessed."""

import pytest

from commands.evaluation_answers import options_of, plain, read_answer, right_letter

COLOURS = {"A": "a red car", "B": "red", "C": "red, blue", "D": "a dog"}


@pytest.mark.parametrize(
    ("text", "letters", "letter"),
    [
        ("B", "ABCD", "B"),
        ("B.", "ABCD", "B"),
        ("(B)", "ABCD", "B"),
        ("B. The red car", "ABCD", "B"),
        ("Therefore the right choice is (B).", "ABCD", "B"),
        ("Answer: C", "ABCD", "C"),
        ("**D**", "ABCD", "D"),
        ("Before the door closes, so C.", "ABCD", "C"),
        ("Best option: A", "ABCD", "A"),
        ("I cannot tell.", "ABCD", None),
        ("", "ABCD", None),
        ("E", "ABCD", None),
        ("The answer is E.", "ABCDE", "E"),
        ("The answer is E.", "ABCD", None),
        ("It looks like A to me.\n\nAnswer: A", "ABCD", "A"),
        ("'B'", "ABCD", "B"),
        ("b)", "ABCD", "B"),
        ("C, not B", "ABCD", "C"),
        ("Either B or C", "ABCD", None),
        ("A man walks by", "ABCD", None),
        ("A is right", "ABCD", "A"),
        ("B\nBecause it is red.", "ABCD", "B"),
    ],
)
def test_a_letter_is_found(text, letters, letter):
    assert read_answer(text, dict.fromkeys(letters, "")) == letter


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("red", "B"),
        ("A red car.", "A"),
        ("The answer is red, blue.", "C"),
        ("First it is red, but I think it is a dog. The answer is a dog", "D"),
        ("I think it is (A) a red car", "A"),
        ("a cat", None),
        ("red or a dog", None),
    ],
)
def test_an_options_words_are_as_good_as_its_letter(text, letter):
    assert read_answer(text, COLOURS) == letter


@pytest.mark.parametrize(
    "prompt",
    [
        "Which?\nA. one\nB. two words\nAnswer with the letter.",
        "Which?\n(A) one\n(B) two words\nOnly give the best option.",
        "Which?\nA) one\nB) two words",
        "<options> \n{'A': 'one', 'B': 'two words'} \n</options>",
    ],
)
def test_options_are_found_in_a_prompt(prompt):
    assert options_of(prompt) == {"A": "one", "B": "two words"}


def test_a_prompt_without_options_has_none():
    assert options_of("What colour is it?\nA. only one") == {}


def test_the_right_letter_is_known_however_a_task_gives_it():
    options = {"A": "5", "B": "2", "C": "7"}
    assert right_letter("B", {"answer": "B"}, options) == "B"
    assert right_letter("B. 2", {}, options) == "B"
    assert right_letter("2", {"correct_choice": 2}, options) == "C"  # a number in the doc
    assert right_letter("2", {"answer": "2"}, options) == "B"  # words in the doc
    assert right_letter("utils.to_target", {"answer": 0}, options) == "A"
    assert right_letter("12.5", {}, options) is None


def test_plain_words_keep_what_tells_answers_apart():
    assert plain("B. At  3 s.") == plain("at 3 s")
    assert plain("red, blue") != plain("blue, red")
