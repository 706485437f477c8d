"""Captions -> the tokens of the Penn Treebank tokenizer that published CIDEr figures rest on.

The official scorer runs a Java program (Stanford's PTBTokenizer 3.4.1, `-preserveLines -lowerCase`)
and drops punctuation tokens. This is the same behaviour, observed from outside and written anew, so
that scores need no Java: at each place the longest of the forms below wins, what follows a form
where that is part of it counted in, and of equally long ones the first.

It was compared with the program on a large number of generated captions (see `tests`). Known to
differ: swear words with asterisks, and symbols outside the blocks listed here.
"""

import functools
import re
import sys
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

# Removed after lower-casing, which is why "-lrb-" stays: the official list has it in capitals.
PUNCTUATION = frozenset("'' ' `` ` -LRB- -RRB- -LCB- -RCB- . ? ! , : - -- ... ;".split())

APOS = r"(?:['\u0092\u2019]|(?i:&apos;))"
APOS_ETC = rf"(?:{APOS}|[`\u0091\u2018\u201b])"
SPACE = r"[ \t\n\u00a0\u2000-\u200a\u3000]"
HYPHEN = r"[-_\u058a\u2010\u2011]"
MID_STOP = r"[,;:\u3001]"  # after a full stop, it shows that no sentence ended there
REDUCED = rf"{APOS}(?i:[msd]|re|ve|ll)"

# Abbreviations keep their full stop: these before anything, names of states that are words too
# with their capital, and others before numbers.
ABBREVIATIONS = (
    "jan feb mar apr jun jul aug sept? oct nov dec mon tues? wed thu thurs fri "
    "ala ariz calif colo conn ct dak fla ga ind kans? ky md mich minn mo mont neb nev okla penn "
    "tenn va vt wisc? wyo inc cos? corp pp?t(?-i:[ye])s? ltd plc rt bancorp bhd assn univ intl sys "
    "tel est ext sq jr bros (?:ed|ph)\\.d esq etc al seq bldg"
).split()
TITLES = (
    "mr mrs ms drs? profs? sens? reps? attys? lt col gen messrs govs? adm rev maj sgt cpl pvt capt "
    "ste? ave pres lieut hon brig co?mdr pfc spc supts? det mt ft adj adv asst assoc ens insp mlle "
    "mme msgr sfc sr vs alex wm jos cie a\\.k\\.a cf treas ph invt elec natl m(?-i:[ft])g dept "
    "blvd rd"
).split()
CAPITALISED = "Az Ark Del Ill La Mass Miss Ore Pa Tex Wash".split()
BEFORE_NUMBERS = "ca figs? prop nos? art bldg pp op".split()
INITIALS = r"(?:[A-Za-z](?:\.[A-Za-z])*|(?i:canada|sino|korean|eu|japan|non)-(?i:u\.s))"
SENTENCE_STARTS = (
    "About According Additionally After An A As At But Earlier He Her Here However If In It Last "
    "Many More Mr\\. Ms\\. Now Once One Other Our She Since So Some Such That The Their Then There "
    "These They This We When While What Yet You"
).split()

# Two tokens, though no apostrophe shows it.
SPLIT_BEFORE_LAST_TWO = ("gonna", "gotta", "lemme", "gimme", "wanna")
SPLIT_BEFORE_LAST_THREE = ("cannot", "'twas")
PLAIN_WORD = re.compile(r"[A-Za-z]+(?=[,;:!?]?[ \n])")  # most of a caption: no other form is longer

NOT = rf"[nN]{APOS_ETC}[tT]"
HYPHENED = r"[A-Za-z0-9][A-Za-z0-9.,\u00ad]*(?:-(?:[A-Za-z](?:\.[A-Za-z])+\.|[A-Za-z0-9\u00ad]+))+"
SLASHED = r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}(?:\\?/[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}){1,2}"
LETTERS_AND = r"[A-Z]+(?:(?:[+&]|&amp;)[A-Z]+)+"
FILE_NAME = (
    r"(?:[A-Za-z0-9]+\.)+(?i:bat|bmp|c|class|cgi|cpp|dll|docx?|exe|gif|gz|h|html?|jar|java|jpe?g|"
    r"mov|mp3|pdf|php|pl|png|ppt|ps|py|sql|tar|txt|wav|x|xml|zip)"
)
PHONE = (
    r"(?:\([0-9]{2,3}\)[ \u00a0]?|(?:\+\+?)?(?:[0-9]{2,4}[- \u00a0])?[0-9]{2,4}[- \u00a0])"
    r"[0-9]{3,4}[- \u00a0]?[0-9]{3,5}"
    r"|(?:(?:\+\+?)?[0-9]{2,4}\.)?[0-9]{2,4}\.[0-9]{3,4}\.[0-9]{3,5}"
)
ADDRESSES = (
    r"(?i:https?)://[^ \t\n\f\r\"<>|(){}]+[^ \t\n\f\r\"<>|.!?(){},-]",
    r"(?:(?i:www)\.(?:[^ \t\n\f\r\"<>|.!?(){},]+\.)+[a-zA-Z]{2,4}"
    # the range from comma to underscore takes in digits and capitals; it is the program's
    r"|(?:[^ \t\n\f\r\"`'<>|.!?(){},-_$]+\.)+(?i:com|net|org|edu))"
    r"(?:/[^ \t\n\f\r\"<>|()]+[^ \t\n\f\r\"<>|.!?(){},-])?",
    r"[a-zA-Z0-9][^ \t\n\f\r\"<>|()\u00a0{}]*@(?:[^ \t\n\f\r\"<>|(){}.\u00a0]+\.)*"
    r"[^ \t\n\f\r\"<>|(){}.\u00a0]+",
)
_NAME = r"[A-Za-z][A-Za-z0-9_:.-]*"
_VALUE = rf"(?:'[^'\n]*'|\"[^\"\n]*\"|{_NAME})"
MARKUP = (
    rf"<(?:[!?][A-Za-z-][^>\n]*|{_NAME}(?:[ ]+{_NAME}(?:[ ]*=[ ]*{_VALUE})?)*[ ]*/?|/{_NAME})[ ]*>"
)
SYMBOLS = (
    r"[+%&~^|\\¦§¨©¬®¯°-³´-º×÷\u0387\u05be\u05c0\u05c3\u05c6\u05f3\u05f4\u0600-\u0603"
    r"\u0606-\u060a\u060c\u0614\u061b\u061e\u066a\u066d\u0703-\u070d\u07f6-\u07f8\u0964\u0965\u0e4f"
    r"\u1fbd\u2016\u2017\u2020-\u2023\u2030-\u2038\u203b\u203e-\u2042\u2044\u207a-\u207f\u208a-\u208e"
    r"\u2100-\u214f\u2190-\u21ff\u2200-\u2bff\u3012\u30fb\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40"
    r"\uff5b-\uff65]"
)

WRITTEN = (
    {"£": "#", "¢": "cents", "\u0085": "...", "…": "..."}
    | dict.fromkeys("€¤\u0080\u20a0", "$")
    | {"¼": "1/4", "½": "1/2", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"}
    | dict.fromkeys(("---", "----", "\u0096", "\u0097", "–", "—", "―"), "--")
    | dict.fromkeys(("&mdash;", "&ndash;", "&MD;", "&nbsp;"), "--")
)
ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&apos;": "'", "&quot;": '"'}
QUOTES = str.maketrans(
    dict.fromkeys("\u0082\u0091\u2018\u201a\u201b\u2039", "`")
    | dict.fromkeys("\u0092\u2019\u203a", "'")
    | dict.fromkeys("\u0084\u0093\u201c\u201e«", "``")
    | dict.fromkeys('\u0094\u201d»"', "''")
)
BRACKETS = str.maketrans(
    {"(": "-LRB-", ")": "-RRB-", "[": "-LSB-", "]": "-RSB-", "{": "-LCB-", "}": "-RCB-"}
)
SOFT_HYPHEN = 0xAD
LAST_MARK = 0x0ECD


def tokenize(captions: Sequence[str]) -> list[list[str]]:
    """The lower-case tokens of each caption, punctuation dropped.

    >>> tokenize(["It's a dog (small) on the beach..."])
    [['it', "'s", 'a', 'dog', '-lrb-', 'small', '-rrb-', 'on', 'the', 'beach']]

    Quirks: captions are read as one text, a line each, so in rare cases the next one matters: the
      full stop of "no." or "plan b." stays or goes with the digit or capital that follows.

    Differs: other line separators inside a caption are spaces; in the official pipeline they shift
      all captions that follow.
    """
    text = "".join(" ".join(caption.splitlines()) + "\n" for caption in captions)
    lines: list[list[str]] = [[]]
    at = 0
    while at < len(text):
        if text[at] in " \n":
            if text[at] == "\n":
                lines.append([])
            at += 1
            continue
        length, token = _next_token(text, at)
        at += max(1, length)  # a character that begins no form is dropped
        if token and token not in PUNCTUATION:
            lines[-1].append(token)
    return lines[:-1]


def _next_token(text: str, at: int) -> tuple[int, str]:
    """(characters used, token as written) of the longest form, context counted in."""
    plain = PLAIN_WORD.match(text, at)
    if plain and plain[0].lower() not in SPLIT_BEFORE_LAST_TWO + SPLIT_BEFORE_LAST_THREE:
        return len(plain[0]), plain[0].lower()
    end, best = at, None
    for form in _forms():
        found = form.pattern.match(text, at)
        if found and found.end() > end:
            end, best = found.end(), (form, found[1])
    if best is None:
        return 0, ""
    form, token = best
    token = token[: len(token) - form.reread]
    written = token if form.is_verbatim else _written(token)
    # a space inside a token (markup, a fraction, a phone number) must not part it
    return len(token), written.replace(" ", "\u00a0").lower()


def _written(token: str) -> str:
    """How a token is written in the output: entities, quotes, brackets, dashes and money."""
    if token in WRITTEN:
        return WRITTEN[token]
    if re.fullmatch(r"\.[. \u00a0]*\.", token):
        return "..."
    for entity, character in ENTITIES.items():
        token = re.sub(entity, character, token, flags=re.IGNORECASE)
    return token.translate(QUOTES).replace("\u00ad", "").translate(BRACKETS)


class _Form(NamedTuple):
    """One kind of token: its look with what must follow, and how much of its end is read again."""

    pattern: re.Pattern[str]
    reread: int
    is_verbatim: bool


def _form(look: str, context: str = "", *, reread: int = 0, is_verbatim: bool = False) -> _Form:
    return _Form(re.compile(f"({look}){context}"), reread, is_verbatim)


@functools.cache
def _forms() -> tuple[_Form, ...]:
    """All forms; their order decides between equally long ones."""
    letter, digit = _letters(), r"\d"
    word = rf"{letter}(?:{letter}|{digit})*(?:[.!?]{letter}(?:{letter}|{digit})*)*"
    part = rf"(?:[dDoOlL]{APOS_ETC}(?:{letter}|{digit}))?(?:{letter}|{digit})+"
    thing = rf"{part}(?:{HYPHEN}{part})*"
    return (
        _form("(?i:" + "|".join(SPLIT_BEFORE_LAST_THREE) + ")", reread=3),
        _form(rf"{APOS}(?i:tis)|(?i:" + "|".join(SPLIT_BEFORE_LAST_TWO) + ")", reread=2),
        _form(MARKUP, is_verbatim=True),
        _form(
            r"&(?i:md|mdash|ndash|amp|nbsp|ht|tl|ur|lr|qc|ql|qr|odq|cdq|#[0-9]+);|[\u0096\u0097–—―]"
        ),
        _form(word, REDUCED),
        _form(r"[A-Za-z\u00ad]*[A-MO-Za-mo-z]\u00ad*", NOT),
        _form(word),
        *_words_with_apostrophes(letter),
        *(_form(address, is_verbatim=True) for address in ADDRESSES),
        _form(rf"@[A-Za-z_][A-Za-z_0-9]*|#{letter}+"),
        _form(REDUCED, "[^A-Za-z]"),
        _form(NOT, "[^A-Za-z]"),
        *_numbers(digit),
        _form(r"-(?i:[lr][rcs]b)-|(?i:c\.d\.s|pro-|anti-)|[cC]\+\+|[cCfF]#"),
        _form(SLASHED),
        *_abbreviations(digit),
        _form(rf"{APOS}[0-9][0-9]", r"\s", is_verbatim=True),
        _form(FILE_NAME, r"(?:\s|[.?!,\"'<])"),
        _form(rf"(?:{word}|{HYPHENED}|{thing}|{LETTERS_AND})\.", MID_STOP),
        *_marks(),
        _form(REDUCED),  # a straight quote here is the mark before a word; a curly one is not
        _form(HYPHENED),
        _form(thing, is_verbatim=True),
        _form(LETTERS_AND),
        _form(rf"[`\u2018-\u201f\u0082\u0084\u0091-\u0094\u2039\u203a«»]{{1,2}}|{APOS}"),
        _form(SYMBOLS),
    )


def _words_with_apostrophes(letter: str) -> tuple[_Form, ...]:
    looks = (
        rf"{APOS}[nN]{APOS}?",
        rf"[lLdDjJ]{APOS}",
        rf"(?i:dunkin|somethin|ol){APOS}",
        rf"{APOS}(?i:em|till?|cause|[2-9]0s)",
        rf"[A-HJ-XZn]{APOS_ETC}{letter}{letter}+",
        rf"{letter}+[aeiouyAEIOUY]{APOS_ETC}[aeiouA-Z]{letter}*",
        r"(?i:cont'd\.?|nor'easter|c'mon|e'er|s'mores|ev'ry|li'l|nat'l)",
        rf"[oO]{APOS_ETC}[oO]",
        rf"(?i:cap){APOS}[nN]|[cC]{APOS}(?i:est)",
    )
    return (*(_form(look, is_verbatim=True) for look in looks), _form(rf"[yY]{APOS}", letter))


def _numbers(digit: str) -> tuple[_Form, ...]:
    return (
        _form(rf"{digit}{{1,2}}[-/]{digit}{{1,2}}[-/]{digit}{{2,4}}"),
        _form(rf"[-+]?(?:{digit}*(?:[.:,\u00ad\u066b\u066c]{digit}+)+|{digit}+)"),
        _form(r"[\u207a\u207b\u208a\u208b]?(?:[\u2070¹²³\u2074-\u2079]+|[\u2080-\u2089]+)"),
        _form(rf"(?:{digit}{{1,4}}[- \u00a0])?{digit}{{1,4}}(?:\\?/|\u2044){digit}{{1,4}}"),
        _form(r"[¼½¾\u2153-\u215e]"),
        _form(PHONE),
        _form(r"[A-Z]*\$|#"),
        _form(r"[¢£¤¥\u0080\u20a0\u20ac\u060b\u0e3f\u20a4\uffe0\uffe1\uffe5\uffe6]"),
    )


def _abbreviations(digit: str) -> tuple[_Form, ...]:
    starts = "|".join(map(_capitalised, SENTENCE_STARTS))
    states = "|".join(map(_capitalised, CAPITALISED))
    return (
        # a single letter before a sentence that clearly starts anew is no abbreviation
        _form("[A-Za-z]", rf"\.{SPACE}+(?:{starts}){SPACE}"),
        _form(rf"(?i:{'|'.join(BEFORE_NUMBERS)})\.", rf"{SPACE}?{digit}"),
        # two characters more count, so that "Inc.-1" is not one hyphened word
        _form(rf"(?:(?i:{'|'.join(ABBREVIATIONS)})|{states})\.", "(?s:..)?"),
        _form(rf"(?:(?i:{'|'.join(TITLES)})|{INITIALS})\."),
    )


def _capitalised(word: str) -> str:
    return f"{word[0]}(?i:{word[1:]})"


def _marks() -> tuple[_Form, ...]:
    return (
        _form("\"|(?i:&quot;)|[`']'"),
        _form("'", r"[A-Za-z][^ \t\n\u00a0]"),  # the quote before a word; "'n" alone is one
        _form(r"<<|>>|<|>|(?i:&lt;|&gt;)"),
        _form(r"[<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]]", "[^A-Za-z0-9]"),
        _form(r"[\^x=~<>]\.\[\^x=~<>]|[-^x=~<>']_[-^x=~<>']|\([-^x=~<>'][_.]?[-^x=~<>']\)"),
        _form(r"[()\[\]{}]|-+|@+|#+|_+|\*+|(?:\\\*){1,3}|[?!]+"),
        _form(r"\.\.\.+|[\u0085\u2026]|\.[ \u00a0](?:\.[ \u00a0])+\."),
        _form(r"[,;:\u3001.¡¿\u037e\u0589\u061f\u06d4\u0700-\u0702\u07fa\u3002=/]"),
    )


@functools.cache
def _letters() -> str:
    """A character class: letters, and the marks that belong to words in their scripts."""
    kept = [
        point
        for point in range(0x10000)
        if unicodedata.category(chr(point))[0] in ("L" if point > LAST_MARK else "LM")
        or point == SOFT_HYPHEN
    ]
    ranges, start = [], kept[0]
    for point, following in zip(kept, [*kept[1:], sys.maxunicode], strict=True):
        if following != point + 1:
            ranges.append(rf"\u{start:04x}-\u{point:04x}")
            start = following
    return "(?:[" + "".join(ranges) + "]|&[aeiouAEIOU](?i:acute|grave|uml);)"
