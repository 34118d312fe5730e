"""Whether the reply's number is the answer's: a reward that can be checked, for problems with a numeric answer.

A number is read whole and exactly, or not at all. Read are integers and decimals, with thousands separators or a
decimal comma, fractions (a/b, \\frac{a}{b}, ½), mixed numbers, powers, scientific notation, and words of scale
(5 million). Whatever else is written with a digit is no number: a time, a date, a version, a sum not worked out.
"""

import re
import unicodedata
from fractions import Fraction
from typing import Any

MARK = "####"  # GSM8K writes the answer behind it (Cobbe et al. 2021, arXiv 2110.14168)
LONGEST, HIGHEST = 400, 400  # characters of a number, and its exponent; beyond them nothing is worked out
SCALE = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}  # powers of ten
UNITS = "[mck]m|[mk]?g|ml|min|hrs?|mph|st|nd|rd|th"  # that are often written without a space
MONTHS = "Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?|Sep(?:t|tember)?|"
MONTHS += "Oct(?:ober)?|Nov(?:ember)?|Dec(?:ember)?"

# What can be written in several ways is brought to one, in this order. Then & joins the parts of one number, and ~
# stands in what is no number.
CHARACTERS = str.maketrans("−–‐‑－⁄÷×·⋅\u00a0\u2009\u202f", "-----//***   ")
LATEX = (
    (r"\{,\}", ","),
    (r"\\!|\\left|\\right", ""),
    (r"\\[,;: ()\[\]]|\^\{?\\circ\}?", " "),
    (r"\\([$€£¥%])", r"\1"),
    (r"\\(?:times|cdot)(?![a-zA-Z])", "*"),
    (r"(?<=\d)(?=\\[dt]?frac)", " "),
    (r"\\[dt]?frac *\{ *(-?[\d.,]+) *\} *\{ *([\d.,]+) *\}", r"\1/\2"),
    (r"\\[dt]?frac *(\d) *(\d)", r"\1/\2"),
    (r"\\(?:boxed|text|mathrm|mathbf|textbf) *\{([^{}]*)\}", r" \1 "),
)
AROUND_IT = (
    (r"<<[^<>]*>>|</?[a-zA-Z]\w*>|[-=]+>|[→⇒⟹∴…]|\.{2,}", " "),  # GSM8K's calculations, tags, arrows
    (r"(?<=[-+])[$€£¥]", ""),
    (r"[$€£¥%]", " "),
    (r"(?<=\d)(?:\*\*| +\*\* +)(?=[-+\d({])", "^"),
    (r"\*\*|__", " "),  # of bold text
)
SPACED = (
    (r"(?:\A|(?<=[=:(]))\s*- +(?=[\d.])", " -"),
    (r"(?<![\d.,])\d{1,3}(?: \d{3})+(?!\d)", lambda match: match[0].replace(" ", "")),
    (r"(?<=\d) *\^ *[{(]? *([-+]?\d+) *[})]?", r"^\1"),
    (r"(?<=\d) +x +(?=[\d.])", "*"),
    (r"(?<=[\d)]) *([*/+]) *(?=[-+.\d(\\])", r"\1"),
    (r"(?<=[\d)]) +- +(?=[.\d(\\])", "~"),
    (r"(?<![\d.,/^*~&+])(\d+) +(\d+/\d+)(?![\d/])", r"\1&\2"),
    (rf"(?i)(?<=\d) ({'|'.join(SCALE)})s?\b", r"&\1"),
    (rf"(?i)(?<=\d) (?:ten|{'|'.join(SCALE)})ths?\b|(?<=\d) ?[ap]\.?m\b", "~"),
    (rf"\b(?:{MONTHS})\b\.? *(?=\d)|(?<=\d) (?:{MONTHS})\b", "~"),
    (r"(?:[<>]=|\\[lg]eq?(?![a-z])|[<>≤≥≠±√]) *(?=[-+.\d])", "~"),
    (r"(\\[a-zA-Z]+) +(?=\d)", r"\1"),
)
REWRITTEN = [(re.compile(pattern), replacement) for pattern, replacement in (*LATEX, *AROUND_IT, *SPACED)]

PLAIN = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+,\d+|\d+(?:\.\d+)?|\.\d+)"
NUMBER = re.compile(
    rf"(?P<sign>[-+]?)(?:(?P<whole>\d+)&(?=\d+/))?(?P<top>{PLAIN})"
    rf"(?:/(?P<bottom>{PLAIN})|(?:\*(?P<base>\d+))?\^(?P<power>[-+]?\d+)|[eE](?P<exponent>[-+]?\d+))?"
    rf"(?:&(?P<scale>[a-zA-Z]+))?(?:{UNITS})?(?:[-/][^\W\d_]{{2,}})*"
)
# Written together is what no space divides, nor a sign of equality, nor a letter of a script without spaces.
SPACE = r"\s=;—|\"\u3000-\u9fff\uac00-\ud7af\uff01-\uff0f\uff1a-\uff60"
TOGETHER = re.compile(rf"(?:[^{SPACE}]|[百千万亿億萬])+")  # those stand for powers of ten
AROUND = r"[()\[\]{}*_#'`“”‘’.,:!?°\\]"
OUTSIDE = re.compile(rf"^[^\W\d_]{{2,}}[:.]|^(?:(?!\.\d){AROUND})+|[+]?{AROUND}*$")  # what may stand around a number
ITEM = r"(?:0|[1-9]\d*)(?:\.\d+)?"
SEVERAL = re.compile(rf"[-+]?{ITEM}(?:(?:,{ITEM}){{2,}}|-{ITEM})")  # 1,2,3 and 3-5


def numeric_match(prompts: list[str], completions: list[str], answer: list[str], **columns: Any) -> list[float | None]:
    """1.0 where the number of a completion equals that of its `answer`, else 0.0; None where the answer has not one.

    An answer is read behind its last `####`, and without such a mark as a whole; it must hold one number and no other.
    A completion's number is the first after its last `####`, and without such a mark its last one. Numbers of one value
    are equal, as 0.75, 3/4 and 6/8 are. Words, units, currency signs and % around a number make no difference.
    """
    right = [number_of_answer(text) for text in answer]
    return [
        None if number is None else float(number_of(text) == number)
        for text, number in zip(completions, right, strict=True)
    ]


def number_of(text: str) -> Fraction | None:
    """The number that a reply answers with, exactly; None where there is none, or one that cannot be read whole."""
    numbers = numbers_of(text)
    return numbers[0 if MARK in text else -1] if numbers else None


def number_of_answer(text: str) -> Fraction | None:
    """The one number of a known answer; None where it has none, several, or one that cannot be read whole."""
    numbers = numbers_of(text)
    return numbers[0] if len(numbers) == 1 else None


def numbers_of(text: str) -> list[Fraction | None]:
    """What a text has behind its last mark that is written with digits: numbers, and None for anything else."""
    text = text.rpartition(MARK)[2].translate(CHARACTERS)
    text = re.sub("[¼-¾⅐-⅞]", lambda match: f" {unicodedata.normalize('NFKC', match[0])}".replace("⁄", "/"), text)
    for pattern, replacement in REWRITTEN:
        text = pattern.sub(replacement, text)
    together = (word for word in TOGETHER.findall(text) if re.search(r"\d", word))
    return [number for word in together for number in _numbers(word)]


def _numbers(word: str) -> list[Fraction | None]:
    """The numbers of what is written together: one, or those of 1,2,3 and of 3-5."""
    shown = OUTSIDE.sub("", word)
    if len(shown) > LONGEST:
        return [None]
    if match := NUMBER.fullmatch(shown):
        pair = word[0] in "([{" and re.search(r"\d,\d{1,2}(?!\d)", shown)  # (3,4) is no decimal comma
        return [None if pair else _value(match.groupdict())]
    return [Fraction(item) for item in re.findall(ITEM, shown)] if SEVERAL.fullmatch(shown) else [None]


def _value(part: dict[str, str | None]) -> Fraction | None:
    """The value of a number's parts; None for a division by zero, a large exponent, or what is no word of scale."""
    power, exponent = (int(part[name] or 0) for name in ("power", "exponent"))
    if max(abs(power), abs(exponent)) > HIGHEST:
        return None
    number = _decimal(part["top"])
    try:
        if part["bottom"]:
            number = int(part["whole"] or 0) + number / _decimal(part["bottom"])
        elif part["power"]:
            number = number * Fraction(part["base"]) ** power if part["base"] else number**power
    except ZeroDivisionError:
        return None
    number *= Fraction(10) ** (exponent + SCALE.get((part["scale"] or "").lower(), 0))
    return -number if part["sign"] == "-" else number


def _decimal(text: str) -> Fraction:
    """A number without sign; a comma is one of thousands where three digits follow each and no zero leads."""
    thousands = re.fullmatch(r"[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?", text)
    return Fraction(text.replace(",", "" if thousands else "."))
