"""Which options a multiple-choice question has, and which is right, however a task gives them.

options_of("Which?\\nA. a cat\\nB. a dog")  # {"A": "a cat", "B": "a dog"}
"""

import ast
import re
import unicodedata

from commands.evaluation_answers import plain, read_answer

_LISTED = re.compile(
    r"^[ \t]*(?:[-*•][ \t]+)?[*_]*(?:\(([A-Za-z])\)|\(?([A-Z])[.):、])[*_]*[ \t]*(\S.*)$",
    re.MULTILINE,
)
# A line that answers a question before the one that is asked.
_ANSWERED = re.compile(
    r"^\W*(?:(?:the\s+)?(?:(?:correct|best|final)\s+)?answer(?:\s+is)?|assistant|response)\W*[\s:]\W*"
    r"[A-Z](?:\W.*)?$",
    re.MULTILINE | re.IGNORECASE,
)


def options_of(prompt):
    """The options that a prompt lists, letter to words: "A. ...", "(A) ...", or as a dict.

    Of several lists the first counts that stands after questions with their answers; what follows
    the options are examples of answers.
    """
    if match := re.search(r"\{'A': .*\}", prompt):
        try:
            return ast.literal_eval(match[0])
        except (ValueError, SyntaxError):  # it only looks like one
            pass
    prompt = unicodedata.normalize("NFKC", prompt)
    lists = [options for part in _ANSWERED.split(prompt) if (options := _first_list(part))]
    return lists[-1] if lists else {}


def _first_list(text):
    """The first list of options in a text, by their letters; {} where there is none."""
    options, end = {}, None
    for match in _LISTED.finditer(text):
        letter = (match[1] or match[2]).upper()
        if letter in (listed := _from_a(options)):
            if len(listed) > 1:
                break
            options = {}
        follows = end is not None and not text[end : match.start()].strip()
        options[letter], end = (match[3].strip().strip("*_"), follows), match.end()
    options = _from_a(options)
    return options if len(options) > 1 else {}


def _from_a(options):
    """The options from A on, letter to words; up to two may be missing between adjacent lines."""
    listed, last = {}, "@"
    for letter in sorted(options):
        words, follows = options[letter]
        gap = ord(letter) - ord(last)
        if gap > 1 and not (listed and follows and gap <= 3):
            break
        listed[letter], last = words, letter
    return listed


def right_letter(target, doc, options):
    """The letter of the right option, from what a task calls the target of its doc, or None.

    Tasks give a letter ("B", "(B)", "B. a cow"), the words, or the number of the option from 0.
    """
    for given in (target, doc.get("answer")):
        number = _number_of_option(given, doc, options)
        if number is not None and 0 <= number < len(options):
            return chr(ord("A") + number)
        if isinstance(given, str) and (letter := read_answer(given, options)):
            return letter
    return None


def _number_of_option(given, doc, options):
    """The number that the doc gives as the right option's, where it is `given`, or None.

    Logged targets are strings; the doc still knows that one was a number. It is the option's own
    words, if there are such, unless its key says that it counts options.
    """
    worded = plain(str(given)) in {plain(words) for words in options.values()}
    for key, value in doc.items():
        right = re.search(r"(?i)answer(?!s)|correct|label|target|gold|truth|(?:^|_)gt(?:_|$)", key)
        if right and type(value) is int and str(value) == str(given):
            if not worded or re.search("(?i)choice|option|index|idx|label", key):
                return value
    return None
