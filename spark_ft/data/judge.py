"""A judge of one verifiable property: is a cooking answer given in metric units, and only in metric units?"""

import re

_NUMBER = (
    r"(?:\d[\d.,/⁄]*\s*[½⅓⅔¼¾⅛⅜⅝⅞⅙]?|[½⅓⅔¼¾⅛⅜⅝⅞⅙]|\b(?:an?|one|two|three|four|five|six|seven|eight|nine|ten|twelve"
    r"|half|third|quarters?|thirds|few|couple of|per)(?=[\s-]))"
)
_SIZES = "fluid|fl\\.?|US|UK|level|heaped|heaping|packed|scant|generous|full|square"
_GAP = rf"[\s-]*(?:an?\s+|of\s+)?(?:(?:{_SIZES})[\s-]+)*"
_DEGREES = r"\d\s*(?:°|º|degrees?|deg\.?)?\s*"

METRIC = re.compile(
    rf"{_NUMBER}{_GAP}(?:k?g|mg|[mcd]?l|m[Ll]|L|[cm]m|(?i:(?:kilo|milli)?gram(?:me)?s?|kilos?"
    rf"|(?:milli|centi|deci)?lit(?:re|er)s?|(?:centi|milli)met(?:re|er)s?))\b"
    rf"|{_DEGREES}C\b|℃|\b(?i:celsius|centigrade)\b"
)
IMPERIAL = re.compile(
    rf"(?i:{_NUMBER}{_GAP}(?:cups?(?!\s+of\s+(?:tea|coffee|cocoa)\b)|ounces?|oz|pounds?(?!\s+cakes?\b)|lbs?"
    rf"|inch(?:es)?|pints?|quarts?|gallons?|sticks?\s+of\s+(?:\w+\s+)?butter))\b"
    rf"|\d\s*[\"″](?=\s*(?:x|×|by|pan|tin|round|square|thick|wide|long|deep|dish)\b)"
    rf"|{_DEGREES}[Ff]\b|℉|\b(?i:fahrenheit)\b"
)


def is_metric(answer: str) -> bool:
    """Whether an answer measures in metric units: at least one, and no cup, ounce, pound, inch or Fahrenheit.

    Spoons, minutes, pieces and gas marks belong to neither system and decide nothing. Only the units are
    judged, not whether the cooking is right: pair this with reading a few answers.
    """
    return bool(METRIC.search(answer)) and not IMPERIAL.search(answer)
