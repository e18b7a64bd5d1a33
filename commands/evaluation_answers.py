"""Reads which option of a multiple-choice question an answer means, as people write answers.

    read_answer("Before the door closes, so C.", {"A": "a cat", "B": "a dog", "C": "a cow"})  # "C"

A benchmark's own reader makes its own score; this one reads every benchmark alike, says when it
cannot read an answer, and never guesses.
"""

import ast
import re

# What leads to the letter that is meant: "the right choice is (B)", "Answer: C", "so C".
_CUE = (
    r"(?:answer|option|choice|choose|select|pick|so|therefore|thus|hence)\b[\s,:=]*"
    r"(?:(?:is|would be|should be|must be|option|choice|answer|letter)\b[\s,:=]*)*"
)
# A letter by itself; "A" and "I" before a small word are words of a sentence, unless it is a verb.
_WORD = r"\s+(?!(?:is|seems|looks|because|since)\b)[a-z]"
_LETTER = rf"\(?(?<![A-Za-z0-9'])(?<!not )([B-HJ-Z]|[AI](?!{_WORD}))(?![A-Za-z0-9'])\)?"


def read_answer(text, options):
    """The letter that `text` means, or None.

    options: letter to words ({} as words where only letters are known). A letter that is not on
    offer is no answer. An answer may be the words of an option instead of its letter.
    """
    text = re.sub(r"[*_`\"“”‘’]", "", text).strip().strip("'")
    words = {letter: plain(option) for letter, option in options.items() if option}
    said = plain(text)
    for letter, option in words.items():
        if said == option:
            return letter

    letter = None
    if match := re.fullmatch(r"\(?([A-Za-z])[.):,]*", text):
        letter = match[1].upper()
    elif cued := re.findall(f"(?i:{_CUE}){_LETTER}", text):
        letter = cued[-1]
    elif match := re.match(r"\(?([A-Z])(?:[.):,]+|\s*\n)(?=\s|$)", text):
        letter = match[1]
    elif bracketed := set(re.findall(r"\(([A-Z])\)", text)) & set(options):
        letter = bracketed.pop() if len(bracketed) == 1 else None
    if letter is not None:
        return letter if letter in options else None

    # What follows the last "answer is", if anything does, before the whole text.
    tail = re.split(f"(?i){_CUE}", text)[-1]
    for part in (tail, text):
        if len(named := _named(plain(part), words)) == 1:
            return named.pop()
    alone = {found for found in re.findall(_LETTER, text) if found in options}
    return alone.pop() if len(alone) == 1 else None


def options_of(prompt):
    """The options that a prompt lists, letter to words: "A. ...", "(A) ...", or as a dict."""
    if match := re.search(r"\{'A': .*\}", prompt):
        return ast.literal_eval(match[0])
    options = {}
    for letter, words in re.findall(r"^[ \t]*\(?([A-Z])[.):][ \t]*(\S.*)$", prompt, re.MULTILINE):
        if letter == "A":
            options = {}
        if letter == chr(ord("A") + len(options)):
            options[letter] = words.strip()
    return options if len(options) > 1 else {}


def right_letter(target, doc, options):
    """The letter of the right option, from what a task calls the target of its doc, or None.

    Tasks give a letter ("B", "(B)", "B. a cow"), the words, or the number of the option from 0.
    """
    for given in (target, doc.get("answer")):
        # Logged targets are strings; the doc still knows that one was a number.
        number = next((v for v in doc.values() if type(v) is int and str(v) == str(given)), None)
        if number is not None and 0 <= number < len(options):
            return chr(ord("A") + number)
        if isinstance(given, str) and (letter := read_answer(given, options)):
            return letter
    return None


def plain(words):
    """The words alone: small, single spaces, no option's letter before and no full stop after."""
    words = re.sub(r"^\s*\(?[A-Z][.):]\)?\s+", "", words)
    return " ".join(re.sub(r"[^\w\s.:%-]", " ", words.lower()).split()).strip(". ")


def _named(text, words):
    """Letters of the options whose words stand in `text`, not inside those of a longer option."""
    found = {}
    for letter, option in sorted(words.items(), key=lambda item: -len(item[1])):
        match = option and re.search(rf"(?<!\w)(?<!\d\.){re.escape(option)}(?!\w|\.\d)", text)
        if match:
            text = text[: match.start()] + " \n " + text[match.end() :]
            found[letter] = match
    return set(found)
