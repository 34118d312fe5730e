"""Whether the reply's number is the answer's: a reward that can be checked, for problems with a numeric answer.

A number is read whole and exactly, or not at all. Read are integers and decimals, with thousands separators or a
decimal comma, fractions (a/b, \\frac{a}{b}, ½), mixed numbers, powers, scientific notation, and words of scale
(5 million). Whatever else is written with a digit is no number: a time, a date, a version, a sum not worked out, and a
number beside a word or sign that changes its value in a way that is not read (5 bn, 2 thirds, 10 pi, 3 to 1).
"""

import re
import unicodedata
from fractions import Fraction
from typing import Any

MARK = "####"  # GSM8K writes the answer behind it (Cobbe et al. 2021, arXiv 2110.14168)
LONGEST, HIGHEST = 400, 400  # characters of a number, and its exponent; beyond them nothing is worked out
SCALE = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}  # powers of ten
SCALES = "|".join(SCALE)
CURRENCIES = "USD|EUR|GBP|CHF|JPY|CNY|INR"
# what is often written behind a number without a space: units, endings of ordinals, and whole words
UNITS = "[μµmcdk]?m|[μµmk]?g|[mcdk]?[lL]|[mk]?s|h|d|lbs?|oz|ft|in|yds?|mi|mins?|secs?|hrs?|day|yrs?|km/h|kmh|kph|mph|"
UNITS += f"rpm|k?cal|[kMG]?Hz|[kMG]?Wh?|k?J|[kMGT]B|[AVNCF]|{CURRENCIES}|st|nd|rd|th|[^\\W\\d_]{{4,}}"
# what changes the value of the number before it, in a way that is not read: scales, fractions, operations
PARTS = "half|halves|quarters?|thirds?|(?:thir|four|fif|six|seven|eigh|nin|ten|eleven|twelf|[a-z]{3,5}(?:teen|tie)|"
PARTS += f"{SCALES})ths?"
CHANGING = f"{PARTS}|bn|mn|mln|mio|mill?|mrd|tn|trn|crores?|lakhs?|lacs?|dozens?|scores?|gross|tens|tausend|mille|"
CHANGING += "milli(?:on|ard)[a-z]*|millones|billi?on[a-z]*|quadrillions?|тыс[а-я]*|млн|млрд|милли[а-я]*|"
CHANGING += f"{SCALES}|squared|cubed|factorial|pi|below"
LETTERS = "bcefijkno-rt-zBDEGHKMO-UX-Zα-ωΩ"  # a variable or a scale; others are units or words
# what changes the value of the number behind it
LEADING = f"half|third|quarter|twice|thrice|double|triple|dozen|{SCALES}|plus|times|over|point|root|log|ln|sin|cos|tan|"
LEADING += "(?:twen|thir|for|fif|six|seven|eigh|nine)ty|(?:divided|multiplied) +by"
BETWEEN = "plus|minus|times|divided by|multiplied by|over|to|choose|mod|modulo|point|of|out of|in|per"
SIGNED = r"\A|[=:(]|\b(?:is|was|be|are|equals|gives|get)\b"  # a minus behind it is a sign
LARGER = "hours?|hrs?|h|minutes?|mins?|days?|weeks?|months?|years?|feet|foot|ft|pounds?|lbs?|dollars?|euros?|m|km|kg"
SMALLER = "minutes?|mins?|seconds?|secs?|s|days?|hours?|weeks?|months?|inch(?:es)?|in|ounces?|oz|cents?|pence|m|cm|g"
MONTHS = "Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?|Sep(?:t|tember)?|"
MONTHS += "Oct(?:ober)?|Nov(?:ember)?|Dec(?:ember)?"

# What can be written in several ways is brought to one, in this order. Then & joins the parts of one number, and ~
# stands in what is no number.
UNSEEN = "\u00ad\u200b\u200c\u200d\u200e\u200f\u2060\ufeff"
CHARACTERS = str.maketrans("−–‐‑－⁄÷×·⋅\u00a0\u2009\u202f", "-----//***   ", UNSEEN)
LATEX = (
    (r"\{,\}", ","),
    (r"\\!|\\left|\\right", ""),
    (r"(\.\d+|\b0,\d+) *(?:\.{2,}|…|\\[lc]?dots\b)", r"\1~"),  # 0.333...
    (r"\\[,;: ()\[\]]|\^\{?\\circ\}?|\\(?:approx|sim)(?![a-zA-Z])|(?<![\d~])[≈~∼](?= *[-+$€£¥]?[\d.])", " "),
    (r"\\([$€£¥%])", r"\1"),
    (r"\\(?:times|cdot)(?![a-zA-Z])", "*"),
    (r"(?<=\d)(?=\\[dt]?frac)", " "),
    (r"\\[dt]?frac *\{ *(-?[\d.,]+) *\} *\{ *([\d.,]+) *\}", r"\1/\2"),
    (r"\\[dt]?frac *(\d) *(\d)", r"\1/\2"),
    (r"\\(?:boxed|text|mathrm|mathbf|textbf) *\{([^{}]*)\}", r" \1 "),
)
AROUND_IT = (
    (r"<<[^<>]*>>|</?[a-zA-Z]\w*>|(?<![-=])[-=]+>|[→⇒⟹∴…]|\.{2,}", " "),  # GSM8K's calculations, tags, arrows
    (rf"(?<=[-+])(?:[$€£¥]|(?:{CURRENCIES}|Rs)(?=\d))", ""),
    (rf"[$€£¥%]|\b(?:{CURRENCIES}|Rs)(?=\d)", " "),
    (r"(?i)(?<=\d) *(?:°|degrees?\b)? *(?:[CF]|celsius|fahrenheit)? +(?:below|under)\b", "~"),
    (r"(?<=\d) ?°[CF]\b", " "),
    (r"(?<=\d)(?:\*\*| +\*\* +)(?=[-+\d({])", "^"),
    (r"\*\*|__", " "),  # of bold text
)
SPACED = (
    (r"(?i)(?<=\d) +(?:raised +)?to +the +(?:[a-z]+ +)?power\b(?: +of\b)? *", "~"),
    (rf"(?i)(?<=\d) ?(?:{LARGER}),? +(?:and +)?(?=\d+(?:\.\d+)? ?(?:{SMALLER})\b)", "~"),
    (rf"(?i)(?<=\d) +(?:{BETWEEN.replace(' ', ' +')}) +(?:the +)?(?=[-+(]*[.\d\\])", "~"),
    (
        rf"(?i)\bnegative +(?=[.\d])|({SIGNED}) *(?:minus\b|-) +(?=[.\d])|([,;.!?\n]) *minus +(?=[.\d])",
        lambda match: f"{match[1] or match[2] or ''} -",
    ),
    (r"(?i)\bminus +(?=[-+(]*[.\d])|\bnegative +(?=[-+(])", "~"),
    (r"([(\[{]) +(?=[-+.\d])", r"\1"),
    (r"(?<=\d) +(?=[)\]}])", ""),
    (r"([(\[{])([-+]?[\d.]+)(?: *, +[-+]?[\d.]+)+(?=[)\]}])", r"\1\2~"),  # a pair
    (r"(?<=[\d)]) *- *(?=\()|(?<=\b[b-zB-HJ-Z]) +[-+*/^] *(?=[.\d(])|(?<=[a-zA-Z]) +[+*/^] +(?=[.\d(])", "~"),
    (r"(?:\A|(?<=[\s=:(]))- *\(([\d.,/]+)\)", r" -\1"),
    (r"(?<=\d) +: +(?=[.\d])", ":"),
    (r"(?<![\d.,])\d{1,3}(?: \d{3})+(?!\d)", lambda match: match[0].replace(" ", "")),
    (r"(?<=\d) *\^ *[{(]? *([-+]?\d+) *[})]?", r"^\1"),
    (r"(?<=\d) +x +(?=[\d.])", "*"),
    (r"(?<=[\d)]) *([*/+]) *(?=[-+.\d(\\])", r"\1"),
    (r"(?<=[\d)]) +- +(?=[.\d(\\])", "~"),
    (r"(?<=\d) *[-+*^] +(?=[b-zB-HJ-Z]\b|[(\\])", "~"),
    (r"(?<![\d.,/^*~&+])(\d+) +(?:and +)?(\d+/\d+)(?![\d/])", r"\1&\2"),
    (rf"(?i)(?<=\d)[ -]?({SCALES})s?\b", r"&\1"),
    (rf"(?i)(?<=\d)(?:&(?:{SCALES}))? +and +(?:an? +|[a-z]+ +)?(?:{PARTS})\b", "~"),
    (rf"(?i)(?<=\d)(?:&(?:{SCALES}))?[ /*-]{{0,3}}\\?(?:{CHANGING})(?![^\W\d_])", "~"),
    (rf"(?<=\d)(?:&(?:{SCALES}))?[ /*-]{{0,3}}[{LETTERS}](?!['’\w]|\.\w)", "~"),
    (rf"(?i)\b(?:{LEADING})s?(?: +(?:of|and|an?|the))? +(?=[-+(]*[.\d\\])", "~"),
    (rf"(?i)~ +(?:(?:and|{BETWEEN}) +)?(?:the +)?(?=[-+(]*[.\d\\])", "~"),
    (r"(?i)(?<=\d) ?[ap]\.?m\b", "~"),
    (rf"\b(?:{MONTHS})\b\.? *(?=\d)|(?<=\d) (?:{MONTHS})\b", "~"),
    (r"(?:[<>]=|\\[lg]eq?(?![a-z])|[<>≤≥≠±√]) *(?=[-+.\d])", "~"),
    (r"(\\[a-zA-Z]+) +(?=\d)", r"\1"),
)
REWRITTEN = [(re.compile(pattern), replacement) for pattern, replacement in (*LATEX, *AROUND_IT, *SPACED)]

PLAIN = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+,\d+|\d+(?:\.\d+)?|\.\d+)"
NUMBER = re.compile(
    rf"(?P<sign>[-+]?)(?:(?P<whole>\d+)&(?=\d+/))?(?P<top>{PLAIN})"
    rf"(?:/(?P<bottom>{PLAIN})|(?:\*(?P<base>\d+))?\^(?P<power>[-+]?\d+)|[eE](?P<exponent>[-+]?\d+))?"
    rf"(?:&(?P<scale>[a-zA-Z]+))?(?:(?:{UNITS})[²³]?)?(?:[-/][^\W\d_]{{2,}})*"
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
    text = text.rpartition(MARK)[2]
    text = re.sub(r"(?<=\d)[⁺⁻]?[⁰¹²³⁴-⁹]+", lambda match: "^" + unicodedata.normalize("NFKC", match[0]), text)
    text = text.translate(CHARACTERS)
    text = re.sub("[¼-¾⅐-⅞]", lambda match: f" {unicodedata.normalize('NFKC', match[0])}".replace("⁄", "/"), text)
    for pattern, replacement in REWRITTEN:
        text = pattern.sub(replacement, text)
    together = (word for word in TOGETHER.findall(text) if re.search(r"\d", word))
    return [number for word in together for number in _numbers(word)]


def _numbers(word: str) -> list[Fraction | None]:
    """The numbers of what is written together: one, or those of 1,2,3 and of 3-5."""
    if len(word) > 2 * LONGEST:
        return [None]
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
