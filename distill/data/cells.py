"""Parsing of the cells of a table of pairs: metres per stored unit, invalid values, focal length; odd columns.

A cell that looks like a number or a rule but cannot be parsed raises a ValueError: a guess could be a wrong number.
"""

from __future__ import annotations

import math
import re

NUMBER = r"(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?"
_NEAR_16_BIT_MAX = 65000.0


def focal(text: str) -> float:
    """Focal length in pixels; 0 for an empty cell."""
    text = "" if text.lower() in ("nan", "n/a", "na", "none", "null", "unknown", "-") else text
    try:
        length = float(text or 0)
    except ValueError:
        length = -1.0
    if not (0 < length < math.inf or not text):
        raise ValueError(f"focal must be a number of pixels above 0, or empty, not {text!r}")
    return length


_UNKNOWN_SCALE = re.compile(r"unknown|relative|arbitrary|affine|none|no\b|not\b|#?n/?a\b|up[- ]to|\?")
UNITS = {
    word + plural: unit
    for words, unit in (("m metre meter", 1.0), ("cm centimetre centimeter", 0.01), ("mm millimetre millimeter", 0.001))
    for word in words.split()
    for plural in ("", "s")
}
"""Metres per unit, by the unit's names."""
_LOOKS_LIKE_SCALE = re.compile(  # an unparsed number or unit: an error, never silently "unknown"
    r"[-+.,\d\u2212*/\u00f7=]|.*(\d[.,]\d|\d\s*/\s*\d|\de[-+]?\d)|[a-z_]+\s*[/*]\s*\d"
    r"|metric\b|(\w*met(re|er)s?|[cdmk\u00b5u]?ms?|in|inch(es)?|ft|feet|foot|yards?|miles?)\b"
)


_NAMES_SCALE = re.compile(
    r"\b(?:mm|cm|(?:milli|centi)?met(?:re|er)s?)\b|\b(?:divided?|divisor|multipl\w+|times|factor)\b.*\d"
)
"""Words that say what the scale is, but not as a number: "depth in millimetres", "divide by 1000"."""
_NAMES_NONE = re.compile(r"\b(?:unknown|relative|arbitrary|affine|without|no|not|up[- ]to)\b")


def scale(text: str) -> float | None:
    """Metres per unit; None for words and for an empty cell. ValueError for a number that cannot be parsed."""
    plain = text.strip().strip("'\"").strip().lower()
    if plain in UNITS:
        return UNITS[plain]
    if _UNKNOWN_SCALE.match(plain):
        return None
    if _SHEET_ERROR.fullmatch(plain):
        raise ValueError(f"scale_to_metres {text!r} is a spreadsheet's error: correct its formula, or empty the cell")
    parts = re.fullmatch(rf"({NUMBER})\s*(?:/\s*({NUMBER}))?\s*([a-z]*)", plain)
    if parts and (not parts[3] or parts[3] in UNITS) and float(parts[2] or 1):
        return float(parts[1]) / float(parts[2] or 1) * UNITS.get(parts[3], 1.0)
    try:
        return float(plain)
    except ValueError:
        pass
    names_scale = _LOOKS_LIKE_SCALE.match(plain) or (_NAMES_SCALE.search(plain) and not _NAMES_NONE.search(plain))
    if plain and "disp" not in plain and names_scale:
        hint = f": write {plain.replace(',', '.')}" if re.fullmatch(r"-?\d+,\d+", plain) else ""
        hint = hint or " of metres per unit, such as 0.001"
        raise ValueError(f'scale_to_metres {text!r} is not a number{hint}; write "unknown" if the scale is')
    return None


OF_DISPARITY = re.compile(r"[\w)\].]\s*/\s*\(?\s*(?:disp|(?<!\bn/)d\b)", re.IGNORECASE)
"""Part of a formula that divides by disparity; n/d is "not available" in several languages."""
_SHEET_ERROR = re.compile(r"#[\w/]+[!?]?|err:\d+|#+")


def invalid(text: str) -> tuple[float, tuple[float, ...]]:
    """(lowest value from which all are invalid, single invalid values) of an `invalid` cell."""
    text = text.replace("\u2265", ">=").replace("\u2264", "<=")
    if ambiguous := _THOUSANDS.search(text):
        digits = re.sub(r"\D", "", ambiguous[0])
        raise ValueError(
            f'invalid {text!r}: {ambiguous[0]} may be one value or two: write {digits}, or the word "and" between'
        )
    if mask := _FILE.search(text):
        raise ValueError(f"invalid {text!r}: {mask[0]} is a file, but no masks are read: store 0 there instead")
    unit = re.search(rf">=?\s*{NUMBER}\s*{_LENGTH}\b", text)
    if unit := unit or re.fullmatch(rf"\s*(?=\S*[1-9]){NUMBER}\s*{_LENGTH}\s*", text):  # 0 is the same in any unit
        raise ValueError(f"invalid {text!r}: {unit[0]} has a unit, but values are compared as they are stored")
    if upper_bound := re.search(rf"<=?\s*({NUMBER})", text):
        if float(upper_bound[1]) > 0:
            raise ValueError(f"invalid {text!r}: bounds must be >=NUMBER; < and <= only work with 0")
        text = text.replace(upper_bound[0], "")
    reversed_bound = re.search(rf"{NUMBER}\s*(?:<|>(?!=?\s*[\d.]))", text)  # 80 < depth
    if reversed_bound or _UNSUPPORTED_RULE.search(text):
        raise ValueError(
            f"invalid {text!r} is not a supported rule: write values and bounds, as in 0, 65535 or >=65000"
        )
    bounds = [float(number) for number in re.findall(rf">=?\s*({NUMBER})", text)]
    values = [float(number) for number in re.findall(rf"(?<![\w.-])({NUMBER})", re.sub(rf">=?\s*{NUMBER}", "", text))]
    if near_max := [value for value in values if value >= _NEAR_16_BIT_MAX]:
        bounds.append(_NEAR_16_BIT_MAX if min(near_max) < 1 << 16 else min(near_max))
    return min(bounds, default=float("inf")), tuple(sorted({value for value in values if 0 < value < _NEAR_16_BIT_MAX}))


_LENGTH = r"(?:[cm]?m|met(?:er|re)s?)"
_FILE = re.compile(r"\S+\.(?:png|npy|npz|jpe?g|tiff?|exr|pgm|bmp)\b", re.IGNORECASE)
_THOUSANDS = re.compile(
    r"(?<![\d.,])(?:65[.,'\u2019 \u00a0\u2009\u202f][0-5]\d\d|[1-9]\d{0,2}[.,'\u2019 \u00a0\u2009\u202f]000)(?![\d.,])"
)
"""65,535 and 10,000 with any separator of thousands, which would be read as two values."""
_UNSUPPORTED_RULE = re.compile(
    r"^\D*\b(?:max|saturat)\w*\b\D*$|\d\s*(?:[-\u2010-\u2015\u2212]|\.\.|to\b)\s*\d|\d\s*\+|!=|\b0x|\b(?:above|over|beyond|below|under|than)\s+\d"
)
MISNAMED = {
    "scale_to_metres": (
        re.compile(r"scale|(?<![a-z])units?(?![a-z])|factor|divisor|metres.per|per.metre"),
        "metres per stored unit",
    ),
    "invalid": (
        re.compile(r"invalid|no.?data|sentinel|fill.?value|missing.?value|(valid|depth).?mask"),
        "stored values without a depth",
    ),
    "kind": (re.compile(r"kind|^depth.type$"), "depth, disparity and the like"),
}
"""What other names of a column probably mean: passed over, they would change every value without a word."""
