"""Answers are read as people write them, and what cannot be read is not guessed."""

import itertools
import re

import pytest

from commands.evaluation_answers import options_of, plain, read_answer, right_letter

# W, X, Y and Z stand for letters of options, in every order. These mean X, ...
MEANS_X = [
    "x. The red car",
    "x) red",
    "Ans: X",
    "Ans. X",
    "ans: x",
    "\u200bX\u200b",
    "X is the answer, not Y",
    "The answer is X (Y is wrong).",
    "選X",
    "X",
    "x",
    "X.",
    "X)",
    "(X)",
    "(x)",
    "[X]",
    "X:",
    "X!",
    " X ",
    "**X**",
    '"X"',
    "`X`",
    "Option X",
    "option x",
    "Option X.",
    "Option (X)",
    "X. The red car",
    "X: red",
    "X) red",
    "(X) red",
    "X - red",
    "X, because it is red.",
    "X because it is red.",
    "X\nBecause it is red.",
    "X\n\nThe video shows Y man.",
    "Answer: X",
    "Answer: (X)",
    "answer: x",
    "Answer X",
    "ANSWER: X",
    "Final answer: X",
    "The answer is X",
    "The answer is x.",
    "The answer is: X",
    "The answer is (X).",
    "The answer is option X.",
    "The answer would be X.",
    "The answer is most likely X.",
    "The answer is definitely X!",
    "The correct answer is X.",
    "The correct option is X.",
    "Best option: X",
    "Best option: (x)",
    "Best option:\n\n(X)",
    "The answer is X as shown in the video.",
    "The answer is X in the video.",
    "The answer is X because the man walks.",
    "The answer is X, a red car.",
    "The answer is X. The red car is seen at first.",
    "The answer is X. Y is wrong.",
    "The correct answer is X and not Y.",
    "The correct answer is X, not Y.",
    "The answer is not Y but X.",
    "The answer is not Y, it is X.",
    "The answer isn't Y. It's X.",
    "It is neither Y nor Z but X.",
    "X rather than Y",
    "X, rather than Y.",
    "X instead of Y",
    "X, not Y",
    "X and not Y",
    "X but not Y",
    "Not Y but X",
    "Rather than Y, I choose X.",
    "X is right",
    "X is correct.",
    "X is the correct answer.",
    "X is the best option.",
    "X is clearly the most likely answer.",
    "Option X is correct.",
    "Option X is correct. Option Y is incorrect.",
    "Option Y is incorrect. Option X is correct.",
    "X is correct, Y and Z are wrong.",
    "Y is wrong, so X.",
    "Y is wrong and X is right.",
    "Y and Z are wrong. X",
    "Y: incorrect. X: correct.",
    "Y? No, X.",
    "Is it Y? No, it is X.",
    "I was thinking of Y or Z, but I choose X.",
    "It could be Y or X, but the answer is X.",
    "Both X and Y are possible, but X is the best answer.",
    "The answer is Y. Wait, the answer is X.",
    "Before the door closes, so X.",
    "Therefore the right choice is (X).",
    "Thus, X.",
    "I'd go with X.",
    "I would say X.",
    "I think it is X.",
    "I think it's X",
    "It looks like X to me.",
    "It must be X.",
    "I pick X over Y.",
    "If it were Y, he would sit, so X.",
    "If the answer is Y he sits. The answer is X.",
    "<think>Y. a cat is seen, so Y?</think><answer>X</answer>",
    "<think>Y</think>X",
    "the answer is Y</think> X",
    "<thinking>Y</thinking>\n\nX",
    "<answer>X</answer>",
    "<answer>X",
    "<answer> (X) red </answer>",
    "<Answer>X</Answer>",
    "The first is Y.<answer>X</answer>",
    r"\boxed{X}",
    r"The answer is $\boxed{\text{X}}$.",
    "Ｘ",
    "Ｘ．",
    "（Ｘ）",
    "Ｘ：red",
    "答案是Ｘ。",
    "答案：X",
    "选X",
    "不是Y，是X。",
    "'X'",
    "The answer is 'X'.",
    "The answer is X (not Y).",
    "The answer is X rather than Y or Z.",
    "X. It is not Y.",
    "Options Y and Z can be ruled out, leaving X.",
    "Among the options, X fits best.",
    "The letter is X.",
    "My choice: X",
    "It's X, I'm sure.",
    "Sure! X.",
    "Answer - X",
    "Answer = X",
    "The man opens the door. (X)",
    "The correct answer is:\n\nX. red",
    "I'm not sure, but X.",
    "I am not sure. X",
    "not sure: X",
    "X (not sure)",
    "X. It is not Y. It is red.",
    "X. The man in Y is seen later.",
    "W. red\nX. green\n\nAnswer: X",
    "The man (X) is seen",
    "X\n",
    "The answer to the question is X.",
    "Of the options, the answer that fits is X.",
    "X (red)",
    "Based on the video, the answer is option (X), a red car.",
    "I'm going with X.",
    "My answer is X, since Y shows a dog.",
    "The correct answer: X (Y is wrong)",
    "X seems to be the right answer.",
    "X, definitely.",
    "Definitely X.",
    "Probably X",
    "Hence the answer is X, not Y or Z.",
    "The answer is not Y or Z but X.",
    "The answer should be X; Y and Z are wrong.",
    "Y is not right. X is.",
    "<think>so Y</think>\nThe answer is X.",
    "<reasoning>so Y</reasoning>X",
    "<THINK>so Y</THINK>X",
    "<think></think>X",
    "[[X]]",
    "{X}",
    "<X>",
    "Answer: <X>",
    '"answer": "X"',
    '{"answer": "X"}',
    "<|begin_of_box|>X<|end_of_box|>",
    "X<|im_end|>",
    "The answer's X.",
    "that's X",
    "It would be X.",
    "X fits, Y doesn't.",
    "Y does not fit; X does.",
    "Answer: Y. Correction: X.",
    "option x is correct",
    "Not Y, X.",
    "X without a doubt",
    "Without a doubt it is X.",
    "There is no doubt that it is X.",
    "It could only be X.",
    "It could be Y, but the answer is X.",
    "I doubt that it is Y, so X.",
    "Y is the wrong answer. X is right.",
    "X is right and Y is wrong.",
    "The thing that is not seen is X.",
    "The answer is X.\n\nQuestion: What comes next?\nY. red\nAnswer: Z",
    "X\nuser\nWhich? Answer: Y",
    "Answer: X\nuser: Answer: Y",
    "不应该选Y,应选X",
    "Y错误,答案是X",
    "The answer is Y. Actually, X.",
    "The answer is X on the basis of the video",
    "X<|im_end|>\n<|im_start|>user\nAnswer: Y",
]
# ... and these mean nothing, or several.
MEANS_NONE = [
    "X or",
    "The answer is X or",
    "X or none of them",
    "The answer is X or something else.",
    "X or Y",
    "Either X or Y.",
    "X and Y",
    "X or Y or Z",
    "X, Y",
    "X,Y,Z",
    "X/Y",
    "X & Y",
    "Both X and Y.",
    "Both X and Y are correct.",
    "(X) or (Y)",
    "X) or Y)",
    "X. Or Y.",
    "X; Y",
    "X Y",
    "X\nY",
    "The answer is X or Y.",
    "The answer is either X or Y.",
    "The answer could be X or Y.",
    "Answer: X and Y",
    "Answer: X, Y",
    "Answer: X/Y",
    "I would choose X or maybe Y.",
    "It is between X and Y.",
    "I cannot decide between X and Y.",
    "W. red\nX. green\nY. blue\nZ. white",
    "(W) red (X) green (Y) blue (Z) white",
    "W: red, X: green",
    "X. red. Y. blue.",
    "Neither X nor Y.",
    "It is neither X nor Y.",
    "The answer is neither X nor Y.",
    "Not X.",
    "not X",
    "It is not X.",
    "It isn't X.",
    "The answer is not X.",
    "The answer isn't X.",
    "The answer can't be X.",
    "The answer cannot be X.",
    "I don't think it is X.",
    "I do not think the answer is X.",
    "I don't believe that the correct answer is X.",
    "I would not choose X.",
    "X is wrong.",
    "X is incorrect.",
    "X is not correct.",
    "X isn't right.",
    "X is clearly not the answer.",
    "X can't be right.",
    "Option X is ruled out.",
    "X and Y are wrong.",
    "Anything but X.",
    "Not X or Y.",
    "It is not X, Y or Z.",
    "I can rule out X.",
    "All of the above",
    "None of the above.",
    "I don't know.",
    "I think the man walks.",
    "X man walks by",
    "I see X man in the picture.",
    "There is X dog.",
    "The answer is X dog.",
    "He watches X-shaped lights.",
    "Is it X?",
    "Is it X or Y?",
    "If it were X, he would sit.",
    "<think>It is X, so the answer is X",
    "<think>X</think>",
    "The answer is",
    "Answer:",
    "<answer></answer>",
    "He joins team X.",
    "Ｘ和Ｙ",
    "Ｘ or Ｙ",
    "All but X are wrong.",
    "No option fits: not X, not Y.",
    "I'm not sure, X or Y.",
    "W. red X. green Y. blue",
    "Options: (X) and (Y)",
    "I would go with X or Y.",
    "Maybe X, maybe Y.",
    "X? Y?",
    "<think>X or",
    '{"answer": "X or Y"}',
    "It is unlikely to be X.",
    "Definitely not X.",
    "Certainly not X or Y.",
    "It was never X.",
    "No, not X.",
    "X is not it.",
    "X: no",
    "X is out.",
    "X does not match the video.",
    "X doesn't fit.",
    "The answer is anything except X.",
    "Without X",
    "Nobody would choose X",
    "X is far from correct",
    "I'm not sure that it is X",
    "I doubt X is correct",
    "I doubt that X is correct",
    "X is the wrong answer.",
    "X is the incorrect option.",
    "X is one of the wrong options.",
    "X is the least likely.",
    "X is less likely.",
    "X would be wrong.",
    "X is doubtful.",
    "X is unclear.",
    "Hardly X.",
    "There's no way it's X.",
    "It is false that X is the answer.",
    "It would be a mistake to choose X.",
    "The answer isn't necessarily X.",
    "X is contradicted by the video.",
    "X could be right, as could Y.",
    "X... or Y?",
    "X, but also Y",
    "The sign says X.",
    "The letter X is seen on the wall.",
    "Could it be X",
    "I could say X, but the video is unclear.",
    "不应该选X",
    "不能选X",
    "X不对",
    "X错误",
    "除了X",
    "并非X",
    "Hmm, X? Or Y.",
    "X along with Y",
    "from X to Y",
    "It might be X.",
    "Is it X",
    "I have doubts that the answer is X.",
    "X as well as Y",
    "X is probably wrong.",
    "The answer is x",
    "answer: x, y",
    "user: Answer: X",
    "option x is wrong",
]
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


def permuted(text, letters):
    """The text with other letters in the places of W, X, Y and Z, as wide or small as those."""
    order = dict(zip("WXYZ", letters, strict=True))
    wide = {ord(old) + 0xFEE0: ord(new) + 0xFEE0 for old, new in order.items()}
    order |= {old.lower(): new.lower() for old, new in order.items()}
    alone = r"(?<![A-Za-z])[WXYZwxyz](?![A-Za-z])"
    return re.sub(alone, lambda match: order[match[0]], text).translate(wide)


@pytest.mark.parametrize(
    ("text", "means"),
    [*((text, "X") for text in MEANS_X), *((text, None) for text in MEANS_NONE)],
    ids=repr,
)
def test_no_letter_is_favoured(text, means):
    for letters in itertools.permutations("ABCD"):
        asked = permuted(text, letters)
        wanted = letters["WXYZ".index(means)] if means else None
        assert read_answer(asked, dict.fromkeys("ABCD", "")) == wanted, asked


def test_a_ninth_option_is_not_the_writer():
    options = dict.fromkeys("ABCDEFGHI", "")
    assert read_answer("I think I see it.", options) is None
    assert read_answer("I think the answer is I.", options) == "I"
    assert read_answer("I would choose D", options) == "D"


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("red", "B"),
        ("It is not red.", None),
        ("red or something else, I think a dog", None),
        ("It isn't a dog", None),
        ("It is not a dog but red.", "B"),
        ("It is red, blue rather than red", "C"),
        ("a dog is wrong; it is red", "B"),
        ("<think>a dog?</think>red", "B"),
        ("A red car.", "A"),
        ("The answer is red, blue.", "C"),
        ("First it is red, but I think it is a dog. The answer is a dog", "D"),
        ("I think it is (A) a red car", "A"),
        ("a cat", None),
        ("red or a dog", None),
        ("I doubt it is red", None),
        ("I don't think it is a dog.", None),
        ("It could be a dog", None),
        ("red is unclear", None),
        ("The sign says red", None),
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
        "Which?\nA．one\nB．two words",
        "Which?\n**A.** one\n**B.** two words",
        "Which?\n- A. one\n- B. two words",
        "Which?\n(a) one\n(b) two words",
        "Which?\nB. two words\nA. one",
        "Which?\nA. one\nB. two words\nAnswer like this:\nA. some words",
        "Which?\nA. one\nB. two words\nAn example:\nA. red\nB. blue",
        "<options> \n{'A': 'one', 'B': 'two words'} \n</options>",
    ],
)
def test_options_are_found_in_a_prompt(prompt):
    assert options_of(prompt) == {"A": "one", "B": "two words"}


def test_what_only_looks_like_a_dict_is_none():
    assert options_of("Which?\n{'A': don't}\nA. one\nB. two") == {"A": "one", "B": "two"}


def test_options_in_another_order_are_all_found():
    prompt = "Which?\nA. one\nC. three\nB. two"
    assert options_of(prompt) == {"A": "one", "B": "two", "C": "three"}
    assert options_of(f"C. Watch the video.\n{prompt}") == options_of(prompt)


def test_numbers_are_read_as_they_are_meant():
    options = {"A": "1", "B": "2", "C": "12", "D": "3"}
    for text, letter in (
        ("There are 2.", "B"),
        ("12", "C"),
        ("2, not 1", "B"),
        ("more than 2", None),
        ("2 or 3", None),
        ("1.5", None),
        ("-2", None),
        ("at 2:30", None),
        ("12:00", None),
        ("2%", None),
    ):
        assert read_answer(text, options) == letter, text


def test_no_is_an_answer_only_where_it_stands_alone():
    options = {"A": "yes", "B": "no"}
    for text, letter in (("no idea", None), ("No, he sits.", "B"), ("The answer is no.", "B")):
        assert read_answer(text, options) == letter, text


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
    # Another number of the doc says nothing of the answer.
    assert right_letter("2", {"id": 2, "answer": "2"}, {"A": "2", "B": "4", "C": "6"}) == "A"
    assert right_letter("0", {"qid": 0, "answer": "0"}, {"A": "3", "B": "0"}) == "B"
    assert right_letter("2", {"answer": 2}, {"A": "2", "B": "4", "C": "6"}) == "A"


def test_plain_words_keep_what_tells_answers_apart():
    assert plain("B. At  3 s.") == plain("at 3 s")
    assert plain("red, blue") != plain("blue, red")
