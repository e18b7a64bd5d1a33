"""Reads which option of a multiple-choice question an answer means, as people write answers.

    read_answer("Before the door closes, so C.", {"A": "a cat", "B": "a dog", "C": "a cow"})  # "C"

A benchmark's own reader makes its own score; this one reads every benchmark alike, says when it
cannot read an answer, and never guesses. Every letter is read by the same rules: a letter is only
taken for an option where the words on both sides of it fit one, so that "A man" is none.
"""

import re
import unicodedata
from typing import NamedTuple


def _any(*phrases):
    """A pattern for one of the phrases; each string holds several, at its commas."""
    listed = [phrase.strip() for one in phrases for phrase in one.split(",")]
    return "(?:" + "|".join(sorted(listed, key=len, reverse=True)) + ")"


# One letter, with brackets or without: no part of a word, a name or an abbreviation, and not "I".
_WRITER = r"I\s+(?:think|guess|believe|say|see|know|choose|would|will|can|am|was|have)\b"
_ONE = (
    rf"(?:option\s+|choice\s+)?[(\[]?(?<![A-Za-z0-9'.&-])(?!{_WRITER})([A-Z])"
    r"(?![A-Za-z0-9'&]|-\w|\.\w)[)\]]?"
)
_SINGLE = re.compile(_ONE)
# Letters that are named together: "A or B", "A, B and C", "A/B", "A. Or maybe B", "A to B".
_TOGETHER = _any(
    "and/or, and, and then, or, nor, to, plus, along with, together with, as well as",
    "alternatively",
    "but (?:also|equally|maybe|perhaps|possibly|(?:it )?(?:could|might|may) be)",
)
_JOIN = (
    rf"(?:\s*[,/&+–]\s*|\s*[,;]?\s+\(?{_TOGETHER}\s+"
    rf"|\s*[.?!]+\s+{_any('or, maybe, perhaps, possibly')}\s+"
    rf"|\s*[和或、]\s*|(?<![)\]])\s+(?![(\[]))"
    rf"(?:{_any('maybe, perhaps, possibly, else, even, also')}\s+)?"
)
_LETTERS = re.compile(f"{_ONE}(?:(?i:{_JOIN}){_ONE})*")

# What may stand before a letter that names an option: an edge, a mark, writing without spaces, or
# one of these words. It is what tells the option A from the article.
_OTHER = r"[^\x00-\x7f]"
_BEFORE = re.compile(
    rf"(?:^|\n|[^\w\s]|{_OTHER}|\b"
    + _any(
        "is, be, are, not, nor, and, or, but, than, of, for, to, like, (?:go|going|stick) with",
        "say, think, guess, believe, that, between, both, either, neither, answer, option",
        "choice, letter, choose, chose, chosen, select, pick, picked, so, therefore, thus, hence",
        "it, its, as, in, out, eliminate, exclude, leaving, leaves, match(?:es)?, fits?, supports?",
        r"towards?, sequence, statement, \w+ly, \w+'s",
    )
    + r")\s*$",
    re.IGNORECASE,
)
# What may follow a letter that is chosen: an end, a mark, a reason, a rejected other, or a verb
# that agrees ("is the best", "is seen", "fits"). All else that is said of an option leaves it
# open: what speaks against one is said in too many ways to be listed.
_HOW = r"(?:(?!part|near|hard|bare|scarce)\w+ly\s+)?"
_IS = (
    r"(?:is|are|was|looks|seems|appears|(?:must|would|should|will|has to) be)\s+(?:to be\s+)?"
    f"{_HOW}"
)
_BEST = (
    rf"(?:{_IS}(?:the\s+)?(?:(?:only|single|correct|right|best|most (?!un|im|in)\w+)\s+)*"
    + _any(
        "correct, right, best, better, true, answer, option, choice, match, accurate, likely",
        r"closest, one(?! of), most (?!un|im|in)\w+",
    )
    + r"|(?:is|does)(?=\s*(?:[.,;!]|$)))\b"
)
_FITS = (
    rf"(?:{_IS}{_any('seen, shown, visible, depicted, described, supported, consistent, what, it')}"
    rf"|(?:best\s+|clearly\s+|{_HOW})"
    + _any(
        "fits, matches, describes, reflects, represents, explains, happens, happened, occurs",
        "identifies, captures, depicts, corresponds, does match, does fit",
    )
    + r")\b"
)
_AFTER = re.compile(
    rf"\s*(?:$|[^\w\s?]|{_OTHER}|\n)|\s+(?:(?i:{_BEST}|{_FITS})|"
    + _any(
        "as, and, or, nor, but, not, because, since, rather, instead, than, over, according",
        "based, given, due, for, from, in, on, at, to, with, without, while, if",
        "probably, definitely, certainly, clearly, surely, it is",
    )
    + r"(?![\w-]))"
)

# What denies an option, before it ("I don't think that the answer is A") or after it.
_BRIDGE = _any(
    "think, believe, say, choose, pick, select, call, that, it, it'?s, is, are, was, be, to, the",
    "(?-i:an?), correct, right, best, answer, option, choice, letter, would, could, either, longer",
    "really, simply, just, only, necessarily, should",
    "(?:sure|certain|convinced) (?:that|if|it)",
)
_NEGATED = re.compile(
    r"(?:\b"
    + _any(
        "not, cannot, never, unlikely, neither, nor, than, instead of, except, except for",
        "unlike, no longer, all but, anything but",
        "everything but, any but, wrong, hardly, scarcely, barely, as for",
        "rul(?:e[sd]?|ing) out, eliminat(?:e[sd]?|ing), exclud(?:e[sd]?|ing), reject(?:s|ed|ing)?",
    )
    + r"\b|n['\s]t\b|\b(?:is|are|was|were|do|does|did|ca|wo|would|could)nt\b)"
    rf"(?:\s+{_BRIDGE}\b|\s*[:,(\[])*\s*$"
    r"|(?:[不非别][^\x00-\x7f、。]{0,4}|排除|除了?)\s*$",
    re.IGNORECASE,
)
_HEDGED = _any("could, might, may, maybe, perhaps, possibly")
_DENYING = _any(
    "wrong, incorrect, false, unclear, doubtful, unlikely, impossible, ruled out, off, poor, bad"
)
_REJECTED = re.compile(
    r"\s*(?:,\s*)?(?:(?:is|was|does|did|has|are|were|can|could|would)(?:n'?t|'t|\s+not|\s+never)\b"
    rf"|(?:is|are|was|were|seems?|looks?)\s+(?:an?\s+)?(?:\w+ly\s+)?{_DENYING}\b"
    rf"|[:(,=-]\s*(?:\w+ly\s+)?{_DENYING}\b|[:-]\s*(?:not|no)\b|[(,]\s*no\b(?!\s+doubt)"
    rf"|,?\s*{_HEDGED}\b(?!\s+only)|[✗✘❌])"
    r"|\s*(?:选项|答案|是|并|也|都)*(?:不|错|有误)|\s*(?:では(?:ありません|ない)|じゃない|[가이]\s*아[니닙])",
    re.IGNORECASE,
)
# What is not said but asked, supposed or doubted: "Is it A?", "if the answer is A", "maybe A", "I
# doubt that it is A"; and what is only quoted: "the sign says A", "the letter A is on the wall".
_SUPPOSED = re.compile(
    rf"\b{_any('if, whether, unless, suppose, supposing, assuming')}\b[^.,?!\n]{{0,40}}$"
    rf"|(?:(?<!no )(?<!without )(?<!without a )\bdoubt(?:s|ful|ed)?\b"
    r"|\bno(?:body|ne| one| way| reason| evidence)\b"
    rf"|\b{_any('false, untrue, wrong, mistake, error, not true')}\s+{_any('to, that')}\b"
    rf"|\b{_HEDGED}\b(?!\s+only)|(?:^|[.?!\n]\s*)is (?:it|this|that|the answer)\b)"
    r"[^.,:;?!\n]{0,60}$"
    rf"|\b{_any('says, said, reads, spells, written, asks')}\b[^.,;?!\n]{{0,40}}$"
    r"|\bshows?\b[\s:,(]*$|[✗✘❌]\s*$|(?:^|[.?!\n]\s*)the letter\s+$"
    rf"|\b{_any('some, people, many, others, one')}\b[^.,;:?!\n]{{0,20}}"
    rf"\b{_any('say, think, argue, choose, pick')}\b[^.,;?!\n]{{0,40}}$"
    r"|\b(?:let'?s say|(?:as good|as well) as|(?:equal|similar|close) to|something like)\s*$"
    r"|\beither\b[^.,;:?!\n]{0,60}$|(?:^|[.?!\n]\s*)were\b[^.,;:?!\n]{0,40}$"
    r"|(?:^|[.?!\n]\s*)(?:if (?!i had to|i must)|had )[^.?!\n]{0,80}\bwould\b[^.,;:?!\n]{0,30}$",
    re.I,
)
# What leaves a letter open that is named before it: "A?", "A, or", "A (maybe B)".
_LEFT_OPEN = re.compile(
    rf"[\s,(]*(?:\?|{_any('or, maybe, perhaps, possibly, alternatively, otherwise')}\b"
    r"|if (?:not|anything)\b|and so on\b|at first\b)|[.!]\s*or\b|[^.,;:!?\n]*\?",
    re.I,
)
# Words that speak against an option wherever they stand in its clause, or after it in there.
_CLAUSE = re.compile(
    r"[.,;:!?()\n]|\s[-–—]\s"
    r"|\b(?:and|but|so|therefore|thus|hence|because|since|as|while|though|although|than)\b",
    re.I,
)
_AGAINST = re.compile(
    r"\b(?:least|worst|worse|opposite|wrong|incorrect|bad|poor|refuse|impossible|hard to"
    r"|difficult to|hesitate|disagree|rarely|seldom|distractor|trap|mistake|leav(?:es|ing) out"
    r"|(?:another|previous) question)\b",
    re.I,
)
_AGAINST_AFTER = re.compile(
    r"\b(?:less|too|badly|poorly|not(?! [A-Z]\b|\s*$)|exclude|eliminate|reject|if|unless"
    r"|in part|at first)\b|n't\b|\bonly (?:in|at|for|when)\b|\bhalf\b"
)
# "A describes a dog, but ...": such a verb says what an option is, and the rest may deny it.
_DENIED_LATER = re.compile(rf"\s+{_FITS}[^.;\n]*\b(?:but|which is not|not shown|not seen)\b", re.I)

# What leads to the option that is meant, "the right choice is", "Answer:", "so", or confirms it.
_CUE = (
    # Not "each option:", "each possible answer:", which lead to all of them.
    r"(?<!\beach )(?<!\bevery )(?<!\ball )(?<!\bany )(?<!\bboth )(?<!\bother )(?<!\banswer )"
    r"(?<!\bby )(?<!\bpossible )(?<!\bcandidate )"
    r"\b(?:ans(?:wer(?:'?s)?|\.)?|(?:option|choice|letter)(?=\s*(?:is\b|:|=|would|should|must))|"
    + _any(
        r"correction, actually(?=[^\w\s]), choose, chose, select, pick, go(?:ing)? with, conclude",
        "say, so, therefore, thus, hence",
        "it must be, it has to be, it would be, it'?s, it is, that'?s",
    )
    + r")\b[\s,:=>-]*(?:"
    + _any(
        "is, are, be, would, should, must, has to, to, option, choice, answer, letter, that, it",
        "definitely, clearly, certainly, probably, most, likely, therefore, thus, indeed, still",
    )
    + r"\b[\s,:=>-]*)*"
)
# What says that the options are gone through, which names them all: "Let's evaluate each choice:".
# A letter alone after it is no list: "After weighing the options: B."
_GOES_THROUGH = re.compile(
    r"(?:\b(?:analy[sz]\w*|evaluat\w*|examin\w*|assess\w*|consider\w*|review\w*|compar\w*|"
    r"look\w* at|go\w* (?:through|over)|break\w* down|check\w*|discuss\w*|weigh\w*|verif\w*|"
    r"test\w*|tak\w*|rul\w* out|eliminat\w*|each|every)\b[^.:,\n]*"
    r"\b(?:options?|choices?|answers?|alternatives?|possibilit\w+|candidates?|one by one)"
    r"|\b(?:option by option|(?:options?|choices?|answers?) analysis))\b[\w' ]{0,40}[:.\n]"
    r"(?!\W*[A-Z]\W*$)",
    re.IGNORECASE,
)
_LED = re.compile(rf"(?:{_CUE}|(?:答案|选项?|選|选择|应选)\s*(?:是|为|:)?\s*)$", re.IGNORECASE)
_CONFIRMED = re.compile(rf"\s*(?:\([^)]*\)\s*)?,?\s*{_BEST}", re.IGNORECASE)


class _Mention(NamedTuple):
    """Letters that are named together, not denied: where they end, and how they are named."""

    letters: frozenset
    start: int
    end: int
    led: bool  # by what says that the answer follows, or is here
    marked: bool  # as a list marks its items: "A." or "(A)"


def read_answer(text: str, options: dict[str, str]) -> str | None:
    """The letter that `text` means, or None where it means none or several.

    options: letter to words ({} as words where only letters are known). A letter that is not on
    offer is no answer. An answer may be the words of an option instead of its letter. Of several
    conclusions the last one counts; what is denied, asked, supposed or only thought of does not.
    """
    text = _clean(text)
    asked = text.endswith("?")  # then words are an answer only where they are a question
    words = {
        letter: plain(option)
        for letter, option in options.items()
        if option and (not asked or "?" in option)
    }
    said = plain(text)
    for letter, option in words.items():
        if said in (option, f"{letter.lower()} {option}"):
            return letter
    alone = r"(?:not\s+[A-Z],\s+)?[(\[{<]?\s*(?:option |choice )?([A-Za-z])\s*[])}>.:,!]*"
    if match := re.fullmatch(alone, text, re.IGNORECASE):
        letters = {match[1].upper()}
    else:
        letters = _meant(text, words, set(options))
    if match := re.fullmatch(r"([A-Z]):\s*\(?([A-Z])\)?\W*", text):  # "A" may be the answer's sign
        letters = {*match.groups()}
    letter = letters.pop() if len(letters) == 1 else None
    return letter if letter in options else None


def _clean(text):
    """The answer alone: no thoughts, tags, mark-up or quotes, letters in ASCII and in capitals."""
    text = unicodedata.normalize("NFKC", text).replace("’", "'")
    text = "".join(char for char in text if unicodedata.category(char) != "Cf")  # without width
    thought = r"(?:think\w*|thought|reason\w*|reflect\w*|scratchpad)"
    text = re.sub(rf"(?is)<({thought})>.*?(</\1>|$)", " ", text)
    text = re.split(rf"(?i)</{thought}>", text)[-1]  # some templates open it in the prompt
    text = re.sub(r"(?i)^\W*assistant\s*[:\n]", "", text)
    # Another turn is no part of the answer.
    mark = r"(?:<[^<>]*>|[ \t*_#])*"
    turn = rf"^{mark}(?:user|human){mark}(?::|$)|(?<=\n){mark}question{mark}:"
    text = re.split(f"(?im){turn}", text)[0]
    if answers := re.findall(r"(?is)<answer>(.*?)(?=</answer>|<answer>|$)", text):
        text = answers[-1]
    if boxed := re.findall(r"\\boxed\{\s*(?:\\text\w*\{)?([^{}]*)\}", text):
        text = f"answer: {boxed[-1]}"
    text = re.sub(r"<[^<>]{2,}>|[$\\]", " ", text)
    text = re.sub(r"[*_`\"“”‘]", "", text).strip().strip("'")
    text = re.sub(r"(?<!\w)'(\w)'(?!\w)", r"\1", text)

    def capital(match):
        return match[0][:-1] + match[0][-1].upper()

    text = re.sub(r"^[a-z](?=[.):]\s)|(?<![\w)])[(\[][a-z](?=[)\]])", capital, text)
    # A small letter where the text breaks off may be the article: "the answer is a".
    named = r"(?i:\b(?:ans(?:wer)?|option|choice|letter)\b[\s:=]*(?:is\b[\s:]*)?)\b[a-z]"
    ends = r"(?=\s*(?:[.,;:)!?\n]|$)|\s+(?:is|seems|fits|matches)\b)(?!\W+[a-z]\b)"
    return re.sub(rf"(?!(?i:\w+ is \w$)){named}{ends}", capital, text)


def _meant(text, words, offered):
    """The letters that a cleaned text means."""
    mentions = _mentions(text)
    if led := [one for one in mentions if one.led]:
        return set(led[-1].letters)
    through = _GOES_THROUGH.search(text)
    if through and not (mentions and mentions[0].start < through.start()):
        return set()  # an item of the list is no answer, and where it breaks off none came
    marked = set().union(*(one.letters for one in mentions if one.marked))
    if mentions and re.match(r"[.:,)]|\s*(\n|$)", text[mentions[0].end :]):
        if mentions[0].start == 0:  # "B. a red car", but not a list of the options
            return marked | mentions[0].letters
    if bracketed := {one for one in marked if f"({one})" in text} & offered:
        return bracketed
    # What follows the last "answer is", if anything does, before the whole text.
    tail = re.split(f"(?i){_CUE}", text)[-1]
    lead = text[: len(text) - len(tail)]
    denied = _NEGATED.search(lead) or _SUPPOSED.search(lead)
    for part in (text,) if denied else (tail, text):
        if len(named := _named(part, words)) == 1:
            return named
    return set().union(*(one.letters for one in mentions)) & offered


def _is_spoken_against(before, after):
    """Whether the clause of an option, which stands between two texts, speaks against it."""
    own, rest = _CLAUSE.split(before)[-1], _CLAUSE.split(after)[0]
    return bool(_AGAINST.search(own + rest) or _AGAINST_AFTER.search(rest))


def _mentions(text):
    """The `_Mention`s of a text, in order: letters that are named, and not denied or left open."""
    found = []
    for group in _LETTERS.finditer(text):
        # What is farther off than 200 characters says nothing of a letter.
        before, after = text[max(group.start() - 200, 0) : group.start()], text[group.end() :]
        bracketed = group[0][-1] in ")]"
        marked = bracketed or bool(re.match(r"[.:]\s", after))
        # "A?" is asked; "A or", of which the rest is missing or no letter, is left open.
        is_open = _LEFT_OPEN.match(after) or _SUPPOSED.search(before) or _DENIED_LATER.match(after)
        follows = bracketed or _AFTER.match(after)
        if is_open or not follows or _REJECTED.match(after) or _NEGATED.search(before):
            continue
        # What follows a bracket may be the option's own words.
        if _is_spoken_against(before, "" if bracketed else after):
            continue
        if marked or _BEFORE.search(before):
            letters = frozenset(one[1] for one in _SINGLE.finditer(group[0]))
            led = bool(_LED.search(before) or _CONFIRMED.match(after))
            found.append(_Mention(letters, group.start(), group.end(), led, marked))
    return found


def plain(words):
    """The words alone: small, single spaces, no option's letter before and no full stop after."""
    words = re.sub(r"^\s*\(?[A-Z][.):]\)?\s+", "", words)
    return " ".join(re.sub(r"[^\w\s.:%-]", " ", words.lower()).split()).strip(". ")


def _named(text, words):
    """Letters of the options whose words `text` has, not in those of a longer one, not denied."""
    if "no" in words.values():  # "no idea" is not the answer "no"
        text = re.sub(r"(?i)\bno\s+(?=\w)", "no-", text)
    text, found = plain(text), set()
    for letter, option in sorted(words.items(), key=lambda item: -len(item[1])):
        alone = rf"(?<![\w-])(?<!\d[.:]){re.escape(option)}(?!\w|%|[.:]\d|-\w)"
        match = option and re.search(alone, text)
        if match:
            before, after = text[: match.start()], text[match.end() :]
            text = before + " \n " + after
            denied = _NEGATED.search(before) or _REJECTED.match(after)
            if not (denied or _SUPPOSED.search(before) or _is_spoken_against(before, after)):
                found.add(letter)
    return found
